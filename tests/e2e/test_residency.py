"""The switches FSDP and FSDP_CPU_OFFLOAD over HTTP: the latents are plain ComfyUI's, whatever else is done."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.faults import FAULTS, Stage, suffer, zombies
from comfy_raylight.tests.host.prompts import (
    FAMILIES,
    LOADER,
    SAMPLER,
    SAVE,
    Case,
    PoolCase,
    plain,
    pool,
    with_gguf,
)
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.adapters import write_adapter
from comfy_raylight.tests.weights.files import KITCHEN, write_gguf, write_variant
from safetensors.torch import save_file

from .conftest import Run
from .test_sampling import FP32
from .test_weights import EFFECT, apart, with_ray_loras, with_stock_loras

SHARDED = {"FSDP": True}
STREAMED = {"FSDP": True, "FSDP_CPU_OFFLOAD": True}
LATE = {"FSDP_prefetch": "off"}
SIZE = {"layers": 6, "dim": 128}
DEEP = Case(file="deep.safetensors", inputs=FAMILIES["wan"])


@pytest.fixture(scope="module")
def files(server: ComfyServer, comfy_root: Path) -> None:
    """Checkpoints with enough blocks for dividing them to free memory."""
    models = server.models
    jobs = [
        Job(family="wan", path=models / f"deep{n}.safetensors", seed=s, size=SIZE) for n, s in (("", 0), ("-low", 3))
    ]
    write(jobs, comfy_root=comfy_root, python=Path(sys.executable))
    for kind, sampling in OF.items():
        write_variant(models / DEEP.file, models / sampling.file, kind)
    for name, part in (("deep-attn", "attn"), ("deep-ffn", "ffn")):
        write_adapter(models / DEEP.file, models.parent / "loras" / f"{name}.safetensors", "lora", part=part)


@pytest.fixture
def result(result: Run, files: None) -> Run:
    """Those of these files."""
    return result


ON_FOUR = PoolCase(workers=4, cfg=2, more=SHARDED)
THREE = dataclasses.replace(DEEP, sampling="PerpNegGuider")
OF = {kind: dataclasses.replace(DEEP, file=f"deep-{kind}.safetensors") for kind in ("bf16", "scaled", "layers")}
WHERE = [
    pytest.param(DEEP, PoolCase(more=SHARDED), id="sharded"),
    pytest.param(DEEP, PoolCase(more=STREAMED), id="streamed"),
    pytest.param(DEEP, ON_FOUR, id="sharded cfg", marks=SLOW),
    pytest.param(DEEP, PoolCase(more=SHARDED | LATE), id="sharded late", marks=SLOW),
    pytest.param(DEEP, PoolCase(more=STREAMED | LATE), id="streamed late", marks=SLOW),
    pytest.param(DEEP, PoolCase(workers=3, more=SHARDED), id="sharded on 3", marks=SLOW),
    pytest.param(DEEP, PoolCase(workers=3, more=STREAMED), id="streamed on 3", marks=SLOW),
    pytest.param(DEEP, PoolCase(ring=2, more=SHARDED), id="sharded ring", marks=SLOW),
    pytest.param(DEEP, PoolCase(workers=4, ring=2, more=STREAMED), id="streamed 2 x ring 2", marks=SLOW),
    pytest.param(dataclasses.replace(DEEP, cfg=1.0), ON_FOUR, id="sharded cfg 1", marks=SLOW),
    pytest.param(THREE, dataclasses.replace(ON_FOUR, through_model=True), id="three conditions on two", marks=SLOW),
    pytest.param(DEEP, PoolCase(cfg=2, more=STREAMED), id="streamed, each group by itself", marks=SLOW),
    pytest.param(DEEP, PoolCase(ulysses=1, more=STREAMED), id="streamed on one replica of two", marks=SLOW),
    pytest.param(OF["bf16"], PoolCase(more=SHARDED), id="sharded bf16", marks=SLOW),
    pytest.param(OF["scaled"], PoolCase(more=SHARDED), id="sharded fp8", marks=SLOW),
    pytest.param(OF["layers"], PoolCase(more=STREAMED), id="streamed mixed precision", marks=SLOW),
]


@pytest.mark.parametrize("sampling,where", WHERE)
def test_equals_plain(server: ComfyServer, result: Run, sampling: Case, where: PoolCase) -> None:
    kind = "streamed" if where.more.get("FSDP_CPU_OFFLOAD") else "sharded"
    before = server.log().count(f"{kind} weights, ")
    assert apart(result(pool(sampling, where)), result(plain(sampling))) <= FP32
    assert server.log().count(f"{kind} weights, ") > before, "the log says what a worker holds"


def taken_over(way: Callable[[Case], Prompt], first: Case, second: Case) -> Prompt:
    """A run whose second model takes over in the middle of the schedule."""
    prompt, other = way(first), way(second)
    prompt["loader2"] = other[LOADER]
    inputs = {**other[SAMPLER]["inputs"], "latent_image": [SAMPLER, 0]}
    inputs["model" if way is plain else "ray_actors"] = ["loader2", 0]
    prompt["sampler2"] = {**other[SAMPLER], "inputs": inputs}
    prompt[SAVE]["inputs"]["samples"] = ["sampler2", 0]
    return prompt


KINDS = [pytest.param(SHARDED, id="sharded"), pytest.param(STREAMED, id="streamed", marks=SLOW)]


@pytest.mark.parametrize("more", KINDS)
def test_patches_offload_and_another_model(result: Run, more: dict[str, Any]) -> None:
    """LoRA on, offloaded, another one, off; and a second model that takes over in the middle of the schedule."""
    where = PoolCase(more=more)
    a, b = ("deep-attn.safetensors", 0.7), ("deep-ffn.safetensors", -0.5)
    bare = result(pool(DEEP, where))
    for chain in ([a], [a, b], [b], []):
        expected = result(with_stock_loras(plain(DEEP), chain))
        prompt = with_ray_loras(pool(DEEP, where), chain, both_ways=False)
        actors = prompt[SAMPLER]["inputs"]["ray_actors"]
        prompt["offload"] = {"class_type": "RayOffloadModel", "inputs": {"ray_actors": actors, "latent": [SAMPLER, 0]}}
        prompt[SAVE]["inputs"]["samples"] = ["offload", 0]
        found = result(prompt)
        assert apart(found, expected) <= FP32, chain
        assert not chain or apart(found, bare) > EFFECT
    assert torch.equal(found, bare)
    first = dataclasses.replace(DEEP, steps=4, end=2, leftover=True)
    second = dataclasses.replace(DEEP, file="deep-low.safetensors", steps=4, start=2, add_noise=False)
    pictures = [result(taken_over(way, first, second)) for way in (plain, lambda case: pool(case, where))]
    assert apart(pictures[1], pictures[0]) <= FP32


@SLOW
@pytest.mark.parametrize("more", KINDS)
def test_gguf(server: ComfyServer, result: Run, more: dict[str, Any]) -> None:
    path = server.models / "deep-Q8_0.gguf"
    _, whole = write_gguf(server.models / DEEP.file, path, "Q8_0")
    same = dataclasses.replace(DEEP, file="deep-Q8_0-whole.safetensors")
    save_file(whole, server.models / same.file)
    for chain in ([], [("deep-attn.safetensors", 0.7)]):
        prompt = with_ray_loras(pool(same, PoolCase(more=more)), chain, both_ways=False)
        assert apart(result(with_gguf(prompt, path.name)), result(with_stock_loras(plain(same), chain))) <= FP32


@SLOW
@pytest.mark.parametrize("more", KINDS)
@pytest.mark.parametrize("kind", ("scaled", *KITCHEN))
def test_lora_on_quantised_weights(
    server: ComfyServer, result: Run, comfy_root: Path, kind: str, more: dict[str, Any]
) -> None:
    """Plain ComfyUI quantises the sum again; tests/weights has every kind of patch."""
    if kind in KITCHEN:
        pytest.importorskip("comfy_kitchen")
        known = (comfy_root / "comfy" / "quant_ops.py").read_text(encoding="utf-8")
        if f'"{KITCHEN[kind].format}"' not in known:
            pytest.skip("this ComfyUI does not know the format")
    sampling = dataclasses.replace(DEEP, file=f"deep-lora-{kind}.safetensors")
    write_variant(server.models / DEEP.file, server.models / sampling.file, kind)
    chain = [("deep-ffn.safetensors", 0.7)]
    found = result(with_ray_loras(pool(sampling, PoolCase(more=more)), chain, both_ways=False))
    expected = result(with_stock_loras(plain(sampling), chain))
    assert apart(found, expected) <= FP32
    assert apart(expected, result(plain(sampling))) > EFFECT


def test_report(client: ComfyClient, files: None) -> None:
    """Ray Report says where weights are, and how many of their bytes a worker has."""
    prompt = pool(dataclasses.replace(DEEP, seed=77), PoolCase(more=SHARDED))
    inputs = {"ray_actors": [LOADER, 0], "latent": [SAMPLER, 0]}
    prompt["report"] = {"class_type": "RayReport", "inputs": inputs}
    text = client.run(prompt, timeout=400).outputs["report"]["text"][0]
    # a worker may hold other models of the tests before this one
    found = re.findall(r"deep\.safetensors \(WanModel\): ([\d.]+) MiB of ([\d.]+) MiB on the device\n\s+(.+)", text)
    assert len(found) == 2
    for held, size, weights in found:
        assert held == size
        assert re.search(r"sharded weights, 0\.01 GB per worker: .* of parts.* 6 blocks are gathered", weights)


@SLOW
def test_weights_that_change_back(result: Run) -> None:
    """Resident, sharded and streamed in turn, each a pool of its own, give the same bits."""
    found = [result(pool(DEEP, PoolCase(more=more))) for more in ({}, SHARDED, STREAMED)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_more_than_it_frees(client: ComfyClient, files: None) -> None:
    """Two blocks: a part of each and a buffer for both would be more than the model."""
    with pytest.raises(PromptError, match="FSDP would take more memory than it frees for wan.safetensors") as caught:
        client.run(pool(Case(file="wan.safetensors", inputs=FAMILIES["wan"]), PoolCase(more=SHARDED)))
    assert caught.value.node == LOADER
    assert "its 2 blocks have" in caught.value.text and "Switch FSDP off" in caught.value.text


BY_DEFAULT = ("exceptions", "cancel in a step")
FAULT_NAMES = [
    pytest.param(name, marks=() if name in BY_DEFAULT else SLOW)
    for name in (*BY_DEFAULT, "exception", "cancel", "rank 1")
]


@pytest.fixture(scope="module", params=KINDS)
def stage(request: pytest.FixtureRequest, server: ComfyServer, client: ComfyClient, files: None) -> Stage:
    return Stage(server, client, file=DEEP.file, more=request.param)


@pytest.fixture(scope="module")
def wanted(stage: Stage) -> bytes:
    return stage.good()


@pytest.mark.parametrize("name", FAULT_NAMES)
def test_fault(stage: Stage, wanted: bytes, name: str) -> None:
    """Errors and cancels inside of gathered blocks: the pool lives on or is replaced, and the bits are the same."""
    fault, outcome = FAULTS[name], suffer(stage, FAULTS[name])
    assert fault.expect in outcome.seen
    assert outcome.next == wanted
    assert fault.keeps in (None, outcome.kept)
    assert zombies(stage.server.pid) == []


OTHERS = [
    pytest.param("flux", {"double": 2, "single": 4}, id="flux", marks=SLOW),
    pytest.param("zimage", {}, id="zimage", marks=SLOW),
]
"""Blocks of two kinds, and 1.7 GB of bf16."""


@pytest.mark.parametrize("name,size", OTHERS)
def test_other_families(server: ComfyServer, result: Run, comfy_root: Path, name: str, size: dict[str, int]) -> None:
    """Every family is in tests/engine/test_residency.py; these are here with their files."""
    if name == "flux" and version_of(comfy_root) == "0.3.75":
        pytest.skip("this ComfyUI has it in one width only: it would have 5 GB")
    family = dataclasses.replace(families.FAMILIES[name], size={**families.FAMILIES[name].size, **size})
    path = server.models / f"residency-{name}.safetensors"
    write(
        [Job(family=family.recipe or name, path=path, dtype=family.dtype, size=family.size)],
        comfy_root=comfy_root,
        python=Path(sys.executable),
    )
    sampling = dataclasses.replace(families.case(name), file=path.name)
    expected = result(plain(sampling))
    for more in (SHARDED, STREAMED):
        assert apart(result(pool(sampling, PoolCase(through_model=True, more=more))), expected) <= FP32
    path.unlink()
