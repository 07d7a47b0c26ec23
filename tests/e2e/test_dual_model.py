"""Guidance by two models, one for each prompt, as Ideogram 4 is made for: both on one pool."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import write
from comfy_raylight.tests.host.client import ComfyClient, Prompt
from comfy_raylight.tests.host.prompts import LOADER, Case, PoolCase, plain, pool
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.adapters import write_adapter

from .test_sampling import FP32, latent
from .test_weights import EFFECT, apart

FOLDER = "dual"
LORA = f"{FOLDER}/negative.safetensors"
WAN, IDEOGRAM = (
    dataclasses.replace(families.case(name, folder=FOLDER), sampling="CFGGuider") for name in ("wan", "ideogram4")
)
CFG = PoolCase(workers=2, cfg=2, through_model=True)
ON_TWO = PoolCase(through_model=True)


def other(file: str) -> str:
    return file.replace(".safetensors", "-negative.safetensors")


@pytest.fixture(scope="module")
def files(request: pytest.FixtureRequest, server: ComfyServer, client: ComfyClient, comfy_root: Path) -> Iterator[None]:
    """Two models of each family that is asked for, and a LoRA for Wan."""
    if "DualModelGuider" not in client.object_info():
        pytest.skip("this ComfyUI does not have the guider")
    asked = [item.callspec.params.get("sampling") for item in request.session.items if hasattr(item, "callspec")]
    jobs = []
    for name, sampling in (("wan", WAN), ("ideogram4", IDEOGRAM)):
        if sampling in asked or name == "wan":
            first = families.job(name, server.models / FOLDER)
            jobs += [first, dataclasses.replace(first, path=server.models / other(sampling.file), seed=3)]
    write(jobs, comfy_root=comfy_root, python=Path(sys.executable))
    lora = server.models.parent / "loras" / LORA
    lora.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(server.models / WAN.file, lora, "lora")
    yield
    for job in jobs:
        job.path.unlink()


def guided(prompt: Prompt, *, lora: bool, negative: bool) -> Prompt:
    """The prompt with the guider of two models, a LoRA for the second of them, and with or without a negative text."""
    loader = prompt[LOADER]
    prompt["second"] = {**loader, "inputs": {**loader["inputs"], "unet_name": other(loader["inputs"]["unet_name"])}}
    second: list[Any] = ["second", prompt["guider"]["inputs"]["model"][1]]
    if lora:
        inputs = {"model": second, "lora_name": LORA, "strength_model": 0.7}
        prompt["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        second = ["lora", 0]
    inputs = {"model_negative": second, **prompt["guider"]["inputs"]}
    if not negative:
        del inputs["negative"]
    prompt["guider"] = {"class_type": "DualModelGuider", "inputs": inputs}
    return prompt


CASES = [
    pytest.param(WAN, ON_TWO, True, id="wan and LoRA"),
    pytest.param(WAN, CFG, False, id="wan in groups", marks=SLOW),
    pytest.param(WAN, dataclasses.replace(ON_TWO, workers=3), True, id="wan on 3", marks=SLOW),
    pytest.param(IDEOGRAM, ON_TWO, False, id="ideogram4", marks=SLOW),
]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("sampling,where,lora", CASES)
def test_equals_plain(server: ComfyServer, client: ComfyClient, sampling: Case, where: PoolCase, lora: bool) -> None:
    negative = sampling is WAN

    def run(prompt: Prompt, name: str) -> torch.Tensor:
        client.run(prompt, timeout=600)
        return latent(server, name)

    one = run(plain(dataclasses.replace(sampling, name="one")), "one")
    expected = run(guided(plain(dataclasses.replace(sampling, name="dual")), lora=lora, negative=negative), "dual")
    found = run(guided(pool(dataclasses.replace(sampling, name="pool"), where), lora=lora, negative=negative), "pool")
    assert apart(expected, one) > EFFECT, "the second model does nothing"
    assert apart(found, expected) <= FP32
