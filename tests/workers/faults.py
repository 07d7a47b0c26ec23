"""Patches that misbehave inside the model; imported under the pack's name, so that workers find them too."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def on_rank(rank: int, action: Callable[[], None]) -> Callable[..., Any]:
    """An attention override that acts on one rank (-1: on all) and else does what ComfyUI does."""

    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        import torch.distributed

        if rank in (-1, torch.distributed.get_rank()):
            action()
        return function(*args, **kwargs)

    return override


def fail() -> None:
    raise ValueError("a patch went wrong")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
