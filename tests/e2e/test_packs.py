"""Nodes of other packs that reach into the model: their code runs on the workers, or is refused by name."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host.checkpoints import Job, lora, write
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, Case, PoolCase, plain, pool, with_gguf
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.files import write_gguf
from safetensors.torch import save_file

from .test_residency import SIZE
from .test_sampling import FP32, both, latent

LORA = "inside.safetensors"
DEEP = "inside-deep.safetensors"


def case(*ways: str, with_lora: bool = False, file: str = "wan.safetensors") -> Case:
    first = (("LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": 1.0}),) if with_lora else ()
    nodes = (*first, *(("RLTestInside", {"how": how}) for how in ways))
    return Case(file=file, inputs=FAMILIES["wan"], model_nodes=nodes)


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer, comfy_root: Path) -> None:
    """A LoRA, and a model of enough blocks for dividing their weights to free memory."""
    deep = Job(family="wan", path=server.models / DEEP, size=SIZE)
    write([deep], comfy_root=comfy_root, python=Path(sys.executable))
    lora(server.models / "wan.safetensors", server.base / "models" / "loras" / LORA)


@pytest.mark.parametrize(
    "sampling,where",
    [
        pytest.param(case("louder", with_lora=True), PoolCase(through_model=True), id="louder"),
        pytest.param(case("reminded"), PoolCase(through_model=True), id="reminded"),
        pytest.param(case("moved"), PoolCase(through_model=True), id="moved"),
        pytest.param(case("rounded"), PoolCase(through_model=True), id="torch's settings"),
        pytest.param(case("louder", "reminded"), PoolCase(workers=3, through_model=True), id="both on 3", marks=SLOW),
        pytest.param(case("louder"), PoolCase(ring=2, through_model=True), id="louder, ring", marks=SLOW),
        pytest.param(
            case("louder", "reminded", file=DEEP),
            PoolCase(through_model=True, more={"FSDP": True, "FSDP_CPU_OFFLOAD": True}),
            id="both, streamed",
            marks=SLOW,
        ),
        pytest.param(case("mixing"), PoolCase(workers=1, through_model=True), id="mixing on one", marks=SLOW),
        pytest.param(case("mixing"), PoolCase(cfg=2, through_model=True), id="mixing by cfg"),
    ],
)
def test_code_inside_equals_plain(server: ComfyServer, client: ComfyClient, sampling: Case, where: PoolCase) -> None:
    difference, _, _ = both(server, client, sampling, where)
    assert difference <= FP32
    client.run(plain(dataclasses.replace(sampling, model_nodes=(), name="bare")))
    client.run(plain(dataclasses.replace(sampling, name="patched")))
    bare, patched = latent(server, "bare"), latent(server, "patched")
    assert (bare - patched).abs().max() > 1e-3 * bare.abs().max(), "the node does nothing"


def test_layers_of_a_quantised_file(server: ComfyServer, client: ComfyClient) -> None:
    """A node calls them in ComfyUI's process; plain ComfyUI has their weights as they dequantise."""
    path = server.models / "inside.gguf"
    _, whole = write_gguf(server.models / "wan.safetensors", path, "Q8_0", quantised=lambda name, _: "text_emb" in name)
    save_file(whole, server.models / "inside-whole.safetensors")
    client.run(plain(dataclasses.replace(case("reminded", file="inside-whole.safetensors"), name="plain")))
    prompt = pool(dataclasses.replace(case("reminded"), name="pool"), PoolCase(through_model=True))
    client.run(with_gguf(prompt, path.name))
    expected, found = latent(server, "plain"), latent(server, "pool")
    assert (expected - found).abs().max() <= FP32 * expected.abs().max()


@pytest.mark.parametrize(
    "how, message",
    [
        ("mixing", "mixing.*cannot be used with a model whose tokens are divided.*differs by.*cfg_degree"),
        ("reclassed", "Other.*cannot be used with a model on the Raylight pool.*__class__"),
        ("replaced", "louder.*cannot be used with a model on the Raylight pool.*forward_orig"),
        (
            "whole",
            "Identity.*cannot be used with a model on the Raylight pool.*place of diffusion_model, half of which",
        ),
        ("assigned", "louder.*cannot be used with a model on the Raylight pool.*ffn.forward"),
        ("wrapped", r"A node that replaces blocks\.0\.ffn cannot be used with a model on the Raylight pool"),
        ("written", r"A node that replaces blocks\.0\.ffn\.0\.weight cannot be used"),
        ("data written", r"A node that replaces blocks\.0\.ffn\.0\.weight cannot be used"),
        ("data set", r"A node that replaces blocks\.0\.ffn\.0\.weight cannot be used"),
        ("copied", "cannot be copied with its weights"),
    ],
)
def test_code_that_cannot_run_is_refused(server: ComfyServer, client: ComfyClient, how: str, message: str) -> None:
    where = PoolCase(through_model=True)
    for _ in range(2):
        with pytest.raises(PromptError, match=message):
            client.run(pool(case(how), where))
    client.free()  # what was assigned stays in the model that ComfyUI keeps
    difference, _, _ = both(server, client, case(), where)
    assert difference <= FP32
