"""ComfyUI beside others: its end, a second one on the same machine, and a Ray cluster that is there already."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfy_raylight.tests.host import processes
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.faults import Stage
from comfy_raylight.tests.host.prompts import INIT, LOADER
from comfy_raylight.tests.host.server import ComfyServer, _free_port

from .conftest import SLOW

GONE_S = 10.0


@pytest.fixture
def other(comfy_root: Path, tmp_path: Path) -> Iterator[ComfyServer]:
    """A ComfyUI of a test's own."""
    server = ComfyServer(comfy_root, base=tmp_path, threads=1)
    server.models.mkdir(parents=True, exist_ok=True)
    job = Job(family="wan", path=server.models / "wan.safetensors")
    write([job], comfy_root=comfy_root, python=Path(sys.executable))
    with server:
        yield server


@pytest.mark.parametrize("how", [pytest.param(signal.SIGTERM, marks=SLOW), signal.SIGKILL], ids=lambda how: how.name)
def test_nothing_outlives_comfyui(other: ComfyServer, how: signal.Signals) -> None:
    with other.client() as client:
        stage = Stage(other, client)
        stage.good()
        assert len(stage.workers()) == 2
    members = processes.tree(other.pid)
    os.kill(other.pid, how)
    assert [process.command for process in processes.gone(members, wait=GONE_S)] == []


@SLOW
def test_two_comfyuis_at_once(other: ComfyServer, server: ComfyServer, client: ComfyClient) -> None:
    """Pools of two processes share no name, port or file."""
    with other.client() as second:
        stages = [Stage(server, client), Stage(other, second)]
        wanted = stages[0].good()
        found: list[bytes] = []

        def run(stage: Stage) -> None:
            found.extend(stage.good() for _ in range(3))

        threads = [threading.Thread(target=run, args=(stage,)) for stage in stages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(180)
    assert found == [wanted] * 6


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """A Ray head node of our own; its address, or an error where it does not run any more."""
    ray, port = str(Path(sys.executable).with_name("ray")), _free_port()
    folder = Path("/tmp") / f"rc{os.getpid()}"  # short: a socket path may have 107 bytes
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--block"]
    head = subprocess.Popen(
        [*command, f"--temp-dir={folder}", "--object-store-memory=100000000"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    members: list[processes.Process] = []

    def address() -> str:
        assert head.poll() is None, "the cluster has ended"
        members[:] = processes.tree(head.pid)
        return f"127.0.0.1:{port}"

    time.sleep(8)
    address()
    yield address
    head.terminate()
    processes.kill(members)
    subprocess.run(["rm", "-rf", str(folder)], check=False)


@SLOW
def test_a_cluster_is_joined_and_left_as_it_was(other: ComfyServer, cluster: Callable[[], str]) -> None:
    with other.client() as client:
        stage = Stage(other, client)
        wanted = stage.good()
        ended = stage.prompt()
        kill = {"class_type": "RayKill", "inputs": {"ray_actors": [LOADER, 0], "kill_mode": "Kill Entire Cluster"}}
        client.run({**{name: ended[name] for name in (INIT, LOADER)}, "kill": kill})
        prompt = stage.prompt()
        prompt[INIT]["inputs"].update(ray_cluster_address=cluster(), ray_cluster_namespace="raylight-test")
        before = {process.pid for process in processes.tree(os.getpid())}
        client.run(prompt, timeout=180)
        assert (other.output / f"run{stage._count}.safetensors").read_bytes() == wanted
        kill_there = {name: prompt[name] for name in (INIT, LOADER)}
        client.run({**kill_there, "kill": kill})
        cluster()
        assert {process.pid for process in processes.tree(os.getpid())} >= {pid for pid in before if _alive(pid)}


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
