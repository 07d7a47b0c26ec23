"""RayModel over HTTP: whatever it chooses equals plain ComfyUI, it says what and why, and it changes with the run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, LOADER, Case, plain
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import FP32

Run = Callable[[Prompt], torch.Tensor]
CARDS = "0,1"
LARGE = {"wan": dict(frames=3, height=64, width=64), "unet": dict(height=96, width=64)}
"""Latents whose exchange costs less than half of what they compute, with links of any kind."""
TINY = {"wan": dict(frames=1, height=4, width=4), "unet": dict(height=8, width=8)}
ALONE, GROUPS, TOKENS = "card [01] alone", "cfg 2 on cards 0, 1", "ulysses 2 on cards 0, 1"


def chosen(case: Case, **more: Any) -> Prompt:
    """A case on RayModel."""
    prompt = plain(case)
    prompt[LOADER] = {"class_type": "RayModel", "inputs": {"model_name": case.file, "gpus": CARDS, **more}}
    return prompt


def told(server: ComfyServer) -> list[str]:
    """What the log says of choices, the last one last."""
    return re.findall(r"\S+ runs on (.*)", server.log())


def case(family: str, latent: dict[str, int], cfg: float, **more: Any) -> Case:
    inputs = dataclasses.replace(FAMILIES[family], **latent)
    return Case(file=f"{family}.safetensors", inputs=inputs, cfg=cfg, steps=2, **more)


@pytest.mark.parametrize("family", ("wan", "unet"))
def test_equals_plain(server: ComfyServer, result: Run, family: str) -> None:
    """One after the other, so that the pool changes from run to run."""
    wanted = [
        (case(family, LARGE[family], 4.0), GROUPS),
        (case(family, TINY[family], 1.0), ALONE),
        (case(family, LARGE[family], 1.0), TOKENS),
        (case(family, LARGE[family], 4.0, seed=9), GROUPS),
    ]
    for each, way in wanted:
        expected = result(plain(each))
        found = result(chosen(each))
        assert expected.isfinite().all() and expected.std() > 1e-3
        assert (found - expected).abs().max() <= FP32 * expected.abs().max()
        assert re.match(way, told(server)[-1]), (way, told(server)[-1])
