"""Files as they circulate, through ComfyUI's HTTP API: what ComfyUI's loader converts gives plain ComfyUI's latents."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, Prompt
from comfy_raylight.tests.host.prompts import SAVE, Case, PoolCase, plain, pool, with_gguf
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.files import write_gguf
from safetensors.torch import save_file

from .test_sampling import FP32, latent
from .test_weights import Run, apart

FOLDER = "layouts"
SIZES = {"flux": {"context": 64, "double": 4, "single": 2}, "sd3": {}, "auraflow": {}}
"""Flux with enough blocks for dividing them to free memory."""
PRIVATE = {"use_mmap": False}
SHARDED = {"FSDP": True, "FSDP_prefetch": "off"}
STREAMED = {"FSDP": True, "FSDP_CPU_OFFLOAD": True}


@pytest.fixture
def result(server: ComfyServer, client: ComfyClient) -> Run:
    """Runs a prompt and returns its latent."""

    def run(prompt: Prompt) -> torch.Tensor:
        name = f"layouts{len(list(server.output.glob('layouts*')))}"
        prompt[SAVE]["inputs"]["name"] = name
        client.run(prompt, timeout=600)
        return latent(server, name)

    return run


File = Callable[[str, str], tuple[Case, Case]]


@pytest.fixture
def diffusers(server: ComfyServer, comfy_root: Path) -> File:
    """What to sample a family in diffusers' layout with: the pool's file of a kind, and one for plain ComfyUI."""

    def get(name: str, kind: str) -> tuple[Case, Case]:
        if name not in families.of_version(version_of(comfy_root), large=True):
            pytest.skip("this ComfyUI has it in a large size only")
        path = server.models / FOLDER / f"{name}-diffusers.safetensors"
        job = Job(family=name, path=path, dtype="float32", size=SIZES[name], layout="diffusers")
        write([job], comfy_root=comfy_root, python=Path(sys.executable))
        case = dataclasses.replace(families.case(name), file=f"{FOLDER}/{path.name}")
        if kind == "safetensors":
            return case, case
        quantised, whole = path.with_name(f"{name}-{kind}.gguf"), path.with_name(f"{name}-{kind}.safetensors")
        if not whole.exists():
            _, values = write_gguf(path, quantised, kind, quantised=lambda *_: True)
            save_file(values, whole)
        files = (f"{FOLDER}/{file.name}" for file in (quantised, whole))
        return tuple(dataclasses.replace(case, file=file) for file in files)  # type: ignore[return-value]

    return get


def on(workers: int = 2, more: Mapping[str, object] | None = None) -> PoolCase:
    return PoolCase(workers=workers, through_model=True, more=more or {})


WRITTEN = [
    pytest.param("sd3", "safetensors", on(), id="sd3"),
    pytest.param("flux", "Q8_0", on(more=SHARDED), id="flux Q8_0 sharded"),
    pytest.param("sd3", "Q4_K", on(more=STREAMED), id="sd3 Q4_K streamed"),
    *(
        pytest.param(family, kind, where, id=f"{family} {kind} {name}", marks=SLOW)
        for family in ("flux", "sd3", "auraflow")
        for kind in ("safetensors", "Q8_0", "Q4_K")
        for name, where in {
            "map": on(),
            "one": on(1),
            "private": on(more=PRIVATE),
            "sharded": on(more=SHARDED),
            "streamed": on(more=STREAMED),
        }.items()
        # AuraFlow's blocks are of two sizes, and as few as ComfyUI's detection allows
        if family != "auraflow" or name not in ("sharded", "streamed")
    ),
]


@pytest.mark.parametrize("family,kind,where", WRITTEN)
def test_tensors_that_comfyui_writes_into(
    result: Run, diffusers: File, family: str, kind: str, where: PoolCase
) -> None:
    """The halves of some layers are swapped in place; queries, keys and values are joined."""
    ours, wanted = diffusers(family, kind)
    prompt = pool(ours, where)
    prompt = prompt if kind == "safetensors" else with_gguf(prompt, ours.file)
    expected = result(plain(wanted))
    assert apart(result(prompt), expected) <= FP32
