"""What a decode tells while it runs, and how its ranks leave it together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..raylight.comm import Comm, Passing
from ..raylight.errors import Cancelled

CONVOLUTIONS = (torch.nn.Conv2d, torch.nn.Conv3d)


class Watch:
    """Counts what is finished, reports it, and ends the work on all ranks where one of them wants that.

    Args:
        comm: the ranks that work together.
        total: what there is to finish; 0 for nothing to report.
        device: where the ranks' collectives take tensors from.
        report: called with what is finished and with `total`.
        wanted: whether this rank has been told to stop.
    """

    def __init__(
        self,
        comm: Comm,
        *,
        total: int,
        device: torch.device,
        report: Callable[[int, int], None],
        wanted: Callable[[], bool],
    ) -> None:
        self._comm = comm
        self._total = total
        self._device = device
        self._report = report
        self._wanted = wanted
        self._done = 0
        self._asked: Passing | None = None

    def step(self, count: int) -> None:
        """`count` more are finished. Every rank calls this equally often, at the same points of the work.

        The answer that counts is the one asked for a step before: by now it is there, so nobody waits for it.

        Raises:
            Cancelled: a rank was told to stop. All ranks raise it.
        """
        self._done = min(self._done + count, self._total)
        self._report(self._done, self._total)
        before, flag = self._asked, torch.tensor([self._wanted()], dtype=torch.int32, device=self._device)
        self._asked = self._comm.start_maximum(flag)
        if before is not None and before.wait()[0].item():
            self.finish()
            raise Cancelled("Decoding was cancelled")

    def finish(self) -> None:
        """Nothing is asked any more."""
        if self._asked is not None:
            self._asked.wait()
            self._asked = None


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
