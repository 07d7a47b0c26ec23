"""Runs jobs in forked processes of their own, some at a time: one that crashes or hangs is one failed job."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

CONTEXT: Any = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Ended:
    """How a job ended: with a value, or `problem` says why there is none."""

    value: Any = None
    problem: str = ""


def run(jobs: Mapping[str, Callable[[], Any]], *, seconds: float, at_once: int) -> Iterator[tuple[str, Ended]]:
    """Run jobs; how each ended, in the order of their ends.

    Args:
        jobs: by name; what they return is pickled.
        seconds: that each may take.
        at_once: how many run side by side.
    """
    waiting = list(jobs.items())
    running: dict[Any, tuple[str, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, job = waiting.pop(0)
                ours, theirs = CONTEXT.Pipe(duplex=False)
                process = CONTEXT.Process(target=_work, args=(theirs, job))
                process.start()
                theirs.close()
                running[ours] = name, process, time.monotonic() + seconds
            first = min(deadline for _, _, deadline in running.values())
            ready = multiprocessing.connection.wait(list(running), timeout=max(0.0, first - time.monotonic()))
            late = [pipe for pipe, (_, _, deadline) in running.items() if time.monotonic() > deadline]
            for pipe in dict.fromkeys((*ready, *late)):
                name, process, _ = running[pipe]
                ended = _received(pipe, process) if pipe in ready else Ended(problem=f"no end after {seconds:.0f} s")
                del running[pipe]
                _end(process)
                yield name, ended
    finally:
        for _, process, _ in running.values():
            _end(process)


def _work(pipe: Any, job: Callable[[], Any]) -> None:
    os.setpgid(0, 0)  # what it starts ends with it
    try:
        pipe.send(Ended(job()))
    except Exception:
        pipe.send(Ended(problem=traceback.format_exc()))


def _received(pipe: Any, process: Any) -> Ended:
    try:
        ended: Ended = pipe.recv()
    except EOFError:
        process.join(10)
        return Ended(problem=f"its process ended with {process.exitcode}")
    return ended


def _end(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # also what it has left behind
    process.join(10)
