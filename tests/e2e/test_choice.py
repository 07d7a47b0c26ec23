"""RayModel over HTTP: whatever it chooses equals plain ComfyUI, it says what and why, and it changes with the run."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.checkpoints.whole import write_whole
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, LOADER, SAMPLER, Case, Inputs, plain
from comfy_raylight.tests.host.server import ComfyServer
from safetensors.torch import load_file

from .test_sampling import FP32

Run = Callable[[Prompt], torch.Tensor]
CARDS = "0,1"
LARGE: dict[str, dict[str, Any]] = {"wan": dict(frames=3, height=48, width=48), "unet": dict(height=32, width=24)}
LARGE["sdxl"] = LARGE["unet"]
"""Latents whose exchange costs less than half of what they compute, with links of any kind."""
TINY: dict[str, dict[str, Any]] = {"wan": dict(frames=1, height=4, width=4), "unet": dict(height=8, width=8)}
TINY["sdxl"] = TINY["unet"]
INPUTS = {**FAMILIES, "sdxl": Inputs(channels=4, tokens=77, context=2048, pooled=1280)}
OTHER, CONTROL = "wan-other.safetensors", "choice-unet.safetensors"
WHOLE, BARE = "whole.safetensors", "wan.safetensors"
ALONE, GROUPS, TOKENS = "card [01] alone", "cfg 2 on cards 0, 1", "ulysses 2 on cards 0, 1"


def chosen(case: Case, **more: Any) -> Prompt:
    """A case on RayModel."""
    prompt = plain(case)
    prompt[LOADER] = {"class_type": "RayModel", "inputs": {"model_name": case.file, "gpus": CARDS, **more}}
    return prompt


def told(server: ComfyServer) -> list[str]:
    """What the log says of choices, the last one last."""
    return re.findall(r"\S+ runs on (.*)", server.log())


def case(family: str, latent: Mapping[str, Any], cfg: float, **more: Any) -> Case:
    inputs = dataclasses.replace(INPUTS[family], **latent)
    return Case(file=f"{family}.safetensors", inputs=inputs, cfg=cfg, steps=3, **more)


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer, comfy_root: Path) -> None:
    """A UNet of SDXL's kind, and a checkpoint with all of its parts."""
    jobs = [
        Job(family="sdxl", path=server.models / "sdxl.safetensors"),
        Job(family="wan", path=server.models / OTHER, seed=3),
        Job(family="control_unet", path=server.models.parent / "controlnet" / CONTROL, seed=2),
    ]
    write(jobs, comfy_root=comfy_root, python=Path(sys.executable))
    whole = server.models.parent / "checkpoints" / WHOLE
    if not whole.is_file():
        write_whole(server.models / "unet.safetensors", whole, comfy_root=comfy_root)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ("wan", "sdxl"))
def test_equals_plain(server: ComfyServer, result: Run, family: str) -> None:
    """One after the other, so that the pool changes from run to run.

    Which way is best depends on cores and links, which are as slow as the machine is busy when they are measured: the
    tables of tests/engine/test_choose.py say what is chosen for which. Conditions share nothing, and tiny pictures
    never pay.
    """
    shared = f"{TOKENS}|{ALONE}"
    wanted = [
        (case(family, LARGE[family], 4.0), GROUPS),
        (case(family, TINY[family], 1.0), ALONE if family == "wan" else shared),
        (case(family, LARGE[family], 1.0), shared),
        (case(family, LARGE[family], 4.0, seed=9), f"{TOKENS}.*; kept|{GROUPS}"),
    ]
    for each, way in wanted:
        expected = result(plain(each))
        found = result(chosen(each))
        assert expected.isfinite().all() and expected.std() > 1e-3
        assert (found - expected).abs().max() <= FP32 * expected.abs().max()
        assert re.match(way, told(server)[-1]), (way, told(server)[-1])


def test_three_lists_of_conditions(server: ComfyServer, result: Run) -> None:
    each = case("wan", LARGE["wan"], 4.0, sampling="PerpNegGuider")
    expected, found = result(plain(each)), result(chosen(each))
    assert (found - expected).abs().max() <= FP32 * expected.abs().max()
    assert "cards 0, 1" in told(server)[-1]


@pytest.mark.parametrize("cfg", (1.0, 4.0))
def test_merged_models(server: ComfyServer, result: Run, cfg: float) -> None:
    """Two models are on one pool, whichever of them was sampled last."""
    each = case("wan", LARGE["wan"], cfg, seed=11)
    found = []
    for prompt in (plain(each), chosen(each)):
        loader = prompt[LOADER]
        inputs = {name: OTHER if value == each.file else value for name, value in loader["inputs"].items()}
        prompt["other"] = {"class_type": loader["class_type"], "inputs": inputs}
        merge = {"model1": [LOADER, 0], "model2": ["other", 0], "ratio": 0.3}
        prompt["merged"] = {"class_type": "ModelMergeSimple", "inputs": merge}
        prompt[SAMPLER]["inputs"]["model"] = ["merged", 0]
        found.append(result(prompt))
    expected, ours = found
    assert (ours - expected).abs().max() <= FP32 * expected.abs().max()
    assert cfg == 1.0 or "cards 0, 1" in told(server)[-1]


def test_controlnet(server: ComfyServer, result: Run) -> None:
    """A ControlNet on the pool follows the model to the pool that is chosen."""
    found = []
    for cfg in (4.0, 1.0):
        each = case("unet", TINY["unet"] if cfg == 1.0 else LARGE["unet"], cfg, seed=13)
        for prompt in (plain(each), chosen(each)):
            ours = prompt[LOADER]["class_type"] == "RayModel"
            prompt["picture"] = {
                "class_type": "RLTestPixels",
                "inputs": {"frames": 1, "height": 200, "width": 248, "channels": 3, "smooth": True},
            }
            more = {"ray_actors": [LOADER, 3]} if ours else {}
            prompt["control"] = {
                "class_type": "RayControlNetLoader" if ours else "ControlNetLoader",
                "inputs": {"control_net_name": CONTROL, **more},
            }
            given = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "image": ["picture", 0]}
            sampler = prompt[SAMPLER]["inputs"]
            both = {name: sampler[name] for name in ("positive", "negative")}
            prompt["applied"] = {
                "class_type": "ControlNetApplyAdvanced",
                "inputs": {**both, **given, "control_net": ["control", 1 if ours else 0]},
            }
            sampler.update(positive=["applied", 0], negative=["applied", 1])
            found.append(result(prompt))
    for expected, ours in (found[:2], found[2:]):
        assert (ours - expected).abs().max() <= FP32 * expected.abs().max()
    assert any(re.match(GROUPS, line) for line in told(server))


def test_what_workers_refuse_to_share(server: ComfyServer, result: Run) -> None:
    """HyperTile draws random numbers in the model, which two groups would draw alike: one card samples, by itself."""
    tiled = ("HyperTile", {"tile_size": 1, "swap_size": 2, "max_depth": 2, "scale_depth": False})
    each = case("unet", LARGE["unet"], 4.0, sampling="KSampler", model_nodes=(tiled,))
    result(chosen(case("wan", TINY["wan"], 1.0, seed=14)))  # whatever ran before, one card does now
    before = len(told(server))
    expected, found = result(plain(each)), result(chosen(each))
    assert (found - expected).abs().max() <= FP32 * expected.abs().max()
    said = told(server)[before:]
    assert re.match(GROUPS, said[0]) and "it cannot be shared" in said[1] and "random numbers" in said[1]
    # what was refused is not tried again
    again = dataclasses.replace(each, seed=8)
    assert (result(chosen(again)) - result(plain(again))).abs().max() <= FP32 * expected.abs().max()
    assert "it cannot be shared" not in "".join(told(server)[before + 2 :])


def test_report(client: ComfyClient, server: ComfyServer) -> None:
    prompt = chosen(case("wan", TINY["wan"], 4.0, seed=12))
    prompt["report"] = {"class_type": "RayReport", "inputs": {"ray_actors": [LOADER, 3], "latent": [SAMPLER, 0]}}
    text = client.run(prompt, timeout=400).outputs["report"]["text"][0]
    (line,) = re.findall(r"^Chosen: wan\.safetensors runs on (.*)$", text, re.M)
    assert line == told(server)[-1]
    assert "a step predicted" in line and "next best: " in line


def picture(loader: str, **inputs: Any) -> Prompt:
    """A whole workflow: load, prompt, sample, decode, save."""
    texts = {
        name: {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": [LOADER, 1]}}
        for name, text in (("positive", "a red fox in the snow"), ("negative", "blurry"))
    }
    sampler = {"seed": 3, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        LOADER: {"class_type": loader, "inputs": inputs},
        **texts,
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        SAMPLER: {
            "class_type": "KSampler",
            "inputs": {
                **sampler,
                "model": [LOADER, 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
            },
        },
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": [SAMPLER, 0], "vae": [LOADER, 2]}},
        "saved": {"class_type": "RLTestSavePixels", "inputs": {"images": ["decoded", 0], "name": "picture"}},
    }


def test_a_whole_checkpoint(client: ComfyClient, server: ComfyServer) -> None:
    """Text encoder and VAE of one file are those of Load Checkpoint, to the bit, and the latent is plain ComfyUI's."""
    core, ours = picture("CheckpointLoaderSimple", ckpt_name=WHOLE), picture("RayModel", model_name=WHOLE, gpus=CARDS)
    mixed = picture("RayModel", model_name=WHOLE, gpus=CARDS)
    mixed["core"] = core[LOADER]
    mixed[SAMPLER]["inputs"]["model"] = ["core", 0]
    pixels: list[torch.Tensor] = []
    latents: list[torch.Tensor] = []
    for prompt in (core, mixed, ours):
        prompt["latents"] = {"class_type": "RLTestSaveLatent", "inputs": {"samples": [SAMPLER, 0], "name": "latents"}}
        client.run(prompt, timeout=400)
        for name, found in (("picture", pixels), ("latents", latents)):
            saved = server.output / f"{name}.safetensors"
            found.append(next(iter(load_file(saved).values())))
            saved.unlink()
    assert pixels[0].shape == (1, 128, 128, 3) and pixels[0].std() > 1e-3
    assert torch.equal(pixels[0], pixels[1])
    assert (latents[2] - latents[0]).abs().max() <= FP32 * latents[0].abs().max()


@pytest.mark.parametrize("part,node,remedy", ((1, "positive", "Load CLIP"), (2, "decoded", "Load VAE")))
def test_a_part_that_is_not_there(client: ComfyClient, part: int, node: str, remedy: str) -> None:
    prompt = picture("RayModel", model_name=BARE, gpus=CARDS)
    whole = picture("CheckpointLoaderSimple", ckpt_name=WHOLE)
    prompt["whole"] = whole[LOADER]
    prompt[SAMPLER]["inputs"]["model"] = ["whole", 0]
    for other in ("positive", "negative"):
        prompt[other]["inputs"]["clip"] = ["whole", 1] if part == 2 else [LOADER, 1]
    with pytest.raises(PromptError) as failed:
        client.run(prompt, timeout=400)
    assert failed.value.kind == "failed"
    assert re.search(rf"There is no .* in {BARE}.*Add {remedy}", failed.value.text)


BAD = {
    "gpus 7": ({"gpus": "7"}, "gpus names cards that this machine does not have: 7"),
    "gpus x": ({"gpus": "x"}, "gpus is not a list of cards: 'x'"),
    "gpus twice": ({"gpus": "0,0"}, "gpus names a card twice"),
    "gpus -1": ({"gpus": "-1"}, "gpus is not a list of cards"),
    "a text file": ({"model_name": "text.safetensors"}, "text.safetensors"),
    "no such file": ({"model_name": "nothing.safetensors"}, "nothing.safetensors"),
    "no such goal": ({"goal": "fastest"}, "fastest"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(client: ComfyClient, name: str) -> None:
    changes, text = BAD[name]
    with pytest.raises(PromptError, match=re.escape(text)):
        client.run(chosen(case("wan", TINY["wan"], 1.0), **changes), timeout=200)
