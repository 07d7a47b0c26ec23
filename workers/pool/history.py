"""What has happened to this process's pools: faults, restarts, and starts that failed one after another."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ...raylight.config import PoolConfig
from ...raylight.errors import WorkerError

TRIES = 3
WITHIN_S = 300.0
TEXT_CHARS = 2000


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An error that a pool was ended for, or did not start for. `at` is in seconds since the epoch."""

    at: float
    error: str
    starting: bool


class History:
    """Notes what becomes of pools. It is read from any thread, without a lock.

    Attributes:
        fault: the last one.
        restarts: pools that were started after a fault.
        starting: whether a pool starts at the moment.
        chosen: what was chosen last for the cards of a pool (see chosen.Chosen), and which of its replicas computes.
    """

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.restarts = 0
        self.starting = False
        self.chosen: dict[PoolConfig, tuple[PoolConfig, int]] = {}
        self._recovering = False
        self._failed: tuple[PoolConfig | None, list[float]] = (None, [])

    def check(self, config: PoolConfig) -> None:
        """Whether a pool of this config may be started.

        Raises:
            WorkerError: too many starts of it have failed, and nothing has changed since.
        """
        if self.waiting and config == self._failed[0]:
            raise WorkerError(
                f"The pool has failed to start {TRIES} times within five minutes, and is not started again as it is",
                f"the last time: {self.fault.error if self.fault else ''}",
                "Change a setting of Ray Init Actor, or run Kill Ray Workers, to have it tried again",
            )

    @property
    def waiting(self) -> bool:
        """Whether so many starts have failed that one waits for a change."""
        times = self._failed[1]
        return len(times) == TRIES and times[-1] - times[0] <= WITHIN_S

    def forgive(self) -> None:
        """Have a start tried again."""
        self._failed = (None, [])

    def started(self) -> None:
        """A pool has started."""
        self.forgive()
        self.restarts += self._recovering
        self._recovering = False

    def failed(self, config: PoolConfig, error: BaseException) -> None:
        """A pool has not started."""
        self.lost(error, starting=True)
        known = self._failed[1] if self._failed[0] == config else []
        self._failed = (config, [*known, time.monotonic()][-TRIES:])

    def lost(self, error: BaseException, *, starting: bool = False) -> None:
        """A pool was ended for an error."""
        text = str(error) or type(error).__name__
        self.fault = Fault(at=time.time(), error=text[:TEXT_CHARS], starting=starting)
        self._recovering = True
