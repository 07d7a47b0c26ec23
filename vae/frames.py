"""When frames of a decode are finished."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..raylight.watch import Watch

CONVOLUTIONS = (torch.nn.Conv2d, torch.nn.Conv3d)


def last_convolution(model: torch.nn.Module, run: Callable[[], Any]) -> tuple[Any, torch.nn.Module | None]:
    """What `run` returns, and the convolution of `model` that ran last in it: frames are finished as it ends."""
    last: list[torch.nn.Module] = []

    def remember(module: torch.nn.Module, args: Any, output: Any) -> None:
        last[:] = [module]

    handles = [m.register_forward_hook(remember) for m in model.modules() if isinstance(m, CONVOLUTIONS)]
    try:
        return run(), last[0] if last else None
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def counting(module: torch.nn.Module | None, watch: Watch) -> Iterator[None]:
    """While it is entered, each run of `module` is a step of as many as its output has frames (pictures, without)."""

    def step(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        watch.step(output.shape[2] if output.ndim == 5 else output.shape[0])

    handle = module.register_forward_hook(step) if module is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
