"""How ranks that work together leave their work together, and what is told of it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .comm import Comm, Passing
from .errors import Cancelled

LONG_S = 0.05
"""A step from which on waiting for an answer, a millisecond at most, takes no time that counts."""
SKIPPED = 4
"""Steps at most between two questions, where they are short: to ask takes half as long as to start a block's work."""


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
        self._skip = self._skipped = 0
        self._last: float | None = None

    def step(self, count: int = 0) -> None:
        """`count` more are finished. Every rank calls this equally often, at the same points of the work.

        While steps are short, not every one asks, and the answer that counts is that to the question before: by now
        it is there, so nobody waits for it. After a long step it is the one asked for now. Ranks agree on that as well.

        Raises:
            Cancelled: a rank was told to stop. All ranks raise it.
        """
        if self._total:
            self._done = min(self._done + count, self._total)
            self._report(self._done, self._total)
        if self._skipped < self._skip:
            self._skipped += 1
            return
        now = time.monotonic()
        # the first answer says nothing of the steps
        took = LONG_S if self._last is None else (now - self._last) / (self._skipped + 1)
        self._last, self._skipped = now, 0
        asked = self._control.start_maximum(torch.tensor([int(self._wanted()), int(took * 1e6)]))
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
        stop, took = answer.wait()[0].tolist()
        self._at_once = took > LONG_S * 1e6
        self._skip = min(SKIPPED, int(LONG_S * 1e6 / max(took, 1)) // 2)
        if stop:
            self.finish()
            raise Cancelled("Cancelled")
