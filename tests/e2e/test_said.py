"""What ComfyUI's code says on the workers while it loads and patches: in ComfyUI's log, once, as in plain ComfyUI."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, LOADER, SAMPLER, Case, PoolCase, plain, pool, with_gguf
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.adapters import write_adapter
from comfy_raylight.tests.weights.files import write_gguf
from safetensors.torch import load_file, save_file

from .test_residency import SHARDED, SIZE, STREAMED
from .test_weights import with_ray_loras, with_stock_loras

FILE, WIDER, HALF = "said.safetensors", "said-wider.safetensors", "said-half.safetensors"
SAMPLING = Case(file=FILE, inputs=FAMILIES["wan"])
BLOCKS = SIZE["layers"]
MISFIT = r"ERROR lora diffusion_model\.blocks\.\d+\.self_attn\.k\.weight .*"


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer, comfy_root: Path) -> None:
    """A model, a LoRA whose names fit and whose shapes do not, and one of which half fits."""
    base, folder = server.models / FILE, server.base / "models" / "loras"
    other = server.base / "wider.safetensors"
    jobs = [Job(family="wan", path=base, size=SIZE), Job(family="wan", path=other, size={**SIZE, "dim": 256})]
    write(jobs, comfy_root=comfy_root, python=Path(sys.executable))
    wider = load_file(write_adapter(other, folder / WIDER, "lora", part="self_attn.k"))
    fitting = load_file(write_adapter(base, folder / HALF, "lora", part="self_attn.q"))
    save_file(wider | fitting, folder / HALF)


def said(server: ComfyServer, client: ComfyClient, prompt: Prompt, pattern: str) -> Counter[str]:
    """How often the log has each line that matches, because of a prompt."""
    before = len(server.log())
    client.run(prompt, timeout=400)
    return Counter(re.findall(pattern, server.log()[before:]))


@pytest.fixture(scope="module")
def expected(server: ComfyServer, client: ComfyClient) -> Counter[str]:
    """What plain ComfyUI says of the LoRA that fits in part, when it patches the model."""
    found = said(server, client, with_stock_loras(plain(SAMPLING), [(HALF, 0.6)]), MISFIT)
    assert len(found) == BLOCKS and set(found.values()) == {1}
    return found


WHERE = [
    pytest.param(PoolCase(), "", id="resident"),
    pytest.param(PoolCase(workers=1), "", id="on one", marks=SLOW),
    pytest.param(PoolCase(cfg=2), "", id="cfg", marks=SLOW),
    pytest.param(PoolCase(more=SHARDED), "", id="sharded", marks=SLOW),
    pytest.param(PoolCase(more=STREAMED), "", id="streamed"),
    pytest.param(PoolCase(), "Q8_0", id="Q8_0", marks=SLOW),
    pytest.param(PoolCase(more=SHARDED), "Q8_0", id="Q8_0 sharded", marks=SLOW),
]


@pytest.mark.parametrize("where,quant", WHERE)
def test_patches_that_do_not_fit(
    server: ComfyServer, client: ComfyClient, expected: Counter[str], where: PoolCase, quant: str
) -> None:
    """Core's node: each weight's line as in plain ComfyUI, whoever says it how often; the report has their number."""

    def pooled(seed: int) -> Prompt:
        prompt = pool(dataclasses.replace(SAMPLING, seed=seed), dataclasses.replace(where, through_model=True))
        prompt = with_stock_loras(prompt, [(HALF, 0.6)], output=1)
        return with_gguf(prompt, f"said-{quant}.gguf") if quant else prompt

    if quant:
        write_gguf(server.models / FILE, server.models / f"said-{quant}.gguf", quant)
    prompt = pooled(7)
    prompt["report"] = {"class_type": "RayReport", "inputs": {"ray_actors": [LOADER, 0], "latent": [SAMPLER, 0]}}
    before = len(server.log())
    text = client.run(prompt, timeout=400).outputs["report"]["text"][0]
    assert Counter(re.findall(MISFIT, server.log()[before:])) == expected
    name = f"said-{quant}.gguf" if quant else FILE
    counts = re.findall(rf"{re.escape(name)} .* (\d+) warnings of ComfyUI's code", text)
    assert counts == [str(BLOCKS)] * where.workers
    assert said(server, client, pooled(8), MISFIT) == Counter(), "the patches are there already"


def test_nothing_that_fits(server: ComfyServer, client: ComfyClient) -> None:
    with pytest.raises(PromptError, match="said-wider.safetensors does not fit.*other shapes: ERROR lora") as caught:
        client.run(with_ray_loras(pool(SAMPLING), [(WIDER, 1.0)], both_ways=False))
    assert caught.value.node == "lora0"
    prompt = with_ray_loras(pool(SAMPLING), [(HALF, 1.0)], both_ways=False)
    half = r"said-half.safetensors fits in part: 6 weights of the model are patched.* and 6 patches do not fit.*"
    assert sum(said(server, client, prompt, half).values()) == 1


def test_patches_of_an_unknown_kind(server: ComfyServer, client: ComfyClient) -> None:
    line = r"patch type not recognized strange diffusion_model\..*"
    sampling = dataclasses.replace(SAMPLING, model_nodes=(("RLTestInside", {"how": "strange"}),))
    expected = said(server, client, plain(sampling), line)
    assert len(expected) == BLOCKS
    assert said(server, client, pool(sampling, PoolCase(through_model=True)), line) == expected


def test_keys_that_are_not_used(server: ComfyServer, client: ComfyClient) -> None:
    """Of a file: ComfyUI's process and the workers load it."""
    path, line = server.models / "said-more.safetensors", r"unet unexpected: .*nobody.*"
    save_file({**load_file(server.models / FILE), "blocks.0.nobody.weight": torch.ones(4, 4)}, path)
    sampling = dataclasses.replace(SAMPLING, file=path.name)
    expected = said(server, client, plain(sampling), line)
    assert sum(expected.values()) == 1
    assert said(server, client, pool(sampling), line) == expected
