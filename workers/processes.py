"""Processes of this host, by pid: whether one runs, how to end it, and the cores there are for them."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable

import psutil

log = logging.getLogger(__name__)


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(pids: Iterable[int], *, grace: float) -> None:
    """SIGKILL those that still run after `grace` seconds for all of them: a stopped process does not obey Ray."""
    deadline = time.monotonic() + grace
    for pid in pids:
        while running(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        if running(pid):
            try:
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            except ProcessLookupError:
                log.debug("process %d ended by itself", pid)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
