"""The Ray that pools live in: one of our own is started, or a cluster is joined, and left again."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig

from ...raylight.config import PoolConfig
from ...raylight.errors import ConfigError, WorkerError
from . import own_ray
from .ray_private import private
from .ray_watch import RayWatch, knock

SIGACTION_BYTES = 256
"""More than the structure has anywhere."""
PING_S = 0.5
CONTROL_S = 20.0
"""How long Ray's control service may take to answer."""
AGAIN = "Queue the prompt again"
MODE = "RAY_AUTH_MODE"
EXPECTED = "SIGTERM handler is not set"


def ensure_ray(config: PoolConfig, lost: Callable[[str], None], interrupted: Callable[[], bool]) -> None:
    """Connect to the cluster the config names, else reuse this process's, else start a local one.

    Args:
        lost: called from a thread of its own when a process of Ray ends by itself, or the cluster answers no more,
            with the process's name; it is to end what uses Ray, and then `stop_ray`.

    Raises:
        ConfigError: the named cluster cannot be reached, another one is connected already, or there is no place for the
            files of a local one.
        WorkerError: a local one did not start, or the user cancelled.
    """
    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if not config.local and config.address not in ("auto", connected):
            raise ConfigError(
                f"This ComfyUI is already connected to the Ray cluster at {connected}",
                f"ray_cluster_address asks for {config.address}",
                "Use one address in all workflows, or restart ComfyUI",
            )
        return
    atexit.register(stop_ray)
    if not config.local:
        _check_reachable(config.address)
        with _environment_kept():
            _choose_authentication(config.address)
            try:
                _connect(config.address, namespace=config.namespace)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _unreachable(config.address, error) from error
        RayWatch(lost, address=ray.get_runtime_context().gcs_address).start()
        return
    own = own_ray.start(config, interrupted)
    try:
        with _environment_kept(), _loopback_only(), _expected_messages_hidden():
            for name in own_ray.NOT_OURS:
                os.environ.pop(name, None)
            os.environ.update(own_ray.SETTINGS | {own_ray.TOKEN: own.token})
            _read_authentication()
            _connect(own.address)
        RayWatch(lost, own=own).start()
    except BaseException as error:
        ray.shutdown()
        own.end()
        if isinstance(error, (OSError, RuntimeError, ValueError)):
            raise WorkerError("Ray ended as it started", str(error), AGAIN) from error
        raise


def own_folder() -> Path | None:
    """The private folder of the local Ray that is connected."""
    own = RayWatch.own_at_hand()
    return own.folder.path if own else None


def wait_for_control(interrupted: Callable[[], bool]) -> None:
    """Wait until Ray's control service answers: what Ray itself asks of it waits for ever, and sees no Cancel.

    Raises:
        WorkerError: it does not answer in time, and is ended where it is our own; or the user cancelled.
    """
    client = private("ray._private.worker.global_worker", use="asks its control service").gcs_client
    deadline = time.monotonic() + CONTROL_S
    while True:
        RayWatch.wake()
        try:
            client.internal_kv_get(b"raylight", timeout=PING_S)
            return
        except ray.exceptions.RayError as error:
            why = str(error)
        if interrupted():
            raise WorkerError("Cancelled while Ray's control service should answer")
        if time.monotonic() > deadline:
            RayWatch.end()
            raise WorkerError(f"Ray's control service has not answered for {CONTROL_S:.0f} s", why, AGAIN)


def ray_ended(*, ask: bool = False) -> str:
    """The name of a process of Ray that has ended by itself, "" for none; see RayWatch.ended."""
    return RayWatch.ended(ask=ask)


def stop_ray() -> None:
    """Disconnect from Ray; one of our own ends with it, one that was joined stays as it is.

    No reference to an object of Ray may be dropped meanwhile: Ray then ends the process. Its own errors are garbage
    with such references in them, which would be collected at any time.
    """
    RayWatch.wake()  # leaving waits for them
    own = RayWatch.own_at_hand()
    RayWatch.stop()
    with _no_collection():
        if ray.is_initialized():  # or it is only one of those that were left before
            gc.collect()
        ray.shutdown()
    if own is not None:
        own.end()


def host_address() -> str:
    """The address under which other hosts of the cluster reach this one."""
    return ray.util.get_node_ip_address()


def node_id() -> str:
    """The Ray node this process is on."""
    return ray.get_runtime_context().get_node_id()


def _check_reachable(address: str) -> None:
    """Knock first: Ray itself retries for a minute and then may end the process, ComfyUI."""
    if address == "auto":
        return
    try:
        knock(address.removeprefix("ray://"))
    except (OSError, ValueError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"No Ray cluster answers at {address}",
        str(error),
        "Start it with `ray start --head`, or set ray_cluster_address to local",
    )


def _connect(address: str, **options: Any) -> None:
    with _sigterm_kept():
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            # of another kind of job Ray puts this process's current folder on the workers' search path
            job_config=JobConfig(_client_job=True),
            **options,
        )


def _read_authentication() -> None:
    """Ray keeps the mode and the token that it has read; those of another cluster may have been before."""
    private("ray._raylet.Config", use="chooses how to join a cluster").initialize("")
    private("ray._raylet.AuthenticationTokenLoader", use="chooses how to join a cluster").instance().reset_cache()


def _choose_authentication(address: str) -> None:
    """Send Ray's token where the cluster wants it, and only there: otherwise the connection, or the first actor, fails.

    Ray itself uses the token it finds for clusters that it finds or starts, but never for an address. It reads the
    variable of its mode again when it is told to.

    Raises:
        ConfigError: the cluster wants a token, and this user has none or another one.
    """
    _read_authentication()
    if MODE in os.environ or ":" not in address or "//" in address:
        return
    connect = private("ray._raylet.GcsClient", use="chooses how to join a cluster")
    for mode in ("disabled", "token"):
        os.environ[MODE] = mode
        _read_authentication()
        try:
            connect(address=address)
        except ray.exceptions.AuthenticationError as error:
            if mode == "token":
                raise ConfigError(
                    f"The Ray cluster at {address} does not accept this machine's token",
                    str(error).splitlines()[0],
                    "Copy ~/.ray/auth_token from the machine that started the cluster",
                ) from error
        except ray.exceptions.RayError as error:
            raise _unreachable(address, error) from error
        else:
            return


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile by itself, in any thread."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """ray.init writes variables into this process; the driver's environment is ComfyUI's, not ours."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """What ComfyUI does at SIGTERM is ComfyUI's: Ray's own handler, below Python's, would abort the process."""
    action = ctypes.CDLL(None).sigaction
    before = ctypes.create_string_buffer(SIGACTION_BYTES)
    action(signal.SIGTERM, None, before)
    try:
        yield
    finally:
        action(signal.SIGTERM, before, None)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A local Ray otherwise listens on every interface.

    The public switch (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0) is read when ray is imported, which may have
    happened before us.
    """
    before = private("ray._private.ray_constants.ENABLE_RAY_CLUSTER", use="keeps a local Ray from the network")
    constants: Any = sys.modules["ray._private.ray_constants"]
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _expected_messages_hidden() -> Iterator[None]:
    """A notice of Ray that says nothing to a ComfyUI user."""

    def unexpected(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(EXPECTED)

    logger = logging.getLogger("ray._private.worker")
    logger.addFilter(unexpected)
    try:
        yield
    finally:
        logger.removeFilter(unexpected)
