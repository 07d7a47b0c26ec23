"""What the failures of several ranks come to: the first one seen is often a victim's."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

from ...raylight.errors import RaylightError, WorkerError
from .messages import Failure, Reply

log = logging.getLogger(__name__)

CRASH = re.compile(r"\*\*\* (SIG[A-Z]+) received at")
"""What Ray's workers write when a signal ends them that says so; SIGKILL does not."""
SIGNALS = {
    "SIGSEGV": "it touched memory that is not its own",
    "SIGBUS": "a file that it had mapped became shorter, or shared memory is full",
    "SIGABRT": "it gave up by itself",
    "SIGILL": "an instruction that this CPU does not have",
    "SIGFPE": "an arithmetic error",
}
TRANSPORT_SIGNS = ("gloo", "NCCL", "Connection closed", "reset by peer", "Broken pipe", "Timed out waiting")


def describe(failures: Mapping[int, Failure], verb: str, hosts: Sequence[str] = ()) -> RaylightError:
    """The error that says what went wrong during `verb`; the first worker's traceback goes into the log.

    Args:
        hosts: addresses of the workers' machines, by rank.
    """
    rank, failure = min(failures.items(), key=lambda item: (_from_transport(item[1]), item[0]))
    log.error("worker %d failed during %s:\n%s", rank, verb, failure.traceback)
    for end, seen in sorted(failures.items()):
        if seen.links and _from_transport(failure):
            return link_lost(end, seen.links, verb, hosts)
    if failure.error is not None:
        return failure.error
    remedy = "The worker's traceback is in ComfyUI's log"
    if "OutOfMemory" in failure.kind or "Cannot allocate memory" in failure.message:
        remedy = "Use a smaller size or batch, more workers, or a smaller weight_dtype. " + remedy
    return WorkerError(
        f"Worker {rank} failed during {verb}", f"{failure.kind}: {failure.message}", remedy, failure.kind
    )


def dead(rank: int, where: str, verb: str, *, words: str, starved: bool) -> WorkerError:
    """The error for a worker whose process (`where`) ended.

    Args:
        words: what it wrote last to its standard error: a process that crashes says by which signal.
        starved: whether the system has ended processes for memory since the pool started.
    """
    remedy = "Queue the prompt again: a new pool starts by itself. If it recurs, use a smaller size or fewer workers"
    crash = CRASH.search(words)
    if crash:
        log.error("worker %d wrote last:\n%s", rank, words[crash.start() :])
        why = f"its process crashed, by {crash[1]} ({SIGNALS.get(crash[1], 'see its last words in the log')})"
        remedy = "Queue the prompt again: a new pool starts by itself. ComfyUI's log has where it crashed"
    elif starved:
        why = "the system ended its process because memory was out"
    else:
        why = "its process was killed, or left without a word; out of memory is the usual cause (see the system log)"
    return WorkerError(f"Worker {rank} ({where}) died during {verb}", why, remedy)


def link_lost(rank: int, peers: Sequence[str], verb: str, hosts: Sequence[str]) -> WorkerError:
    """The error for workers that all live, of which some do not reach others any more.

    Args:
        rank: one of those.
        peers: addresses of the machines that it does not reach.
        hosts: addresses of the workers' machines, by rank.
    """
    there = [other for other, host in enumerate(hosts) if host in peers and other != rank]
    ends = f"worker{'s' * (len(there) > 1)} {', '.join(map(str, there))} on " if there else ""
    here = f" on {hosts[rank]}" if hosts else ""
    return WorkerError(
        f"The link between worker {rank}{here} and {ends}{', '.join(peers)} is dead",
        f"nothing that was sent over it during {verb} has been acknowledged any more",
        "Check the network between these machines, then queue the prompt again: a new pool starts by itself",
    )


def machine_lost(rank: int, host: str, verb: str) -> WorkerError:
    """The error for a worker whose machine Ray does not reach any more."""
    return WorkerError(
        f"The link to worker {rank} on {host} is dead, or its machine is",
        f"Ray has heard nothing of that machine any more during {verb}",
        "Check the network between these machines, then queue the prompt again: a new pool starts by itself",
    )


def ray_lost(process: str, verb: str) -> WorkerError:
    """The error for workers that ended because Ray did."""
    return WorkerError(
        f"Ray's {process} process ended during {verb}, and the workers with it",
        "out of memory is the usual cause (see the system log)",
        "Queue the prompt again: Ray and a new pool start by themselves",
    )


def failures_of(replies: Mapping[int, Reply], ranks: Iterable[int]) -> dict[int, Failure]:
    """The failures among the replies of some ranks, by rank."""
    found = {rank: replies[rank].failure for rank in ranks}
    return {rank: failure for rank, failure in found.items() if failure is not None}


def _from_transport(failure: Failure) -> bool:
    return any(sign in failure.message for sign in TRANSPORT_SIGNS)
