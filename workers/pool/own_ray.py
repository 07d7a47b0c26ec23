"""A Ray of our own: asks for one in a process that ends with ours (ray_keeper.py)."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import psutil

from ...raylight.config import PoolConfig
from ...raylight.errors import WorkerError
from . import private_folder
from .private_folder import PrivateFolder
from .ray_keeper import END_S, NAME, Answer, Order

log = logging.getLogger(__name__)

IMPORT_ROOT = Path(__file__).resolve().parents[1] / "import_root"
STORE_BYTES = 256 << 20
"""Ray's store: payloads do not go through it, so the smallest comfortable size."""
SHARED_MEMORY = Path("/dev/shm")
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    # otherwise Ray's services listen on every interface
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # leaving a Ray whose control service is gone would take 5 s more
    "RAY_task_events_shutdown_flush_timeout_ms": "100",
    # Ray's monitor would kill workers wherever the host's memory is 95 percent full, which ComfyUI's caches and pinned
    # memory may well make it. The system's own killer comes when memory is out, and to Ray's workers first
    "RAY_memory_monitor_refresh_ms": "0",
}
DEFAULTS = {
    # workers compute what ComfyUI would compute, so with its priority: behind Ray's 15 any other program would go first
    "RAY_worker_niceness": "0",
}
"""Settings that a user's own come before."""
TOKEN = "RAY_AUTH_TOKEN"
NOT_OURS = ("RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_REDIS_ADDRESS")
"""Variables of a user's own cluster."""
COMMAND = "from comfy_raylight.workers.pool.ray_keeper import main; main()"
START_S = 120.0
POLL_S = 0.1


@dataclass(frozen=True)
class OwnRay:
    """A running one.

    Attributes:
        address: of its control service.
        token: whoever has it can run code as this user. It is in the environment of Ray's processes, and where there is
            a dashboard, which asks for it, in the folder.
        folder: where everything of it is.
        processes: number of each of its processes that it cannot be without, by name.
        keeper: the process that ends them.
    """

    address: str
    token: str
    folder: PrivateFolder
    processes: dict[str, int]
    keeper: subprocess.Popen[bytes]

    def end(self) -> None:
        """End everything of it, and delete its folder."""
        _end(self.keeper, self.folder)


def start(config: PoolConfig, interrupted: Callable[[], bool]) -> OwnRay:
    """Start one, with a folder and a token of its own.

    Raises:
        ConfigError: there is no place for its folder.
        WorkerError: it did not start, or the user cancelled.
    """
    _wait_for_former()
    folder, token = private_folder.make(), secrets.token_hex(32)
    order = Order(
        owner=os.getpid(),
        lock=folder.lock,
        store_bytes=int(config.object_store_gb * (1 << 30)) or STORE_BYTES,
        store_folder="" if os.access(SHARED_MEMORY, os.W_OK) else str(folder.path),
        dashboard=config.dashboard,
    )
    variables = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    with (folder.path / "keeper.log").open("wb") as log_file:
        keeper = subprocess.Popen(
            # -c puts the current folder first on the search path: it is the private one
            [sys.executable, "-c", COMMAND, order.packed()],
            cwd=folder.path,
            env={**DEFAULTS, **variables, **SETTINGS, TOKEN: token, "PYTHONPATH": os.pathsep.join(search_path())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            pass_fds=(folder.lock,),
            start_new_session=True,  # Ctrl-C is ComfyUI's to obey
        )
    try:
        answer = _answer(keeper, interrupted)
        if answer.error:
            raise WorkerError("Ray did not start", answer.error, "See what it says of folders, memory or ports")
    except BaseException:
        _end(keeper, folder)
        raise
    if config.dashboard:
        (folder.path / "token").write_text(token)
        log.info("Ray's dashboard at %s asks for the token in %s", config.dashboard, folder.path / "token")
    return OwnRay(answer.address, token, folder, answer.processes or {}, keeper)


def search_path(*more: str) -> Sequence[str]:
    """Where processes of a pool find this pack, then `more`, then what the user set for all of Python.

    An empty entry of PYTHONPATH stands for the current folder, which is nobody's intention.
    """
    users = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [str(IMPORT_ROOT), *more, *users]


def _wait_for_former() -> None:
    """A program that replaced itself (execv) has the keeper of the former one as a child, which has ended by itself."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # another child has gone meanwhile
            if child.name() == NAME and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, 0)


def _answer(keeper: subprocess.Popen[bytes], interrupted: Callable[[], bool]) -> Answer:
    assert keeper.stdout is not None
    deadline, line = time.monotonic() + START_S, b""
    while not line.endswith(b"\n"):
        if interrupted():
            raise WorkerError("Cancelled while Ray should start")
        if time.monotonic() > deadline:
            raise WorkerError(f"Ray did not start within {START_S:.0f} s", "", "Check the load of the machine")
        if wait([keeper.stdout.fileno()], POLL_S):
            found = os.read(keeper.stdout.fileno(), 1 << 16)
            if not found:
                raise WorkerError(
                    "Ray did not start",
                    f"the process that starts it ended with code {keeper.wait()}",
                    "Queue the prompt again",
                )
            line += found
    return Answer.unpacked(line)


def _end(keeper: subprocess.Popen[bytes], folder: PrivateFolder) -> None:
    assert keeper.stdin is not None and keeper.stdout is not None
    keeper.stdin.close()
    try:
        keeper.wait(END_S + 5.0)
    except subprocess.TimeoutExpired:
        log.error("processes of Ray do not end: %s", keeper.pid)
        keeper.send_signal(signal.SIGKILL)
        keeper.wait()
    keeper.stdout.close()
    folder.remove()
