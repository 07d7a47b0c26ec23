"""Notices when one of the processes that are Ray ends, also between prompts.

A client of a Ray whose control service (gcs_server) is gone is ended by Ray after a minute, without an exception: that
is ComfyUI's process. Disconnecting at once avoids it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait

from . import processes
from .own_ray import OwnRay
from .ray_keeper import NAME

log = logging.getLogger(__name__)

CONTROL = "gcs_server"
KNOCK_S = 5.0
TOGETHER_S = 0.2
MISSED = 2
"""Knocks without an answer after which a cluster's control service counts as gone; Ray itself waits for a minute."""


class RayWatch(threading.Thread):
    """Waits for the end of the Ray processes that this process has started, or of those it has joined.

    Args:
        lost: called with the name of a process that ended by itself.
        own: a Ray of our own.
        address: "host:port" of the control service of a cluster that was joined instead.
    """

    def __init__(self, lost: Callable[[str], None], *, own: OwnRay | None = None, address: str = "") -> None:
        super().__init__(name="raylight-watch-ray", daemon=True)
        self._lost = lost
        self._own = own
        self._address = address
        self._over = self._silent = False
        self._end, self._wake = os.pipe()
        # the others end with the keeper
        self._members = {NAME: own.keeper.pid, **own.processes} if own else {}
        found = self._members if hasattr(os, "pidfd_open") else {}
        self._descriptors = {os.pidfd_open(pid): name for name, pid in found.items()}

    def run(self) -> None:
        """Wait, and tell."""
        missed = 0
        while True:
            # not select.select, which knows descriptors up to 1023 only
            ready = wait([self._end, *self._descriptors], timeout=KNOCK_S)
            if not ready and not self._address:
                self._continue()
            elif not ready:
                missed = 0 if _answers(self._address) else missed + 1
                self._silent = self._silent or missed >= MISSED
            if ready or self._silent:
                break
        if self._end not in ready:
            process = self._gone()
            log.error("Ray's %s process has ended: disconnecting from it", process)
            self._lost(process)
        for descriptor in (self._end, self._wake, *self._descriptors):
            os.close(descriptor)

    @classmethod
    def ended(cls, *, ask: bool = False) -> str:
        """The name of a process of the Ray at hand that has ended by itself, "" for none.

        Args:
            ask: knock at a cluster that was joined, and do not wait for the next knock: something has gone wrong.
        """
        for watch in cls._at_hand():
            if ask and watch._address:
                watch._silent = watch._silent or not _answers(watch._address)
            name = watch._gone()
            if name:
                return name
        return ""

    @classmethod
    def own_at_hand(cls) -> OwnRay | None:
        """The Ray of our own that is at hand."""
        return next((watch._own for watch in cls._at_hand()), None)

    @classmethod
    def wake(cls) -> None:
        """Have those of our own processes go on that somebody has stopped (SIGSTOP): Ray waits for them for ever."""
        for watch in cls._at_hand():
            watch._continue()

    @classmethod
    def end(cls) -> None:
        """End our own processes: they do not answer."""
        for watch in cls._at_hand():
            processes.end(processes.those(watch._members.values()), grace=0)

    @classmethod
    def stop(cls) -> None:
        """The Ray at hand is over: what becomes of its processes is told to nobody any more."""
        for watch in cls._at_hand():
            watch._over = True
            os.write(watch._wake, b".")

    @classmethod
    def _at_hand(cls) -> Iterator[RayWatch]:
        for thread in threading.enumerate():
            if isinstance(thread, cls) and not thread._over:
                yield thread

    def _continue(self) -> None:
        for name, pid in self._members.items():
            if processes.stopped(pid):
                log.warning("Ray's %s process had been stopped: it goes on", name)
                os.kill(pid, signal.SIGCONT)

    def _gone(self) -> str:
        if self._silent:
            return CONTROL
        ended = wait(list(self._descriptors), 0)
        if ended:
            # the keeper is first among them, and its end is seen a moment after that of those it takes with it
            ended += wait(list(self._descriptors)[:1], TOGETHER_S)
        return next((name for descriptor, name in self._descriptors.items() if descriptor in ended), "")


def knock(address: str) -> None:
    """Connect to "host:port" and hang up.

    Raises:
        OSError: nobody answers there.
        ValueError: it is no such address.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def _answers(address: str) -> bool:
    try:
        knock(address)
    except OSError:
        return False
    return True
