"""What the failures of several ranks come to: the first one seen is often a victim's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from ..raylight.errors import RaylightError, WorkerError
from .messages import Failure, Reply

log = logging.getLogger(__name__)

TRANSPORT_SIGNS = ("gloo", "NCCL", "Connection closed", "reset by peer", "Broken pipe", "Timed out waiting")


def describe(failures: Mapping[int, Failure], verb: str) -> RaylightError:
    """The error that says what went wrong during `verb`; the first worker's traceback goes into the log."""
    rank, failure = min(failures.items(), key=lambda item: (_from_transport(item[1]), item[0]))
    log.error("worker %d failed during %s:\n%s", rank, verb, failure.traceback)
    if failure.error is not None:
        return failure.error
    remedy = "The worker's traceback is in ComfyUI's log"
    if "OutOfMemory" in failure.kind or "Cannot allocate memory" in failure.message:
        remedy = "Use a smaller size or batch, more workers, or a smaller weight_dtype. " + remedy
    return WorkerError(
        f"Worker {rank} failed during {verb}", f"{failure.kind}: {failure.message}", remedy, failure.kind
    )


def dead(rank: int, where: str, verb: str) -> WorkerError:
    """The error for a worker whose process (`where`) ended."""
    return WorkerError(
        f"Worker {rank} ({where}) died during {verb}",
        "its process ended; out of memory is the usual cause (see the system log)",
        "Queue the prompt again: a new pool starts by itself. If it recurs, use a smaller size or fewer workers",
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
