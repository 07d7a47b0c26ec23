"""Files and LoRAs through ComfyUI's HTTP API: what the Ray nodes load and patch gives plain ComfyUI's latents."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from comfy_raylight.tests.conftest import version_of
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
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
from comfy_raylight.tests.weights.adapters import ADAPTERS, write_adapter
from comfy_raylight.tests.weights.files import write_gguf, write_variant
from safetensors.torch import save_file

from .conftest import Run
from .test_sampling import FP32, latent

EFFECT = 1e-3
"""A LoRA that changes less shows nothing."""
KINDS = ("bf16", "fp16", "mixed", "prefixed", "scaled", "layers")
Chain = Sequence[tuple[str, float]]


def case(file: str, **more: object) -> Case:
    return Case(file=file, inputs=FAMILIES["wan"], **more)  # type: ignore[arg-type]


WAN = case("wan.safetensors")


@pytest.fixture(scope="module")
def loras(server: ComfyServer) -> dict[str, str]:
    """Names of LoRA files by what they are: one of each kind, and two more for other layers."""
    folder = server.models.parent / "loras"
    base = server.models / "wan.safetensors"
    for kind in ADAPTERS:
        write_adapter(base, folder / f"{kind}.safetensors", kind)
    write_adapter(base, folder / "ffn.safetensors", "lora", seed=2, part="ffn")
    save_file({"lora_unet_other.lora_up.weight": torch.ones(4, 4)}, folder / "foreign.safetensors")
    return {path.stem: path.name for path in folder.glob("*.safetensors")}


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.isfinite().all() and expected.std() > 1e-3
    return ((found - expected).abs().max() / expected.abs().max()).item()


def with_stock_loras(prompt: Prompt, chain: Chain, *, output: int = 0) -> Prompt:
    """The prompt with LoraLoaderModelOnly nodes between loader and sampler."""
    model = [LOADER, output]
    for number, (name, strength) in enumerate(chain):
        inputs = {"model": model, "lora_name": name, "strength_model": strength}
        prompt[f"lora{number}"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        model = [f"lora{number}", 0]
    prompt[SAMPLER]["inputs"]["model"] = model
    return prompt


def with_ray_loras(prompt: Prompt, chain: Chain, *, both_ways: bool) -> Prompt:
    """The prompt with Ray LoRA loaders, chained by ray_actors, and by prev_ray_lora as well."""
    actors = [LOADER, 0]
    for number, (name, strength) in enumerate(chain):
        inputs = {"ray_actors": actors, "lora_name": name, "strength_model": strength}
        if both_ways and number:
            inputs["prev_ray_lora"] = [f"lora{number - 1}", 1]
        prompt[f"lora{number}"] = {"class_type": "RayLoraLoaderModelOnly", "inputs": inputs}
        actors = [f"lora{number}", 0]
    prompt[SAMPLER]["inputs"]["ray_actors"] = actors
    return prompt


def with_loader_loras(prompt: Prompt, chain: Chain) -> Prompt:
    """The prompt with a chain of RayLoraLoader into the loader, as files of the earlier pack have it."""
    for number, (name, strength) in enumerate(chain):
        inputs: dict[str, object] = {"lora_name": name, "strength_model": strength}
        if number:
            inputs["prev_ray_lora"] = [f"lora{number - 1}", 0]
        prompt[f"lora{number}"] = {"class_type": "RayLoraLoader", "inputs": inputs}
    prompt[LOADER]["inputs"]["lora"] = [f"lora{len(chain) - 1}", 0]
    return prompt


@pytest.mark.parametrize("kind", KINDS)
def test_file(server: ComfyServer, result: Run, kind: str) -> None:
    path = server.models / f"wan-{kind}.safetensors"
    write_variant(server.models / "wan.safetensors", path, kind)
    sampling = case(path.name)
    assert apart(result(pool(sampling)), result(plain(sampling))) <= FP32


def test_quantised_layout_of_a_newer_comfyui(
    server: ComfyServer, client: ComfyClient, comfy_root: Path, result: Run
) -> None:
    """ComfyUI 0.3.75 loads these without their scales; the pool refuses instead."""
    path = server.models / "wan-comfy_quant.safetensors"
    write_variant(server.models / "wan.safetensors", path, "comfy_quant")
    sampling = case(path.name)
    if "convert_old_quants" in (comfy_root / "comfy" / "utils.py").read_text(encoding="utf-8"):
        assert apart(result(pool(sampling)), result(plain(sampling))) <= FP32
        return
    with pytest.raises(PromptError, match="Update ComfyUI"):
        client.run(pool(sampling))


@pytest.mark.parametrize("values", [{"use_mmap": False}, {"use_fastsafe": True}], ids=str)
def test_reader(result: Run, values: dict[str, bool]) -> None:
    assert apart(result(pool(WAN, PoolCase(more=values))), result(plain(WAN))) <= FP32


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter(result: Run, loras: dict[str, str], kind: str) -> None:
    chain = [(loras[kind], 0.7)]
    expected = result(with_stock_loras(plain(WAN), chain))
    assert apart(expected, result(plain(WAN))) > EFFECT
    assert apart(result(with_ray_loras(pool(WAN), chain, both_ways=False)), expected) <= FP32


CHAINS = [[("lora", 1.0), ("loha", 0.5)], [("loha", 0.5), ("lora", 1.0)], [("ffn", -0.6), ("ffn", -0.6), ("lora", 0.0)]]


@pytest.mark.parametrize("names", CHAINS, ids=str)
def test_chain(result: Run, loras: dict[str, str], names: Chain) -> None:
    """Every way to chain LoRAs gives what chained LoraLoaderModelOnly nodes give."""
    chain = [(loras[name], strength) for name, strength in names]
    expected = result(with_stock_loras(plain(WAN), chain))
    through_model = pool(WAN, PoolCase(through_model=True))
    found = {
        "by ray_actors": with_ray_loras(pool(WAN), chain, both_ways=False),
        "by ray_actors and prev_ray_lora": with_ray_loras(pool(WAN), chain, both_ways=True),
        "into the loader": with_loader_loras(pool(WAN), chain),
        "core's nodes": with_stock_loras(through_model, chain, output=1),
    }
    for name, prompt in found.items():
        assert apart(result(prompt), expected) <= FP32, name


def test_branches_of_one_loader(server: ComfyServer, client: ComfyClient, result: Run, loras: dict[str, str]) -> None:
    """Three samplers in one prompt: two sets of LoRAs and none, each as if it were alone."""
    sets: dict[str, Chain] = {
        "a": [(loras["lora"], 0.8)],
        "b": [(loras["lora"], -0.4), (loras["ffn"], 1.0)],
        "none": [],
    }
    expected = {name: result(with_stock_loras(plain(WAN), chain)) for name, chain in sets.items()}
    prompt = pool(WAN)
    sampler, save = prompt.pop(SAMPLER), prompt.pop(SAVE)
    for name, chain in sets.items():
        actors = [LOADER, 0]
        for number, (file, strength) in enumerate(chain):
            inputs = {"ray_actors": actors, "lora_name": file, "strength_model": strength}
            prompt[f"{name}{number}"] = {"class_type": "RayLoraLoaderModelOnly", "inputs": inputs}
            actors = [f"{name}{number}", 0]
        prompt[f"sampler-{name}"] = {**sampler, "inputs": {**sampler["inputs"], "ray_actors": actors}}
        inputs = {"samples": [f"sampler-{name}", 0], "name": f"branch-{name}"}
        prompt[f"save-{name}"] = {**save, "inputs": inputs}
    client.run(prompt, timeout=400)
    for name, wanted in expected.items():
        assert apart(latent(server, f"branch-{name}"), wanted) <= FP32, name


def test_lora_that_does_not_fit(server: ComfyServer, client: ComfyClient, loras: dict[str, str]) -> None:
    with pytest.raises(PromptError, match="foreign.safetensors does not fit this model") as caught:
        client.run(with_ray_loras(pool(WAN), [(loras["foreign"], 1.0)], both_ways=False))
    assert caught.value.node == "lora0"


def test_lora_that_fits_in_part(server: ComfyServer, result: Run, loras: dict[str, str]) -> None:
    folder = server.models.parent / "loras"
    path = write_adapter(server.models / "wan.safetensors", folder / "part.safetensors", "lora", part="self_attn.q")
    from safetensors.torch import load_file

    tensors = load_file(path)
    save_file({**tensors, "diffusion_model.blocks.99.self_attn.q.lora_A.weight": torch.ones(4, 256)}, path)
    chain = [(path.name, 0.7)]
    assert (
        apart(result(with_ray_loras(pool(WAN), chain, both_ways=False)), result(with_stock_loras(plain(WAN), chain)))
        <= FP32
    )
    assert "LoRA part.safetensors fits in part: 2 weights of the model are patched, 1 of its 7 tensors" in server.log()


def test_lora_file_that_was_replaced(server: ComfyServer, result: Run, loras: dict[str, str]) -> None:
    folder = server.models.parent / "loras"
    first, second = folder / "changing.safetensors", folder / "other.safetensors"
    for seed, path in enumerate((first, second), start=11):
        write_adapter(server.models / "wan.safetensors", path, "lora", seed=seed)
    wanted = result(with_stock_loras(plain(WAN), [(second.name, 0.7)]))
    before = result(with_ray_loras(pool(WAN), [(first.name, 0.7)], both_ways=False))
    assert apart(before, wanted) > EFFECT
    os.replace(second, first)
    assert apart(result(with_ray_loras(pool(WAN), [(first.name, 0.7)], both_ways=False)), wanted) <= FP32


def test_offload_then_sample(server: ComfyServer, result: Run, loras: dict[str, str]) -> None:
    """The node passes the latent through; what is sampled after it is equal bit for bit."""
    for chain in ([], [(loras["lora"], 0.7)]):
        before = result(with_ray_loras(pool(WAN), chain, both_ways=False))
        prompt = with_ray_loras(pool(WAN), chain, both_ways=False)
        actors = prompt[SAMPLER]["inputs"]["ray_actors"]
        prompt["offload"] = {"class_type": "RayOffloadModel", "inputs": {"ray_actors": actors, "latent": [SAMPLER, 0]}}
        prompt[SAVE]["inputs"]["samples"] = ["offload", 0]
        assert torch.equal(result(prompt), before)
        again = with_ray_loras(pool(dataclasses.replace(WAN, end=9999)), chain, both_ways=False)
        assert torch.equal(result(again), before)


def test_two_models_in_one_prompt(server: ComfyServer, client: ComfyClient, comfy_root: Path, result: Run) -> None:
    """High and low noise: one model takes over from the other in the middle of the schedule."""
    other = server.models / "wan-low.safetensors"
    write([Job(family="wan", path=other, seed=3)], comfy_root=comfy_root)
    pictures = []
    for way in (plain, pool):
        prompt = way(case("wan.safetensors", steps=4, end=2, leftover=True))
        second = way(case(other.name, steps=4, start=2, add_noise=False))
        prompt["loader2"] = second[LOADER]
        prompt["sampler2"] = {**second[SAMPLER], "inputs": {**second[SAMPLER]["inputs"], "latent_image": [SAMPLER, 0]}}
        prompt["sampler2"]["inputs"]["model" if way is plain else "ray_actors"] = ["loader2", 0]
        prompt[SAVE]["inputs"]["samples"] = ["sampler2", 0]
        pictures.append(result(prompt))
    assert apart(pictures[1], pictures[0]) <= FP32


def test_file_that_changes_between_prompts(
    server: ComfyServer, client: ComfyClient, comfy_root: Path, result: Run
) -> None:
    """Overwritten in place, replaced, truncated, and good again: never old weights, never a dead pool."""
    path = server.models / "wan-changing.safetensors"
    others = [server.models.parent / f"wan{seed}.safetensors" for seed in (21, 22, 23)]
    write([Job(family="wan", path=file, seed=seed) for seed, file in enumerate(others, 21)], comfy_root=comfy_root)
    sampling = case(path.name)

    def check() -> torch.Tensor:
        found, wanted = result(pool(sampling)), result(plain(sampling))
        assert apart(found, wanted) <= FP32
        return found

    shutil.copy(others[0], path)
    first = check()
    with path.open("r+b") as file:
        file.write(others[1].read_bytes())
    second = check()
    assert apart(second, first) > EFFECT
    os.replace(others[2], path)
    assert apart(check(), second) > EFFECT
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    with pytest.raises(PromptError, match="wan-changing.safetensors"):
        client.run(pool(sampling))
    path.write_bytes(whole)
    check()


GGUF = [
    pytest.param("Q8_0", PoolCase(), id="Q8_0"),
    pytest.param("Q4_K", PoolCase(workers=3), id="Q4_K on 3"),
    pytest.param("Q5_1", PoolCase(ring=2), id="Q5_1 ring"),
    pytest.param("IQ4_XS", PoolCase(cfg=2), id="IQ4_XS cfg"),
]


@pytest.mark.parametrize("kind,where", GGUF)
def test_gguf(server: ComfyServer, result: Run, loras: dict[str, str], kind: str, where: PoolCase) -> None:
    path = server.models / f"wan-{kind}.gguf"
    _, whole = write_gguf(server.models / "wan.safetensors", path, kind)
    same = server.models / f"wan-{kind}-whole.safetensors"
    save_file(whole, same)
    for chain in ([], [(loras["lora"], 0.7), (loras["loha"], 0.4)]):
        expected = result(with_stock_loras(plain(case(same.name)), chain))
        prompt = with_ray_loras(pool(case(same.name), where), chain, both_ways=False)
        assert apart(result(with_gguf(prompt, path.name)), expected) <= FP32


@pytest.mark.parametrize("name", ["hunyuan3d_21", "cogvideox"])
def test_gguf_of_a_model_that_looks_at_dtypes(server: ComfyServer, result: Run, comfy_root: Path, name: str) -> None:
    """Its code casts what it computes to the dtype of a layer, which must not be that of blocks."""
    if name not in families.of_version(version_of(comfy_root)):
        pytest.skip("this ComfyUI does not have it")
    job = families.job(name, server.models / "gguf")
    write([job], comfy_root=comfy_root, python=Path(sys.executable))
    path, same = job.path.with_suffix(".gguf"), job.path.with_name(f"{name}-whole.safetensors")
    _, whole = write_gguf(job.path, path, "Q8_0", quantised=lambda *_: True)
    save_file(whole, same)
    sampling = families.case(name, folder="gguf")
    expected = result(plain(dataclasses.replace(sampling, file=f"gguf/{same.name}")))
    assert apart(result(with_gguf(pool(sampling, PoolCase(through_model=True)), f"gguf/{path.name}")), expected) <= FP32


def test_gguf_of_a_text_encoder(server: ComfyServer, client: ComfyClient) -> None:
    import gguf
    import numpy

    writer = gguf.GGUFWriter(server.models / "encoder.gguf", "t5encoder")
    writer.add_tensor("enc.blk.0.attn_q.weight", numpy.ones((32, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PromptError, match="its architecture is 't5encoder'"):
        client.run(with_gguf(pool(WAN), "encoder.gguf"))
