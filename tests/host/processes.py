"""Process trees and their memory, read from /proc (Linux only)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process, told from a later one with the same number by its start time."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        fields = _stat(self.pid)
        return fields is not None and int(fields[19]) == self.started and fields[0] != "Z"

    @property
    def command(self) -> str:
        """Its command line, or an empty text when it is gone."""
        try:
            return (PROC / str(self.pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""


def tree(pid: int) -> list[Process]:
    """The process `pid` and all its descendants; empty where there is no /proc."""
    if not PROC.is_dir():
        return []
    children: dict[int, list[Process]] = {}
    found = []
    for entry in os.listdir(PROC):
        fields = _stat(int(entry)) if entry.isdigit() else None
        if fields is not None:
            process = Process(int(entry), int(fields[19]))
            children.setdefault(int(fields[1]), []).append(process)
            if process.pid == pid:
                found.append(process)
    for process in found:
        found += children.get(process.pid, [])
    return found


def workers(pid: int) -> list[Process]:
    """The workers of the pools that process `pid` has."""
    return [process for process in tree(pid) if process.command.startswith("ray::Worker")]


def memory(processes: Iterable[Process]) -> int:
    """Bytes of host memory they hold together; memory they share counts once (PSS)."""
    return sum(_pss(process.pid) for process in processes)


def kill(processes: Iterable[Process], *, wait: float = 10.0) -> list[Process]:
    """Kill what is left of `processes` and return those that are still there after `wait` seconds."""
    left = [process for process in processes if process.alive]
    for process in left:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return gone(left, wait=wait)


def gone(processes: Iterable[Process], *, wait: float) -> list[Process]:
    """Wait until none of `processes` runs, at most `wait` seconds; return those that still do."""
    end = time.monotonic() + wait
    left = list(processes)
    while left := [process for process in left if process.alive]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return left


class PeakMemory:
    """Samples the memory of a process tree in a thread, as a context manager.

    Attributes:
        bytes: the highest sum seen so far.
    """

    def __init__(self, pid: int, *, every: float = 0.25) -> None:
        self.bytes = 0
        self._pid = pid
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.bytes = max(self.bytes, memory(tree(self._pid)))
            if self._stop.wait(self._every):
                return


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third one on, which follow the command in brackets."""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _pss(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
