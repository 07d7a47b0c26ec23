"""RayTeaCache through ComfyUI: what it leaves out, and that the number of workers does not matter to it."""

from __future__ import annotations

import re
from typing import Any

import torch
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.prompts import FAMILIES, LOADER, SAMPLER, Case, PoolCase, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import latent

WIDGETS = {"warmup_percent": 0.1, "retention_interval": 3, "start_percent": 0.1, "end_percent": 0.9}
STEPS = 10


def sampled(server: ComfyServer, client: ComfyClient, name: str, workers: int, **widgets: Any) -> torch.Tensor:
    case = Case(file="wan.safetensors", inputs=FAMILIES["wan"], steps=STEPS, name=name)
    prompt = pool(case, PoolCase(workers=workers))
    if widgets:
        inputs = {"ray_actors": [LOADER, 0], **WIDGETS, **widgets}
        prompt["tea"] = {"class_type": "RayTeaCache", "inputs": inputs}
        prompt[SAMPLER]["inputs"]["ray_actors"] = ["tea", 0]
    client.run(prompt)
    return latent(server, name)


def test_some_evaluations_are_left_out(server: ComfyServer, client: ComfyClient) -> None:
    before = len(server.log())
    two = sampled(server, client, "tea2", 2, threshold=0.5)
    one = sampled(server, client, "tea1", 1, threshold=0.5)
    plain = sampled(server, client, "tea0", 1)
    told = re.findall(r"TeaCache: (\d+) of (\d+) evaluations", server.log()[before:])
    assert len(told) == 2 and told[0] == told[1]
    left_out, evaluations = map(int, told[0])
    assert evaluations == STEPS and 2 <= left_out <= STEPS - 3
    assert (one - two).abs().max() <= 1e-5 * one.abs().max()
    assert (one - plain).abs().max() > 1e-3 * plain.abs().max()
