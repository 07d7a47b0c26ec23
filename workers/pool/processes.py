"""Processes of this host: whether one runs, how to end it, and the cores there are for them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from ...raylight.errors import WorkerError

log = logging.getLogger(__name__)


def of(pid: int, *, name: str) -> psutil.Process:
    """The process that has this number now, told from later ones by its start time.

    Raises:
        WorkerError: it has ended; `name` says what it was.
    """
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        raise WorkerError(f"{name} (process {pid}) ended as it started", "", "Queue the prompt again") from None


def those(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes that have these numbers now; those that have ended are left out."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def running(process: psutil.Process) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stopped(pid: int) -> bool:
    """Whether a process has been stopped by a signal, and goes on only by another."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def ended_for_memory() -> int:
    """How many processes the system has ended since it started because memory was out; 0 where nobody counts."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def end(processes: Iterable[psutil.Process], *, grace: float) -> None:
    """SIGKILL those that still run after `grace` seconds for all of them: a stopped process does not obey Ray."""
    deadline = time.monotonic() + grace
    for process in processes:
        while running(process) and time.monotonic() < deadline:
            time.sleep(0.01)
        if running(process):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                log.debug("process %d ended by itself", process.pid)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
