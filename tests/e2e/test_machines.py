"""A pool over a Ray cluster of two machines, the second one in namespaces of its own."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.decode.files import write as write_vae
from comfy_raylight.tests.e2e import test_vae as vae
from comfy_raylight.tests.e2e.test_sampling import FP32
from comfy_raylight.tests.e2e.test_weights import apart
from comfy_raylight.tests.host import machines, processes
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.faults import Stage
from comfy_raylight.tests.host.prompts import INIT, LOADER
from comfy_raylight.tests.host.server import ComfyServer, free_port

pytestmark = pytest.mark.skipif(not machines.possible(), reason="needs namespaces: Linux, and root")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return machines.home_with_token(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def there(home: Path, comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI of this module's own: Ray stays connected to a cluster as long as the process lives."""
    server = ComfyServer(comfy_root, base=tmp_path_factory.mktemp("machines"), threads=1, env={"HOME": str(home)})
    server.models.mkdir(parents=True, exist_ok=True)
    job = Job(family="wan", path=server.models / "wan.safetensors")
    write([job], comfy_root=comfy_root, python=Path(sys.executable))
    write_vae(server.base / "models" / "vae", comfy_root=comfy_root)
    with server:
        yield server


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[machines.Cluster]:
    """Room for one worker on each machine."""
    with machines.cluster(home, port=free_port(), cores=1, others=1) as found:
        yield found


@pytest.fixture(scope="module")
def stage(there: ComfyServer, cluster: machines.Cluster) -> Iterator[Stage]:
    with there.client() as client:
        yield Stage(there, client, cluster=cluster.address)


@pytest.fixture(scope="module")
def wanted(server: ComfyServer, client: ComfyClient) -> bytes:
    """What two workers on one machine make."""
    return Stage(server, client).good()


def near(found: bytes, wanted: bytes) -> bool:
    """Whether two latents are equal but for rounding: a worker alone on a machine has more threads."""
    made, expected = (safetensors.torch.load(content)["samples"] for content in (found, wanted))
    return apart(made, expected) <= FP32


def local_workers(cluster: machines.Cluster) -> list[processes.Process]:
    return processes.workers(cluster.head)


def test_workers_of_two_machines_make_the_same_picture(stage: Stage, cluster: machines.Cluster, wanted: bytes) -> None:
    assert near(stage.good(), wanted)
    assert len(cluster.workers()) == len(local_workers(cluster)) == 1


@SLOW
@pytest.mark.parametrize("mode", ["seamless", "tiles"])
def test_they_decode(stage: Stage, cluster: machines.Cluster, mode: str) -> None:
    """What the other machine decodes comes back in the message: it cannot write to this one's memory."""
    stage.client.run(vae.stock(vae.WAN, tiled=mode == "tiles"))
    prompt = vae.ray(vae.WAN, mode=mode)
    prompt[INIT]["inputs"]["ray_cluster_address"] = cluster.address
    stage.client.run(prompt)
    found, expected = (vae.pixels(stage.server, name) for name in ("ray", "stock"))
    assert (found - expected).abs().max() <= vae.CLOSE


@SLOW
def test_a_worker_of_the_other_machine_dies(stage: Stage, cluster: machines.Cluster, wanted: bytes) -> None:
    prompt_id = stage.client.queue(stage.prompt(steps=4000))
    stage.sampling(prompt_id)
    (victim,) = cluster.workers()
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(PromptError, match=f"on {cluster.second}\\) died"):
        stage.client.wait(prompt_id)
    assert near(stage.good(), wanted)


def test_another_file_there_is_refused(stage: Stage, cluster: machines.Cluster, wanted: bytes) -> None:
    model = stage.server.models / "wan.safetensors"
    copy = stage.server.models / "copy.safetensors"
    copy.write_bytes(model.read_bytes())
    changed = bytearray(model.read_bytes())
    changed[-100000:] = bytes(100000)
    other = stage.server.base / "other.safetensors"
    other.write_bytes(changed)
    prompt = stage.prompt()
    prompt[LOADER]["inputs"]["unet_name"] = copy.name
    with (
        cluster.seeing(copy, other),
        pytest.raises(PromptError, match=f"copy.safetensors.*{cluster.second}: the file there is another one"),
    ):
        stage.client.run(prompt)
    workers = cluster.workers()
    assert near(stage.good(), wanted)
    assert cluster.workers() == workers, "every worker refused alike"


def test_another_version_there_is_refused(stage: Stage, cluster: machines.Cluster, tmp_path: Path) -> None:
    kill = {"class_type": "RayKill", "inputs": {"ray_actors": [LOADER, 0], "kill_mode": "Kill Workers Only"}}
    prompt = stage.prompt()
    stage.client.run({**{name: prompt[name] for name in (INIT, LOADER)}, "kill": kill})
    assert not processes.gone(cluster.workers() + local_workers(cluster), wait=10.0)
    with (
        cluster.seeing(stage.server.comfy, tmp_path),
        pytest.raises(PromptError, match=f"{cluster.second} .* has no ComfyUI in "),
    ):
        stage.client.run(stage.prompt())


@SLOW
@pytest.mark.parametrize("cancel", [False, True])
def test_a_link_dies(stage: Stage, cluster: machines.Cluster, wanted: bytes, cancel: bool) -> None:
    """Every worker lives and waits: the link is named, or Cancel is obeyed while it is not known yet."""
    prompt_id = stage.client.queue(stage.prompt(steps=4000))
    stage.sampling(prompt_id)
    with cluster.cut():
        began = time.monotonic()
        if cancel:
            time.sleep(5)
            stage.client.interrupt()
        with pytest.raises(PromptError) as caught:
            stage.client.wait(prompt_id)
        took = time.monotonic() - began
    if cancel:
        assert caught.value.kind == "interrupted"
    else:
        assert re.search("The link between worker . on .* and worker . on .* is dead", caught.value.text)
        assert cluster.second in caught.value.text
        assert took < 60
    assert near(stage.good(), wanted)


@SLOW
def test_one_machine_is_enough_for_one_worker(stage: Stage, cluster: machines.Cluster) -> None:
    prompt = stage.prompt()
    prompt[INIT]["inputs"].update(GPU=1, ulysses_degree=1)
    stage.client.run(prompt)
    assert not cluster.workers() and len(local_workers(cluster)) == 1


@SLOW
def test_the_cluster_ends(stage: Stage, cluster: machines.Cluster, wanted: bytes) -> None:
    """Ray would end ComfyUI with it, a minute later."""
    prompt_id = stage.client.queue(stage.prompt(steps=4000))
    stage.sampling(prompt_id)
    control = next(process for process in processes.tree(cluster.head) if "/gcs_server" in process.command)
    os.kill(control.pid, signal.SIGKILL)
    with pytest.raises(PromptError, match="Ray's gcs_server process ended"):
        stage.client.wait(prompt_id)
    with pytest.raises(PromptError, match=f"No Ray cluster answers at {cluster.address}"):
        stage.good()
    assert Stage(stage.server, stage.client).good() == wanted
