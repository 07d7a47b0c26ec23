"""How ranks that work together leave their work together, and what is told of it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .comm import Comm, Passing
from .errors import Cancelled

LONG_S = 0.05
"""A step from which on waiting for an answer, a millisecond at most, takes no time that counts."""


def quiet(done: int, total: int) -> None:
    """Tells nobody."""


class Watch:
    """Counts what is finished, reports it, and ends the work on all ranks where one of them wants that.

    Args:
        control: the ranks that work together, on CPU connections (`Mesh.control_of`): asking a device would wait
            for everything that is queued there.
        wanted: whether this rank has been told to stop.
        total: what there is to finish; 0 for nothing to report.
        report: called with what is finished and with `total`.
    """

    def __init__(
        self,
        control: Comm,
        *,
        wanted: Callable[[], bool],
        total: int = 0,
        report: Callable[[int, int], None] = quiet,
    ) -> None:
        self._control = control
        self._total = total
        self._report = report
        self._wanted = wanted
        self._done = 0
        self._asked: Passing | None = None
        self._at_once = False
        self._last = time.monotonic()

    def step(self, count: int = 0) -> None:
        """`count` more are finished. Every rank calls this equally often, at the same points of the work.

        While steps are short, the answer that counts is the one asked for a step before: by now it is there, so
        nobody waits for it. After a long step it is the one asked for now. Ranks agree on that as well.

        Raises:
            Cancelled: a rank was told to stop. All ranks raise it.
        """
        if self._total:
            self._done = min(self._done + count, self._total)
            self._report(self._done, self._total)
        now = time.monotonic()
        asked = self._control.start_maximum(
            torch.tensor([self._wanted(), now - self._last > LONG_S], dtype=torch.int32)
        )
        self._last = now
        before, self._asked = self._asked, asked
        if before is not None:
            self._hear(before)
        if self._at_once:
            self._asked = None
            self._hear(asked)

    def finish(self) -> None:
        """Nothing is asked any more."""
        if self._asked is not None:
            self._asked.wait()
            self._asked = None

    def _hear(self, answer: Passing) -> None:
        stop, self._at_once = map(bool, answer.wait()[0].tolist())
        if stop:
            self.finish()
            raise Cancelled("Cancelled")
