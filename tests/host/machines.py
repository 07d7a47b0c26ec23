"""A Ray cluster of two machines that are one: the second is namespaces of this one, with a network of its own.

Its processes see neither this machine's processes nor its shared memory, and files may be others there. Linux only,
and as root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import processes

START_S = 60.0
STORE_BYTES = 100_000_000


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        address: of its head, for `ray_cluster_address`.
        first: network address of this machine there.
        head: process id of the head.
        second: network address of the other one, "" for none.
        outside: process id of the other machine's first process, seen from here.
    """

    address: str
    first: str
    head: int
    second: str = ""
    outside: int = 0

    def workers(self) -> list[processes.Process]:
        """The workers on the other machine."""
        return processes.workers(self.outside)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """What this machine's workers send to the other one's is dropped until the end of the block, Ray's is not."""
        (worker,) = processes.workers(self.head)
        lines = [
            (found.laddr.port, found.raddr.port)
            for found in psutil.Process(worker.pid).net_connections("tcp")
            if found.raddr and found.raddr.ip.removeprefix("::ffff:") == self.second
        ]
        assert lines, "the workers have connections to each other"
        rules = [
            [*("from", self.first, "to", self.second, "ipproto", "tcp"), *("sport", str(here), "dport", str(there))]
            for here, there in lines
        ]
        for rule in rules:
            subprocess.run(["ip", "rule", "add", "pref", "99", *rule, "blackhole"], check=True)
        try:
            yield
        finally:
            for rule in rules:
                subprocess.run(["ip", "rule", "del", "pref", "99", *rule, "blackhole"], check=True)

    @contextlib.contextmanager
    def seeing(self, path: Path, instead: Path) -> Iterator[None]:
        """The other machine has something else at a path until the end of the block."""
        namespace = processes.tree(self.outside)[1].pid
        there = ["nsenter", f"--target={namespace}", "--mount", "--pid"]
        subprocess.run([*there, "mount", "--bind", str(instead), str(path)], check=True)
        try:
            yield
        finally:
            subprocess.run([*there, "umount", str(path)], check=True)


def possible() -> bool:
    """Whether this process may make such a machine."""
    if os.name != "posix" or os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"rlp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    try:
        inside = ["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--mount", "--mount-proc", "true"]
        return made and subprocess.run(inside, capture_output=True, check=False).returncode == 0
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def home_with_token(folder: Path) -> Path:
    """A user's home folder with nothing in it but a token for Ray clusters, where Ray looks for it."""
    token = folder / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    return folder


@contextlib.contextmanager
def cluster(home: Path, *, port: int, cores: int = 2, others: int = 0) -> Iterator[Cluster]:
    """A head node on this machine, and a node on another one where that has cores.

    Args:
        home: the folder of a user who has a token of the cluster, made by `home_with_token`.
        port: of the head.
        cores: that Ray counts on this machine.
        others: and on the other one.
    """
    # short: a socket path may have 107 bytes
    with (
        tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as stack,
    ):
        inside, first, second = stack.enter_context(network()) if others else ([], "127.0.0.1", "")
        address = f"{first}:{port}"
        head = [*_start(first, cores), "--head", f"--port={port}", "--include-dashboard=false"]
        pid = stack.enter_context(_running([*head, f"--temp-dir={folder}"], Path(folder, "head.log"), home))
        outside = 0
        if others:
            script = 'mount -t tmpfs none /dev/shm && exec "$@"'
            alone = [
                "unshare",
                "--pid",
                "--fork",
                "--mount",
                "--mount-proc",
                "--kill-child",
                "sh",
                "-c",
                script,
                "-",
            ]
            node = [*_start(second, others), f"--address={address}"]
            outside = stack.enter_context(_running([*inside, *alone, *node], Path(folder, "node.log"), home))
        yield Cluster(address, first, pid, second, outside)


def _start(address: str, cores: int) -> list[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    counted = [f"--node-ip-address={address}", f"--num-cpus={cores}", f"--object-store-memory={STORE_BYTES}"]
    return [ray, "start", *counted, "--block"]


@contextlib.contextmanager
def _running(command: list[str], log: Path, home: Path) -> Iterator[int]:
    """Run a node until the end of the block; the process id of its command."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**variables, "RAY_AUTH_MODE": "token", "HOME": str(home)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    members: list[processes.Process] = []
    try:
        end = time.monotonic() + START_S
        while b"runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"a node of the cluster did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield process.pid
    finally:
        members += processes.tree(process.pid)
        process.terminate()
        processes.kill(members)
        process.wait(10)


@contextlib.contextmanager
def network() -> Iterator[tuple[list[str], str, str]]:
    """A network of two: a prefix for commands on the other machine, and both addresses."""
    name, net = f"rl{os.getpid()}", f"10.{os.getpid() % 200 + 20}.77"
    here, there = f"{net}.1", f"{net}.2"
    inside = ["ip", "netns", "exec", name]
    try:
        for command in (
            ["ip", "netns", "add", name],
            ["ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b"],
            ["ip", "link", "set", f"{name}b", "netns", name],
            ["ip", "addr", "add", f"{here}/30", "dev", f"{name}a"],
            ["ip", "link", "set", f"{name}a", "up"],
            [*inside, "ip", "addr", "add", f"{there}/30", "dev", f"{name}b"],
            [*inside, "ip", "link", "set", f"{name}b", "up"],
            [*inside, "ip", "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        yield inside, here, there
    finally:
        for command in (["ip", "netns", "del", name], ["ip", "link", "del", f"{name}a"]):
            subprocess.run(command, check=False, capture_output=True)
