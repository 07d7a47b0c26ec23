"""ComfyUI beside others: its end, a second one on the same machine, and a Ray cluster that is there already."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host import machines, processes
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.faults import Stage, zombies
from comfy_raylight.tests.host.prompts import INIT, LOADER
from comfy_raylight.tests.host.server import ComfyServer, free_port

GONE_S = 15.0


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return machines.home_with_token(tmp_path_factory.mktemp("home"))


@pytest.fixture
def other(home: Path, comfy_root: Path, tmp_path: Path) -> Iterator[ComfyServer]:
    """A ComfyUI of a test's own."""
    server = ComfyServer(comfy_root, base=tmp_path, threads=1, env={"HOME": str(home)})
    server.models.mkdir(parents=True, exist_ok=True)
    job = Job(family="wan", path=server.models / "wan.safetensors")
    write([job], comfy_root=comfy_root, python=Path(sys.executable))
    with server:
        yield server


HOW = [pytest.param(signal.SIGTERM, marks=SLOW), pytest.param(signal.SIGINT, marks=SLOW), signal.SIGKILL]


@pytest.mark.parametrize("how", HOW, ids=lambda how: how.name)
def test_nothing_outlives_comfyui(other: ComfyServer, how: signal.Signals) -> None:
    """No process, and nothing of the private folder."""
    with other.client() as client:
        stage = Stage(other, client)
        stage.good()
        assert len(stage.workers()) == 2
    folder = folder_of(other.pid)
    members = processes.tree(other.pid)
    os.kill(other.pid, how)
    assert [process.command for process in processes.gone(members, wait=GONE_S)] == []
    assert not folder.exists()


@SLOW
@pytest.mark.timeout(900)
def test_a_program_that_replaces_itself(other: ComfyServer) -> None:
    """ComfyUI-Manager restarts ComfyUI so, between two prompts and within one: the process keeps its number."""
    wanted = b""
    for sampling in (False, True):
        with other.client() as client:
            stage = Stage(other, client)
            wanted = wanted or stage.good()
            if sampling:
                stage.sampling(client.queue(stage.prompt(steps=4000)))
            before, folder = processes.tree(other.pid)[1:], folder_of(other.pid)
            other.restart()
        assert [process.command for process in processes.gone(before, wait=GONE_S)] == []
        assert not folder.exists()
        with other.client() as client:
            stage = Stage(other, client)
            assert stage.good() == wanted
            assert len(stage.workers()) == 2 and zombies(other.pid) == []


def folder_of(pid: int) -> Path:
    """The private folder of a ComfyUI's Ray: where its processes are."""
    (raylet,) = [child for child in psutil.Process(pid).children(recursive=True) if child.name() == "raylet"]
    return Path(raylet.cwd())


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


@SLOW
def test_a_cluster_is_joined_and_left_as_it_was(home: Path, other: ComfyServer) -> None:
    with other.client() as client, machines.cluster(home, port=free_port()) as cluster:
        wanted = Stage(other, client).good()
        own = Stage(other, client, cluster="local").prompt()
        kill = {"class_type": "RayKill", "inputs": {"ray_actors": [LOADER, 0], "kill_mode": "Kill Entire Cluster"}}
        client.run({**{name: own[name] for name in (INIT, LOADER)}, "kill": kill})
        before = processes.tree(cluster.head)
        stage = Stage(other, client, cluster=cluster.address)
        assert stage.good() == wanted
        joined = stage.prompt()
        client.run({**{name: joined[name] for name in (INIT, LOADER)}, "kill": kill})
        assert all(process.alive for process in before), "it is the cluster of others"
        assert not processes.gone(processes.workers(cluster.head), wait=GONE_S)
