"""Classes that nobody wrote a plan for, on the pool: one is found and proved there, and the latents equal plain's."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_raylight.patches import registry
from comfy_raylight.tests.conftest import version_of
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import write
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.prompts import INIT, LOADER, SAMPLER, SAVE, PoolCase, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import FP32, both, latent

FOLDER = "found"
KNOWN = {**registry.FAMILIES, **registry.UNSPLIT}
NAMES = [name for name, each in families.FAMILIES.items() if each.model not in KNOWN]
FIRST = "lens"
PLANNED = r"(\w+) has no plan of its own: one (?:{}).*, \d+ blocks, tokens at dim 1, (\d+)%"
NEW, KEPT = r"was found and checked in [\d.]+ s", "from an earlier start is used"
FOUND, USED = PLANNED.format(NEW), PLANNED.format(f"{NEW}|{KEPT}")
WHERE = [pytest.param(workers, cfg, id=f"{workers} cfg {cfg:.0f}") for workers in (2, 3) for cfg in (1.0, 4.0)]

pytestmark = pytest.mark.timeout(1200)


def there(name: str, root: Path) -> bool:
    return name in families.of_version(version_of(root), large=LARGE)


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer, comfy_root: Path) -> Iterator[None]:
    """The checkpoints, which go again."""
    folder = server.models / FOLDER
    jobs = {job.path: job for job in (families.job(name, folder) for name in NAMES if there(name, comfy_root))}
    write(list(jobs.values()), comfy_root=comfy_root, python=Path(sys.executable))
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sampling(comfy_root: Path) -> families.Case:
    if not there(FIRST, comfy_root):
        pytest.skip("this ComfyUI does not have it")
    return families.case(FIRST, folder=FOLDER)


@pytest.fixture
def name(request: pytest.FixtureRequest, comfy_root: Path) -> str:
    if not there(request.param, comfy_root):
        pytest.skip("this ComfyUI does not have it, or it is large")
    return str(request.param)


@pytest.mark.parametrize("workers,cfg", WHERE)
@pytest.mark.parametrize("name", NAMES, indirect=True)
def test_equals_plain(server: ComfyServer, client: ComfyClient, name: str, workers: int, cfg: float) -> None:
    sampling = dataclasses.replace(families.case(name, folder=FOLDER), cfg=cfg, steps=3)
    before = len(server.log())
    difference, _, _ = both(server, client, sampling, PoolCase(workers=workers, through_model=True))
    assert difference <= FP32
    said = server.log()[before:]
    assert "whole" not in said and "is dropped" not in said
    # the same weights may have been on a pool before, in another test
    lines = re.findall(USED, said)
    # with cfg the two conditions are one batch, which is another kind of call; the model is on the pool still
    assert {model for model, _ in lines} == {families.FAMILIES[name].model}
    assert all(int(share) > 50 for _, share in lines)


def test_the_report_says_it(server: ComfyServer, client: ComfyClient, sampling: families.Case) -> None:
    prompt = pool(dataclasses.replace(sampling, name="report", cfg=1.0), PoolCase(through_model=True))
    prompt["report"] = {"class_type": "RayReport", "inputs": {"ray_actors": [LOADER, 0], "latent": [SAMPLER, 0]}}
    text = client.run(prompt).outputs["report"]["text"][0]
    lines = re.findall(r"lens\.safetensors \(\w+\): .*plan found: 3 blocks, (\d+)% of a step divided", text)
    assert len(lines) >= 2, "each worker, of each file with these weights that it has"


def test_the_next_start_does_not_pay_again(
    server: ComfyServer, client: ComfyClient, sampling: families.Case, comfy_root: Path
) -> None:
    """With weights that no other test has: what was said of those before is not said again."""
    job = dataclasses.replace(families.job(FIRST, server.models / FOLDER), seed=77)
    job = dataclasses.replace(job, path=job.path.with_name("kept.safetensors"))
    write([job], comfy_root=comfy_root, python=Path(sys.executable))
    own = dataclasses.replace(sampling, file=f"{FOLDER}/kept.safetensors", name="kept", cfg=1.0)
    prompt = pool(own, PoolCase(through_model=True))
    client.run(prompt)
    first = latent(server, "kept")
    loaded = {name: prompt[name] for name in (INIT, LOADER)}
    kill = {"class_type": "RayKill", "inputs": {"ray_actors": [LOADER, 0], "kill_mode": "Kill Workers Only"}}
    client.run({**loaded, "kill": kill})
    before = len(server.log())
    prompt[SAMPLER]["inputs"]["denoise"] = 0.999  # or ComfyUI would take its own result
    prompt[SAVE]["inputs"]["name"] = "kept again"
    client.run(prompt)
    said = server.log()[before:]
    assert "one from an earlier start is used, 3 blocks" in said and "found and checked" not in said
    assert (first - latent(server, "kept again")).abs().max() < 0.1 * first.abs().max()


def test_with_cfg_degree_and_rings(server: ComfyServer, client: ComfyClient, sampling: families.Case) -> None:
    for where in (PoolCase(workers=4, ulysses=2, cfg=2), PoolCase(ring=2)):
        difference, _, _ = both(server, client, sampling, dataclasses.replace(where, through_model=True))
        assert difference <= FP32


def test_patches_are_computed_whole(server: ComfyServer, client: ComfyClient, sampling: families.Case) -> None:
    """A node's function inside the model is not tried out: every worker computes all, and the log says so."""
    patched = dataclasses.replace(sampling, model_nodes=(("TomePatchModel", {"ratio": 0.3}),))
    before = len(server.log())
    difference, _, _ = both(server, client, patched, PoolCase(through_model=True))
    assert difference <= FP32
    assert "whole where a node changes the model inside (TomePatchModel" in server.log()[before:]


@pytest.mark.parametrize(
    "more, why",
    [({"FSDP": True}, "without FSDP"), ({"XFuser_attention": "TORCH_MATH"}, "with XFuser_attention TORCH")],
)
def test_what_cannot_be_is_refused_by_name(
    client: ComfyClient, sampling: families.Case, more: dict[str, object], why: str
) -> None:
    with pytest.raises(PromptError, match=f"cannot split the model family Lens.*{why}.*Set ulysses_degree") as caught:
        client.run(pool(sampling, PoolCase(through_model=True, more=more)))
    assert caught.value.node == LOADER


def test_in_16_bits(server: ComfyServer, client: ComfyClient, sampling: families.Case, comfy_root: Path) -> None:
    """The proof is in fp32 whatever the weights are."""
    job = dataclasses.replace(families.job(FIRST, server.models / FOLDER), dtype="bfloat16")
    job = dataclasses.replace(job, path=job.path.with_name("half.safetensors"))
    write([job], comfy_root=comfy_root, python=Path(sys.executable))
    half = dataclasses.replace(sampling, file=f"{FOLDER}/half.safetensors", weight_dtype="bf16", name="half")
    before = len(server.log())
    client.run(pool(half, PoolCase(through_model=True)))
    said = server.log()[before:]
    assert re.search(FOUND, said) and "is dropped" not in said
    assert latent(server, "half").isfinite().all()
