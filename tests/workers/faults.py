"""Patches that misbehave or look around inside the model, under the pack's name: workers import it too."""

from __future__ import annotations

import gc
import os
import signal
import time
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


def dawdle() -> None:
    time.sleep(0.2)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def times_chunked_layers(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention times 1 + the layers of this worker that have a hook on their output as feed-forwards in chunks do."""
    import torch

    layers = [m for m in gc.get_objects() if isinstance(m, torch.nn.Sequential) and m._forward_hooks]
    return func(*args, **kwargs) * (1 + len(layers))


def times_compiled_graphs(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention times 1 + the graphs that this worker has compiled."""
    import torch._dynamo.utils

    return func(*args, **kwargs) * (1 + torch._dynamo.utils.counters["stats"]["unique_graphs"])
