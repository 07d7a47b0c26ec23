"""A real ComfyUI in a process of its own."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from . import processes
from .api import ApiClient

if TYPE_CHECKING:
    from .client import ComfyClient

log = logging.getLogger("raylight.host")

ROOT = Path(__file__).resolve().parents[2]
PACK_FOLDER = "ray.light-pack"
"""A dot and a hyphen, so that nothing can depend on the folder's name."""
TEST_PACKS = {
    "raylight-test-nodes": "nodes",
    "raylight-test-routes": "routes",
    "raylight-test-reaching": "reaching",
}
"""By name in `custom_nodes`: folders beside this file."""
FOLDERS = ("models/diffusion_models", "models/checkpoints", "models/loras", "models/vae", "input", "output", "user")


class ServerError(RuntimeError):
    """ComfyUI did not start, ended, or left processes behind; the message has the end of its log."""


class ComfyServer:
    """Starts ComfyUI with this pack in `custom_nodes`; use as a context manager or with `start` and `stop`.

    Args:
        comfy: root of the ComfyUI to start.
        base: base directory (models, input, output, custom_nodes, log); made if absent, kept afterwards.
        python: interpreter, by default the running one.
        pack: whether this pack is installed.
        folder: name of its folder. The page finds no help for one that has a dot in it.
        test_nodes: whether the packs of TEST_PACKS are installed.
        threads: OMP_NUM_THREADS of the process, and of what it starts.
        args: more command-line arguments.
        env: more environment variables.
        timeout: seconds until it must answer.
    """

    def __init__(
        self,
        comfy: Path,
        *,
        base: Path,
        python: Path | None = None,
        pack: bool = True,
        folder: str = PACK_FOLDER,
        test_nodes: bool = True,
        threads: int | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
    ) -> None:
        self.comfy = comfy.resolve()
        self.base = base.resolve()
        self.python = python or Path(sys.executable)
        self.timeout = timeout
        self.args = tuple(args)
        self.port = 0
        # a cache of its own: what workers keep there would have one test depend on another run's
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(base / "cache"), **(env or {})}
        if threads is not None:
            self._env["OMP_NUM_THREADS"] = self._env["MKL_NUM_THREADS"] = str(threads)
        self._packs = {name: Path(__file__).with_name(each) for name, each in TEST_PACKS.items()} if test_nodes else {}
        if pack:
            self._packs[folder] = ROOT
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of ComfyUI."""
        assert self._process is not None, "the server is not started"
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def models(self) -> Path:
        """Folder of diffusion models."""
        return self.base / "models" / "diffusion_models"

    @property
    def output(self) -> Path:
        """Folder that nodes write to."""
        return self.base / "output"

    def log(self) -> str:
        """Everything ComfyUI has printed so far."""
        path = self.base / "comfyui.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    @property
    def api(self) -> ApiClient:
        """A client without a connection of its own, which sees no events."""
        return ApiClient(self.url, alive=self.check)

    def client(self) -> ComfyClient:
        """A client connected to this server; close it, or use it as a context manager."""
        from .client import ComfyClient  # needs websocket-client

        return ComfyClient(self.url, alive=self.check)

    def check(self) -> None:
        """Raise ServerError if the process has ended."""
        if not self.running:
            code = self._process.returncode if self._process is not None else None
            raise ServerError(f"ComfyUI has ended (exit code {code}). The end of its log:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """The end of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    def start(self) -> ComfyServer:
        """Start ComfyUI and wait until it answers."""
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        self._install_packs()
        self.port = free_port()
        command = [str(self.python), "main.py", "--cpu", "--disable-api-nodes", "--disable-auto-launch"]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.base)]
        # The default database lies in ComfyUI's own folder, which two servers would share
        command += ["--database-url", "sqlite:///:memory:", *self.args]
        self._log = (self.base / "comfyui.log").open("wb")
        self._process = subprocess.Popen(
            command,
            cwd=self.comfy,
            env=self._env,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # a job in the background inherits "ignore", and then Ctrl-C, which `stop` sends, would do nothing
            preexec_fn=_obey_interrupts if os.name == "posix" else None,  # noqa: PLW1509
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def restart(self) -> None:
        """Have the program replace itself, and wait until the new one answers; test nodes are needed."""
        route = f"{self.url}/raylight-test"
        before = self._told(f"{route}/started")
        urllib.request.urlopen(urllib.request.Request(f"{route}/restart", b"{}"), timeout=30).close()
        end = time.monotonic() + self.timeout
        while self._told(f"{route}/started") in (before, b""):
            self.check()
            if time.monotonic() > end:
                raise ServerError(f"ComfyUI did not restart. The end of its log:\n{self.tail()}")
            time.sleep(0.1)

    def stop(self, *, grace: float = 15.0) -> list[str]:
        """End ComfyUI and everything it started.

        It is asked first, as Ctrl-C asks; what is left after `grace` seconds is killed.

        Returns:
            The command lines of the processes that had to be killed: empty after a clean end.

        Raises:
            ServerError: something could not be killed.
        """
        if self._process is None:
            return []
        members = processes.tree(self._process.pid)
        if self.running:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                log.warning("ComfyUI did not end within %.0f s", grace)
        late = processes.gone(members, wait=grace / 3)
        killed = [process.command for process in late]
        stuck = processes.kill(late)
        if self.running:
            self._process.kill()
        self._process.wait(10)
        self._process = None
        if self._log is not None:
            self._log.close()
        if stuck:
            raise ServerError(f"Processes of ComfyUI cannot be ended: {[process.command for process in stuck]}")
        return killed

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _install_packs(self) -> None:
        folder = self.base / "custom_nodes"
        folder.mkdir(exist_ok=True)
        for name, source in self._packs.items():
            target = folder / name
            if target.is_symlink() or target.exists():
                continue
            try:
                target.symlink_to(source, target_is_directory=True)
            except OSError:
                ignored = shutil.ignore_patterns(".git", ".host", "__pycache__", ".*_cache")
                shutil.copytree(source, target, ignore=ignored)

    def _told(self, url: str) -> bytes:
        """What is there, nothing while nobody answers."""
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return bytes(response.read())
        except OSError:
            return b""

    def _wait(self) -> None:
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            self.check()
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise ServerError(f"ComfyUI does not answer after {self.timeout:.0f} s. The end of its log:\n{self.tail()}")


def _obey_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
