"""Notices when one of Ray's own processes ends, also between prompts.

A client of a Ray whose control service (gcs_server) is gone is ended by Ray after a minute, without an exception: that
is ComfyUI's process. Disconnecting at once avoids it.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Iterator

import psutil

log = logging.getLogger(__name__)

PROCESSES = ("gcs_server", "raylet")


class RayWatch(threading.Thread):
    """Waits for the end of the Ray processes that this process has started.

    Args:
        lost: called with the name of a process that ended by itself.
    """

    def __init__(self, lost: Callable[[str], None]) -> None:
        super().__init__(name="raylight-watch-ray", daemon=True)
        self._lost = lost
        self._over = False
        self._end, self._wake = os.pipe()
        self._descriptors = {os.pidfd_open(pid): name for name, pid in _ours()} if hasattr(os, "pidfd_open") else {}

    def run(self) -> None:
        """Wait, and tell."""
        ready, _, _ = select.select([self._end, *self._descriptors], [], [])
        if self._end not in ready:
            process = self._descriptors[ready[0]]
            log.error("Ray's %s process has ended: disconnecting from it", process)
            self._lost(process)
        for descriptor in (self._end, self._wake, *self._descriptors):
            os.close(descriptor)

    @classmethod
    def ended(cls) -> str:
        """The name of a process of the Ray at hand that has ended by itself, "" for none."""
        for watch in cls._at_hand():
            ready, _, _ = select.select(list(watch._descriptors), [], [], 0)
            if ready:
                return watch._descriptors[ready[0]]
        return ""

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


def _ours() -> Iterator[tuple[str, int]]:
    # Ray starts them from the process that asks for it
    for process in psutil.Process().children():
        try:
            name = process.name()
        except psutil.NoSuchProcess:
            continue
        if name in PROCESSES:
            yield name, process.pid
