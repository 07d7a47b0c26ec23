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
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.large import LARGE, WHY
from comfy_raylight.tests.host.prompts import FAMILIES, Case, PoolCase, plain, pool, with_gguf
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.files import split, write_gguf
from safetensors.torch import load_file, save_file

from .conftest import Run
from .test_sampling import FP32
from .test_weights import apart

FOLDER = "layouts"
SIZES = {"flux": {"context": 64, "double": 4, "single": 2}, "sd3": {}, "auraflow": {}}
"""Flux with enough blocks for dividing them to free memory."""
PRIVATE = {"use_mmap": False}
SHARDED = {"FSDP": True, "FSDP_prefetch": "off"}
STREAMED = {"FSDP": True, "FSDP_CPU_OFFLOAD": True}


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


EVERY = {"map": on(), "private": on(more=PRIVATE), "sharded": on(more=SHARDED), "streamed": on(more=STREAMED)}
WRITTEN = [
    pytest.param("sd3", "safetensors", on(), id="sd3"),
    pytest.param("flux", "Q8_0", on(more=SHARDED), id="flux Q8_0 sharded"),
    pytest.param("sd3", "Q4_K", on(more=STREAMED), id="sd3 Q4_K streamed"),
    *(
        pytest.param(family, kind, where, id=f"{family} {kind} {name}", marks=SLOW)
        for family in ("flux", "sd3", "auraflow")
        for kind in ("safetensors", "Q8_0", "Q4_K")
        for name, where in {**EVERY, "one": on(1)}.items()
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


@pytest.fixture
def wan(server: ComfyServer, comfy_root: Path) -> Path:
    """A Wan with enough blocks for dividing them, in a folder of its own."""
    path = server.models / FOLDER / "whole.safetensors"
    write([Job(family="wan", path=path, size={"layers": 5})], comfy_root=comfy_root, python=Path(sys.executable))
    return path


def wan_case(path: Path) -> Case:
    return Case(file=f"{FOLDER}/{path.name}", inputs=FAMILIES["wan"], sampling="KSampler")


PARTS = [
    pytest.param("safetensors", on(), id="safetensors"),
    pytest.param("Q8_0", on(1), id="Q8_0 on one"),
    *(
        pytest.param(kind, where, id=f"{kind} {name}", marks=SLOW)
        for kind in ("safetensors", "Q8_0", "Q4_K")
        for name, where in {
            "map": on(),
            "one": on(1),
            "private": on(more=PRIVATE),
            "streamed": on(more=STREAMED),
        }.items()
    ),
]


@pytest.mark.parametrize("kind,where", PARTS)
def test_a_model_in_parts(client: ComfyClient, result: Run, wan: Path, kind: str, where: PoolCase) -> None:
    """Whichever part is chosen; and where one is missing, its name."""
    whole = wan
    if kind == "safetensors":
        parts = split(wan, 3, index=where.workers == 1)
    else:
        parts = [wan.with_name(f"wan-{kind}-{number + 1:05}-of-00002.gguf") for number in range(2)]
        for number, part in enumerate(parts):
            _, values = write_gguf(wan, part, kind, part=(number, 2))
        whole = wan.with_name(f"wan-{kind}.safetensors")
        save_file(values, whole)

    def prompt(part: Path) -> Prompt:
        made = pool(wan_case(part), where)
        return made if kind == "safetensors" else with_gguf(made, f"{FOLDER}/{part.name}")

    expected = result(plain(wan_case(whole)))
    assert apart(result(prompt(parts[-1])), expected) <= FP32
    assert apart(result(prompt(parts[0])), expected) <= FP32
    parts[0].unlink()
    with pytest.raises(
        PromptError, match=f"is a part of a model in {len(parts)} files, and {parts[0].name} is missing"
    ):
        client.run(prompt(parts[1]))


def other_dims(key: str, value: torch.Tensor) -> tuple[int, ...] | None:
    """Of a Wan: an unnoted convolution, tables and a vector."""
    if value.ndim == 5:
        return (value.shape[0] * value.shape[1], *value.shape[2:])
    if key.endswith("modulation"):
        return tuple(value.shape[1:])
    return (*value.shape, 1) if key == "head.head.bias" else None


DIMS = [
    pytest.param("Q8_0", "other", on(), id="Q8_0"),
    pytest.param("Q8_0", "noted", on(1), id="Q8_0 noted"),
    *(
        pytest.param(kind, dims, where, id=f"{kind} {dims} {name}", marks=SLOW)
        for kind in ("Q8_0", "Q4_K")
        for dims in ("other", "noted")
        for name, where in {**EVERY, "one": on(1)}.items()
    ),
]


@pytest.mark.parametrize("kind,dims,where", DIMS)
def test_gguf_with_other_dims(result: Run, wan: Path, kind: str, dims: str, where: PoolCase) -> None:
    """The model's values: without a note of their shapes, or with one under a name without the file's prefix."""
    path, same = wan.with_name(f"wan-{kind}-{dims}.gguf"), wan.with_name(f"wan-{kind}-{dims}.safetensors")
    if dims == "other":
        _, values = write_gguf(wan, path, kind, stored=other_dims)
    else:
        _, values = write_gguf(wan, path, kind, prefix="model.diffusion_model.", noted="")
    state = load_file(wan)
    save_file({name: value.reshape(state[name].shape) for name, value in values.items()}, same)
    expected = result(plain(wan_case(same)))
    assert apart(result(with_gguf(pool(wan_case(same), where), f"{FOLDER}/{path.name}")), expected) <= FP32


def test_gguf_with_dims_of_which_none_is_certain(client: ComfyClient, wan: Path) -> None:
    path = wan.with_name("wan-turned.gguf")
    write_gguf(wan, path, "Q8_0", quantised=lambda *_: False, stored=turned)
    shapes = "text_embedding.0.weight is 4096 x 256 in the file and 256 x 4096 in the model"
    with pytest.raises(PromptError, match=f"wan-turned.gguf has tensors in other shapes .* {shapes}"):
        client.run(with_gguf(pool(wan_case(path), on()), f"{FOLDER}/{path.name}"))


def turned(key: str, value: torch.Tensor) -> tuple[int, ...] | None:
    return tuple(value.shape[::-1]) if key == "text_embedding.0.weight" else None


@pytest.mark.skipif(not LARGE, reason=WHY)
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_gguf_with_pads_of_one_dim(server: ComfyServer, result: Run, kind: str) -> None:
    """Z-Image's padding tokens without their leading 1."""
    folder = server.models / FOLDER
    folder.mkdir(exist_ok=True)
    path, same = folder / f"zimage-{kind}.gguf", folder / f"zimage-{kind}.safetensors"
    pads = {"x_pad_token", "cap_pad_token"}
    _, values = write_gguf(
        server.models / "zimage.safetensors",
        path,
        kind,
        stored=lambda key, value: (value.numel(),) if key in pads else None,
    )
    save_file({k: v.to(torch.float16) if kind == "F16" else v for k, v in values.items()}, same)
    case = Case(file=f"{FOLDER}/{same.name}", inputs=FAMILIES["zimage"], cfg=1.0, sampling="KSampler")
    expected = result(plain(case))
    assert apart(result(with_gguf(pool(case, on()), f"{FOLDER}/{path.name}")), expected) <= FP32
    for file in (path, same):
        file.unlink()
