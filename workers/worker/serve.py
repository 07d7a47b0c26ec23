"""The worker's loop: reads requests from its connection, runs the runner's verb, answers."""

from __future__ import annotations

import logging
import pickle
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ...raylight.errors import RaylightError
from ..wire.messages import Cancel, Failure, Reply, Request
from .conversation import Wire

if TYPE_CHECKING:
    from .runner import Runner

log = logging.getLogger(__name__)

VERBS = frozenset(
    {
        "open_store",
        "join",
        "share",
        "recognise",
        "check_links",
        "load",
        "patch",
        "define",
        "forget",
        "forward",
        "outline",
        "offload",
        "release",
        "report",
        "rates",
        "speed",
        "room",
    }
    | {"plan_vae", "tiled_shape", "decode", "encode", "release_vae"}
)


def serve(connection: Connection, runner: Runner) -> None:
    """Answer requests until the driver closes the connection or asks to `close`."""
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            break
        if isinstance(request, Cancel):
            continue  # its request was answered before it came
        if request.verb == "close":
            break
        runner.wire = Wire(connection, request.id)
        reply = answer(request, runner)
        try:
            connection.send_bytes(pickle.dumps(reply))
        except OSError:
            break
    runner.close()


def answer(request: Request, runner: Runner) -> Reply:
    """Run one request. Every exception becomes data: the driver decides what it means for the pool."""
    try:
        if request.verb not in VERBS:
            raise AssertionError(f"unknown verb {request.verb!r}")
        with runner.heard:
            value: Any = getattr(runner, request.verb)(*request.arguments)
        return Reply(id=request.id, value=value)
    except Exception as error:
        log.debug("verb %s failed", request.verb, exc_info=True)
        ours = error if isinstance(error, RaylightError) else None
        return Reply(
            id=request.id,
            failure=Failure(
                kind=type(error).__name__,
                message=str(error),
                traceback="".join(traceback.format_exception(error)),
                collectives=runner.collectives,
                error=ours,
                links=runner.standing().links,
                said=runner.said(),
            ),
        )
