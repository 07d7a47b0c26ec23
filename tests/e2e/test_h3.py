"""MiniMax-H3, video with sound, under what a pool and ComfyUI can do to a model: the latents of plain ComfyUI."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.host import families, processes
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.prompts import LOADER, SAMPLER, Case, PoolCase, plain, pool, with_gguf
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.adapters import write_adapter
from comfy_raylight.tests.weights.files import KITCHEN, write_gguf, write_variant
from safetensors.torch import save_file

from .conftest import Run
from .test_data_parallel import SEEDS, TWO, Bench, parallel, same
from .test_residency import SHARDED, STREAMED, taken_over
from .test_sampling import FP32
from .test_weights import EFFECT, apart, with_ray_loras, with_stock_loras

FOLDER = "h3"
LORA = f"{FOLDER}/turbo.safetensors"
BLOCKS = {"layers": 6}
"""Enough for dividing them to free memory."""
MODEL = PoolCase(through_model=True)


def case(name: str = "h3", **more: Any) -> Case:
    return dataclasses.replace(families.case(name, folder=FOLDER), **more)


H3 = case()
OTHER = dataclasses.replace(H3, file=f"{FOLDER}/other.safetensors")
SHIFT = ("MiniMaxH3SigmaShift", {"shift_video": 7.0, "shift_audio": 2.0})
CACHE = ("EasyCache", {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": True})
TURBO = ("LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": 0.7})
TABLE = ("RLTestTable", {"tensor": "adaln_t_table"})
PYTORCH = ("ModelAttentionBackend", {"attention": "pytorch attention"})
SDE: dict[str, Any] = {"sampler": "dpmpp_2m_sde", "steps": 3}


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer, comfy_root: Path) -> Path:
    """Two models and a LoRA for them, in a folder of their own."""
    if "h3" not in families.of_version(version_of(comfy_root)):
        pytest.skip("this ComfyUI does not have it")
    folder = server.models / FOLDER
    job = families.job("h3", folder)
    jobs = [
        Job(family="h3", path=path, seed=seed, size={**job.size, **BLOCKS})
        for seed, path in enumerate((job.path, folder / "other.safetensors"))
    ] + [families.job("h3_curves", folder)]
    write(jobs, comfy_root=comfy_root, python=Path(sys.executable))
    lora = server.models.parent / "loras" / LORA
    lora.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(job.path, lora, "lora")
    return job.path


WHERE = [
    pytest.param(case(**SDE), MODEL, id="sde"),
    pytest.param(case(model_nodes=(SHIFT, TURBO)), PoolCase(workers=3, through_model=True), id="shift and LoRA on 3"),
    pytest.param(case("h3_curves", model_nodes=(TABLE, PYTORCH)), MODEL, id="curves, read, and a backend"),
    pytest.param(case(model_nodes=(PYTORCH,)), PoolCase(ring=2, through_model=True), id="backend ring", marks=SLOW),
    pytest.param(H3, PoolCase(workers=5, through_model=True), id="on 5", marks=SLOW),
    pytest.param(H3, PoolCase(ring=2, through_model=True), id="ring", marks=SLOW),
    pytest.param(case(**SDE), PoolCase(cfg=2, through_model=True), id="cfg groups", marks=SLOW),
    pytest.param(H3, PoolCase(workers=4, cfg=2, through_model=True), id="cfg groups of 2", marks=SLOW),
    pytest.param(H3, PoolCase(workers=4, ring=2, through_model=True), id="2 x ring 2", marks=SLOW),
    pytest.param(case("h3_masks"), PoolCase(ring=2, through_model=True), id="masks ring", marks=SLOW),
    pytest.param(case("h3_masks", **SDE), PoolCase(workers=3, through_model=True), id="masks sde on 3", marks=SLOW),
    pytest.param(case("h3_references"), PoolCase(workers=3, through_model=True), id="references on 3", marks=SLOW),
    pytest.param(case("h3_keyframes"), PoolCase(workers=3, through_model=True), id="keyframes on 3", marks=SLOW),
    pytest.param(case(model_nodes=(CACHE,), steps=10), MODEL, id="EasyCache", marks=SLOW),
    pytest.param(H3, PoolCase(more=SHARDED, through_model=True), id="sharded"),
    pytest.param(H3, PoolCase(workers=3, more=SHARDED, through_model=True), id="sharded on 3", marks=SLOW),
    pytest.param(H3, PoolCase(more=STREAMED, through_model=True), id="streamed", marks=SLOW),
    pytest.param(H3, PoolCase(workers=4, cfg=2, more=SHARDED, through_model=True), id="sharded cfg", marks=SLOW),
    pytest.param(
        case("h3_references", model_nodes=(SHIFT, TURBO)),
        PoolCase(more=STREAMED, through_model=True),
        id="streamed references shift and LoRA",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize("sampling,where", WHERE)
def test_equals_plain(result: Run, sampling: Case, where: PoolCase) -> None:
    assert apart(result(pool(sampling, where)), result(plain(sampling))) <= FP32


def test_ray_nodes(result: Run) -> None:
    """Our LoRA nodes and our sampler in place of core's."""
    advanced = case(sampling="KSamplerAdvanced")
    chain = [(LORA, 0.7)]
    expected = result(with_stock_loras(plain(advanced), chain))
    assert apart(expected, result(plain(advanced))) > EFFECT
    assert apart(result(with_ray_loras(pool(advanced), chain, both_ways=False)), expected) <= FP32


KINDS = ("scaled", "int8", "int8_convrot")
PLACES = [pytest.param({}, id="resident"), pytest.param(SHARDED, id="sharded"), pytest.param(STREAMED, id="streamed")]


@SLOW
@pytest.mark.parametrize("more", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_quantised(files: Path, result: Run, kind: str, more: dict[str, Any]) -> None:
    """As most people have it: in fp8, or in the int8 of core's package."""
    if kind in KITCHEN:
        pytest.importorskip("comfy_kitchen")
    path = files.with_name(f"h3-{kind}.safetensors")
    write_variant(files, path, kind)
    sampling = dataclasses.replace(H3, file=f"{FOLDER}/{path.name}")
    expected = result(plain(sampling))
    assert apart(expected, result(plain(H3))) > EFFECT / 10
    assert apart(result(pool(sampling, PoolCase(more=more, through_model=True))), expected) <= FP32


@SLOW
@pytest.mark.parametrize("more", PLACES)
def test_gguf(files: Path, result: Run, more: dict[str, Any]) -> None:
    path, same_file = files.with_name("h3-Q8_0.gguf"), files.with_name("h3-Q8_0-whole.safetensors")
    _, whole = write_gguf(files, path, "Q8_0")
    save_file(whole, same_file)
    sampling = case(sampling="KSamplerAdvanced")
    expected = result(plain(dataclasses.replace(sampling, file=f"{FOLDER}/{same_file.name}")))
    found = result(with_gguf(pool(sampling, PoolCase(more=more)), f"{FOLDER}/{path.name}"))
    assert apart(found, expected) <= FP32


def between(prompt: Prompt, node: str, **inputs: Any) -> Prompt:
    """A Ray node between loader and sampler."""
    prompt[node] = {"class_type": node, "inputs": {"ray_actors": [LOADER, 0], **inputs}}
    prompt[SAMPLER]["inputs"]["ray_actors"] = [node, 0]
    return prompt


@SLOW
@pytest.mark.parametrize("backend", ("inductor", "cudagraphs"))
def test_compiled(result: Run, backend: str) -> None:
    """On a CPU a recorded step is the step itself: what is seen here is that it runs, not that it is faster."""
    sampling = case(sampling="KSamplerAdvanced", steps=4)
    found = result(between(pool(sampling), "RayTorchCompileModel", backend=backend))
    assert apart(found, result(plain(sampling))) <= FP32


@SLOW
def test_teacache(server: ComfyServer, result: Run) -> None:
    """It leaves out the same evaluations, and gives the same, on one worker and on two."""
    widgets = {"threshold": 0.5, "warmup_percent": 0.1, "retention_interval": 3}
    schedule = {"start_percent": 0.1, "end_percent": 0.9}
    sampling = case(sampling="KSamplerAdvanced", steps=10)
    before = len(server.log())
    one, two = (
        result(between(pool(sampling, PoolCase(workers=workers)), "RayTeaCache", **widgets, **schedule))
        for workers in (1, 2)
    )
    told = re.findall(r"TeaCache: (\d+) of (\d+) evaluations", server.log()[before:])
    assert len(told) == 2 and told[0] == told[1] and int(told[0][0]) >= 2
    assert apart(two, one) <= FP32


@SLOW
def test_two_models(result: Run) -> None:
    """One takes over from the other in the middle of the schedule."""
    first = case(sampling="KSamplerAdvanced", steps=4, end=2, leftover=True)
    second = dataclasses.replace(OTHER, sampling="KSamplerAdvanced", steps=4, start=2, add_noise=False)
    found = [result(taken_over(way, first, second)) for way in (plain, pool)]
    assert apart(found[1], found[0]) <= FP32


@SLOW
def test_data_parallel(server: ComfyServer, client: ComfyClient) -> None:
    bench = Bench(server, client)
    sampling = case(sampling="KSamplerAdvanced")
    same(
        bench.many(parallel(sampling, TWO)),
        [bench.single(dataclasses.replace(sampling, seed=seed)) for seed in SEEDS[:2]],
    )


def test_cancel(server: ComfyServer, client: ComfyClient, result: Run) -> None:
    """In the middle of sampling: the workers stay, and the next video has the same bits."""
    before = result(pool(H3, MODEL))
    alive = [process.pid for process in processes.workers(server.pid)]
    prompt_id = client.queue(pool(case(steps=2000), MODEL))
    end = time.monotonic() + 120
    while time.monotonic() < end and sum(event.kind == "progress" for event in client.events_of(prompt_id)) < 3:
        time.sleep(0.02)
    client.interrupt()
    with pytest.raises(PromptError) as caught:
        client.wait(prompt_id, timeout=60)
    assert caught.value.kind == "interrupted"
    assert torch.equal(result(pool(dataclasses.replace(H3, name="again"), MODEL)), before)
    assert [process.pid for process in processes.workers(server.pid)] == alive
