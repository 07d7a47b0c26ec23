"""The process that runs a Ray of our own, and ends all of it when the process that asked for it is gone.

Everything of that Ray descends from this process, workers included, and what loses its parent becomes a child of
this one: what belongs to a pool is what was started for it, whatever it is called. Runs in the private folder, which
goes last.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

import psutil

WATCHED = ("gcs_server", "raylet")
"""Without these there is no Ray."""
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
NAME = "raylight-keeper"
"""Of the process, for who looks at a list of them; Linux allows 15 characters."""
SET_NAME, SET_CHILD_SUBREAPER = 15, 36
"""Of Linux's prctl."""
END_S = 15.0
WORDS = 400
"""Characters of a process of Ray's that a user is shown."""


@dataclass(frozen=True)
class Order:
    """What is wanted; crosses the command line, which everybody can read.

    Attributes:
        owner: process to end with.
        lock: descriptor that locks the current folder.
        store_bytes: size of Ray's object store.
        store_folder: where that is, "" for Ray's choice.
        dashboard: "host:port", "" for none.
    """

    owner: int
    lock: int
    store_bytes: int
    store_folder: str
    dashboard: str

    def packed(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        address: of Ray's control service, "" where Ray did not start.
        processes: number of each process of WATCHED, by name.
        error: why Ray did not start.
    """

    address: str = ""
    processes: dict[str, int] | None = None
    error: str = ""

    def packed(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def unpacked(cls, line: bytes) -> Answer:
        return cls(**json.loads(line))


def main() -> None:
    """Start Ray, answer on the standard output, and stay until the standard input ends."""
    order = Order(**json.loads(sys.argv[1]))
    os.set_inheritable(order.lock, False)
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever Ray prints is no answer
    _adopt_orphans()
    threading.Thread(target=_watch, args=(order.owner, _told_to_end()), daemon=True).start()
    try:
        answer = _start(order)
    except Exception as error:
        answer = Answer(error=" ".join([f"{type(error).__name__}: {error}", *_first_words()]))
    os.write(answers, answer.packed())
    while True:
        try:
            os.wait()  # orphans come here to be waited for
        except ChildProcessError:
            time.sleep(1)


def _start(order: Order) -> Answer:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    host, _, port = order.dashboard.rpartition(":")
    node = Node(
        RayParams(
            node_ip_address="127.0.0.1",
            num_cpus=0,
            num_gpus=0,
            object_store_memory=order.store_bytes,
            plasma_directory=order.store_folder or None,
            include_dashboard=bool(order.dashboard),
            dashboard_host=host or "127.0.0.1",
            dashboard_port=int(port) if port else None,  # type: ignore[arg-type]
            temp_dir=str(Path.cwd() / "ray"),
        ),
        head=True,
        shutdown_at_exit=False,
        spawn_reaper=True,
        ray_init_cluster=True,
    )
    return Answer(node.gcs_address, {name: node.all_processes[name][0].process.pid for name in WATCHED})


def _first_words() -> Sequence[str]:
    """The first line that each process of Ray wrote as it failed."""
    logs = [path.read_text(errors="replace") for path in Path("ray/session_latest/logs").glob("*.err")]
    return [log.strip().partition("\n")[0][:WORDS] for log in logs if log.strip()]


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        control = ctypes.CDLL(None).prctl
        control(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        control(SET_NAME, NAME.encode(), 0, 0, 0)


def _told_to_end() -> int:
    """A descriptor that can be read when a signal has come: Python's handlers wait for what the main thread does."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for name in SIGNALS:
        signal.signal(getattr(signal, name), lambda *_: None)
    return told


def _watch(owner: int, told: int) -> None:
    ends = [0, told]
    try:
        if hasattr(os, "pidfd_open"):  # a child of the owner's may still hold the other end of our input
            ends.append(os.pidfd_open(owner))
        wait(ends)
    except ProcessLookupError:
        pass
    _end()


def _end() -> None:
    """End everything below this process, then the folder, then this process."""
    me, deadline = psutil.Process(), time.monotonic() + END_S
    while time.monotonic() < deadline:
        below = [each for each in me.children(recursive=True) if _running(each)]
        if not below:
            break
        for each in below:
            with contextlib.suppress(psutil.Error):
                each.kill()
        time.sleep(0.02)
    shutil.rmtree(Path.cwd(), ignore_errors=True)
    os._exit(0)


def _running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
