"""Ray actors: where they go, what they are started with, and what becomes of their calls."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import ray

from ...raylight.config import PoolConfig
from ...raylight.errors import RaylightError, WorkerError
from ..wire.messages import HostEnvironment
from . import actor, cluster, devices, own_ray
from .connection import AGAIN, own_folder

log = logging.getLogger(__name__)

WORKER_SETTINGS = {"MALLOC_ARENA_MAX": "1"}
"""Of worker processes: one heap. malloc_trim gives back the end of glibc's first heap only; what is freed at the end of
another thread's, up to 64 MiB, stays in the process."""
POLL_S = 0.1
CAUSE_WAIT_S = 2.0
LAST_BYTES = 1 << 16


def seats(config: PoolConfig, environment: HostEnvironment, interrupted: Callable[[], bool]) -> list[cluster.Seat]:
    """Where each rank is to run.

    Raises:
        ConfigError: the cluster has no room, or a machine of it lacks what workers need.
        WorkerError: the user cancelled, or a machine did not answer.
    """
    if config.local:
        return cluster.own_seats(config.parallel.world)
    return cluster.seats(config, environment, gather, interrupted)


def make_actors(
    config: PoolConfig, environment: HostEnvironment, seats: Sequence[cluster.Seat], *, first: int
) -> list[Any]:
    """Create one actor per seat, from that of rank `first` on. Nothing is awaited: they start side by side."""
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": {"PYTHONPATH": _python_path(config, environment), **WORKER_SETTINGS}},
    }
    if not config.local and environment.device_type == "cuda":
        options["num_gpus"] = 1  # a shared cluster counts its GPUs; our own does not have to
    remote: Any = ray.remote(concurrency_groups={"control": 1})(actor.Worker)  # type: ignore[call-overload]
    new = list(enumerate(seats))[first:]
    return [remote.options(**options, **cluster.options(seat.node)).remote(rank) for rank, seat in new]


def worker_variables(config: PoolConfig, environment: HostEnvironment) -> list[dict[str, str]]:
    """Environment variables of each worker, set before it imports torch.

    Raises:
        ConfigError: the devices that are asked for do not exist, or are fewer than the workers.
    """
    world, kind = config.parallel.world, environment.device_type
    variables: list[dict[str, str]] = [{} for _ in range(world)]
    if kind == "cpu":
        variables = [{"CUDA_VISIBLE_DEVICES": ""} for _ in range(world)]
    elif config.local or config.devices:
        variables = [{devices.VARIABLES[kind]: device} for device in devices.chosen(config, kind)]
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if config.local and loopback:
        meeting = {"GLOO_SOCKET_IFNAME": loopback, **_unless_set(NCCL_SOCKET_IFNAME=loopback, NCCL_RAS_ENABLE="0")}
        variables = [{**own, **meeting} for own in variables]
    return variables


def _unless_set(**variables: str) -> dict[str, str]:
    """NCCL meets where other machines reach it, and answers any local user's questions, if it is not told otherwise."""
    return {name: os.environ.get(name, value) for name, value in variables.items()}


def kill(actors: list[Any]) -> None:
    """End actors now. Safe when some, or Ray itself, are gone already."""
    if not ray.is_initialized():
        return
    for handle in actors:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(handle, no_restart=True)


def gather(
    references: list[Any], *, timeout: float, what: str, interrupted: Callable[[], bool] = lambda: False
) -> list[Any]:
    """The results of actor calls, bounded; ends early when the user cancels.

    Raises:
        WorkerError: an actor failed, died or did not answer in time, or the user cancelled; a Raylight error of
            an actor passes as it is.
    """
    deadline = time.monotonic() + timeout
    waiting: list[Any] = list(references)
    done: list[Any] = []
    try:
        while waiting:
            if not ray.is_initialized():  # ray.wait would silently start a new Ray
                raise WorkerError(f"Ray ended while the workers should {what}", "", AGAIN)
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            ray.get(done)
            if waiting and interrupted():
                raise WorkerError(f"Cancelled while the workers should {what}")
            if waiting and time.monotonic() > deadline:
                raise WorkerError(
                    f"The workers did not {what} within {timeout:.0f} s", "", "Check the load of the machine"
                )
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        found = error.as_instanceof_cause()
        if isinstance(found, RaylightError):
            raise found from error
        log.error("a worker failed while it should %s:\n%s", what, error)
        cause = f"{type(error.cause).__name__}: {error.cause}"
        raise WorkerError(
            f"A worker failed while it should {what}", cause, "The worker's traceback is in ComfyUI's log"
        ) from error
    except ray.exceptions.RayError as error:
        log.error("a worker ended while it should %s: %s", what, error)
        raise WorkerError(
            f"A worker ended while it should {what}",
            "its process was killed, or crashed; out of memory is the usual cause (see the system log)",
            f"{AGAIN}: a new pool starts by itself",
        ) from error
    finally:
        # an error keeps this frame, which must not keep what is Ray's
        for kept in (waiting, done, references):
            kept.clear()


def ready(references: list[Any]) -> list[Any]:
    """Which of these calls have ended, without waiting."""
    if not ray.is_initialized():  # ray.wait would silently start a new Ray
        return list(references)
    return ray.wait(references, num_returns=len(references), timeout=0)[0]


def answer(reference: Any) -> Any:
    """The result of a call that has ended, None where it failed."""
    try:
        return ray.get(reference, timeout=0) if ray.is_initialized() else None
    except ray.exceptions.RayError as error:
        traceback.clear_frames(error.__traceback__)  # those of ray.get are garbage that has the reference
        return None


def have_ended(references: list[Any], timeout: float, interrupted: Callable[[], bool]) -> bool:
    """Whether these calls end in time, each without an error, and before the user cancels."""
    deadline = time.monotonic() + timeout
    while True:
        if not ray.is_initialized():
            return False
        ended = ray.wait(references, num_returns=len(references), timeout=min(POLL_S, timeout))[0]
        if len(ended) == len(references):
            break
        if interrupted() or time.monotonic() >= deadline:
            return False
    try:
        ray.get(ended)
    except ray.exceptions.RayError as error:
        traceback.clear_frames(error.__traceback__)  # they have the references
        log.info("a worker cannot be used again: %s", error)
        return False
    return True


def why_ended(serving: Any) -> str:
    """What Ray knows, or soon learns, of the end of the actor that makes this call."""
    if not ray.is_initialized():
        return "Ray has ended too"
    try:
        ray.get(serving, timeout=CAUSE_WAIT_S)
    except ray.exceptions.RayError as error:
        traceback.clear_frames(error.__traceback__)  # those of ray.get are garbage that has the reference
        return str(error)
    return "it left by itself"


def last_words(pid: int) -> str:
    """What a worker of our own Ray wrote last to its standard error, "" for nothing."""
    folder = own_folder()
    if folder is None:
        return ""
    for path in folder.glob(f"ray/session_latest/logs/worker-*-{pid}.err"):
        return path.read_bytes()[-LAST_BYTES:].decode(errors="replace")
    return ""


def _python_path(config: PoolConfig, environment: HostEnvironment) -> str:
    path = own_ray.search_path(environment.comfy_root)
    if not config.local:  # what other machines have there is theirs
        path = [*path[:2], "${PYTHONPATH}"]
    return os.pathsep.join(path)
