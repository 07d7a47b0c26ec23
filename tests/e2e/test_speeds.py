"""Workers that are not equally fast: unequal parts of tokens, heads and rows give plain ComfyUI's latents over HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, Case, PoolCase, plain, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import FP32, latent

WAN, DEEP = "wan.safetensors", "wan-deep.safetensors"


@pytest.fixture(scope="module")
def server(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """One whose second worker is said to be less than half as fast as the first."""
    env = {"RAYLIGHT_SPEEDS": "1,0.4"}
    with ComfyServer(comfy_root, base=tmp_path_factory.mktemp("speeds"), threads=1, env=env) as server:
        jobs = [Job(family=family, path=server.models / f"{family}.safetensors") for family in ("wan", "unet")]
        # of fewer blocks nothing would be freed by dividing them
        jobs.append(Job(family="wan", path=server.models / DEEP, size={"layers": 6}))
        write(jobs, comfy_root=comfy_root)
        yield server


@pytest.fixture(scope="module")
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize(
    "family,where,file",
    [
        pytest.param("wan", PoolCase(), WAN, id="ulysses"),
        pytest.param("wan", PoolCase(ring=2), WAN, id="ring"),
        pytest.param("wan", PoolCase(cfg=2), WAN, id="cfg groups"),
        pytest.param("wan", PoolCase(more={"FSDP": True}), DEEP, id="sharded"),
        pytest.param("unet", PoolCase(), "unet.safetensors", id="rows"),
    ],
)
def test_equals_plain(server: ComfyServer, client: ComfyClient, family: str, where: PoolCase, file: str) -> None:
    case = Case(file=file, inputs=FAMILIES[family])
    client.run(plain(dataclasses.replace(case, name="plain")))
    client.run(pool(dataclasses.replace(case, name="pool"), where), timeout=400)
    a, b = latent(server, "plain"), latent(server, "pool")
    assert a.isfinite().all() and a.std() > 1e-3 and (a - b).abs().max() <= FP32 * a.abs().max()
    assert client.get("/raylight/status", timeout=30)["pool"]["speeds"] == [1.0, 0.4]
    assert "parts of a model call are as their speeds: 1 : 0.4" in server.log()


def test_another_number_of_workers_is_refused(client: ComfyClient) -> None:
    with pytest.raises(PromptError, match="RAYLIGHT_SPEEDS is not a list of speeds.*3 workers"):
        client.run(pool(Case(file=WAN, inputs=FAMILIES["wan"], seed=3), PoolCase(workers=3)))
