"""Qwen-Image, Edit and Layered."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy_raylight.raylight.plan import Plan, Region

from ..case import (
    CHOOSES_BLOCK,
    EVERY,
    TRUNK,
    Case,
    Inputs,
    build,
    override,
    patched,
    random,
    run_original,
    skip,
    without,
)
from .flux import FEW, attend, calls, mix, weights, without_patches


def qwen(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=16, out_channels=4, num_layers=3, attention_head_dim=12, num_attention_heads=5)
    rest = dict(joint_attention_dim=16, axes_dims_rope=(4, 4, 4))
    return build("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel", **{**sizes, **rest, **more})


def image(batch: int = 1, text: int = 7, layers: int = 1, **more: Any) -> Inputs:
    t = torch.linspace(0.5, 0.25, batch)
    return (random(batch, 4, layers, 6, 10), t, random(batch, text, 16)), more


def masked(batch: int = 1, text: int = 7, **more: Any) -> Inputs:
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[0, text * 2 // 3 :] = 0
    return image(batch, text, attention_mask=mask, **more)


def references(method: str = "index", batch: int = 1, **more: Any) -> Inputs:
    refs = [random(batch, 4, 1, 4, 6), random(batch, 4, 1, 6, 3)]
    return masked(batch, ref_latents=refs, ref_latents_method=method, **more)


def residuals() -> dict[str, Any]:
    add = random(1, 15, 60) * 0.1
    return {"input": [add, None, add * 2]}


def slope(data: dict[str, Any]) -> dict[str, Any]:
    """A double_block patch that is different for every token and looks across them."""
    img = data["img"]
    rows, columns = (torch.linspace(-1, 1, n) for n in img.shape[1:])
    return {"img": img * (1 + rows[:, None] * columns) + img.flip(1), "txt": data["txt"] + img.mean(1, keepdim=True)}


def count(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> dict[str, Any]:
    """An attn1_patch that reads the text's mask, whose every element counts."""
    bias = given["attn_mask"].clamp(min=-1)
    return {"v": v * (1 + (bias.cumsum(-1)).std()), "attn_mask": bias}


def count_again(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> dict[str, Any]:
    """An attn1_patch after `count`: the mask that it returned, longer than the text."""
    return {"v": v + given["attn_mask"].sum() * 0.1 * weights(q, k)[:, None, :, None], "attn_mask": q[..., 0]}


def add_text(data: dict[str, Any]) -> dict[str, Any]:
    """A post_input patch that puts tokens before the text."""
    added = data["txt"][:, :3] * 0.5 + data["img"].mean(1, keepdim=True)
    ids = data["txt_ids"][:, :3]
    return {**data, "txt": torch.cat((added, data["txt"]), 1), "txt_ids": torch.cat((ids, data["txt_ids"]), 1)}


def without_patch_mask(plan: Plan) -> Plan:
    """The plan with patches given the mask of a rank's text."""
    (region,) = plan.regions
    return Plan(Region(*(replace(blocks, patch_mask=None) for blocks in region.blocks), exit=region.exit))


QWEN = "comfy.ldm.qwen_image.model"
QWEN_ATTN, QWEN_ZERO, QWEN_POST = (QWEN, "attn1_patch"), (QWEN, "timestep_zero_index"), (QWEN, "post_input")
QWEN_LAYERS = (QWEN, "use_additional_t_cond")
layered = partial(qwen, use_additional_t_cond=True, default_ref_method="negative_index")
timed = partial(references, "index_timestep_zero")
counted = partial(patched, partial(masked, text=10), lambda: {"patches": {"attn1_patch": [count, count_again]}})
both = (("double_block", 0), ("double_block", 2))
case = partial(Case, family="QwenImageTransformer2DModel", model=qwen)
few = partial(case, meshes=FEW)
wrong = partial(case, make=masked, base=masked, wrong=True, meshes=("u2",))

CASES = (
    case(name="qwen", make=image, modes=EVERY),
    case(name="qwen_mask", make=masked, modes=EVERY),
    case(name="qwen_batch", make=partial(masked, batch=2)),
    case(name="qwen_text1", make=partial(image, text=1)),
    case(name="qwen_text3", make=partial(masked, text=3)),
    few(name="qwen_float_mask", make=partial(image, attention_mask=random(1, 7))),
    case(name="qwen_ref", make=references),
    few(name="qwen_ref_offset", make=partial(references, "offset")),
    few(name="qwen_ref_negative", make=partial(references, "negative_index", batch=2)),
    case(name="qwen_timed", make=timed, needs=QWEN_ZERO, modes=EVERY),
    case(name="qwen_timed_batch", make=partial(timed, batch=2), needs=QWEN_ZERO),
    few(
        name="qwen_2511",
        model=partial(qwen, default_ref_method="index_timestep_zero"),
        make=partial(image, ref_latents=[random(1, 4, 1, 4, 6)]),
        needs=QWEN_ZERO,
    ),
    few(name="qwen_layered", model=layered, make=partial(masked, layers=3), needs=QWEN_LAYERS),
    few(
        name="qwen_layered_ref",
        model=layered,
        make=partial(image, layers=3, ref_latents=[random(1, 4, 1, 6, 10)], additional_t_cond=torch.tensor([1])),
        needs=QWEN_LAYERS,
    ),
    case(name="qwen_across", make=partial(patched, references, calls(attn1_patch=mix)), needs=QWEN_ATTN, modes=EVERY),
    case(
        name="qwen_across_mask",
        make=counted,
        needs=QWEN_ATTN,
    ),
    few(name="qwen_attend", make=partial(patched, image, calls(attn1_patch=attend)), needs=QWEN_ATTN),
    few(name="qwen_post_input", make=partial(patched, image, calls(post_input=add_text)), needs=QWEN_POST),
    few(name="qwen_control", make=partial(masked, control=residuals()), modes=CHOOSES_BLOCK),
    case(name="qwen_control_ref", make=partial(references, control=residuals()), modes=CHOOSES_BLOCK),
    case(name="qwen_double_block", make=partial(patched, masked, calls(double_block=slope)), modes=CHOOSES_BLOCK),
    few(
        name="qwen_double_block_timed",
        make=partial(patched, timed, calls(double_block=slope)),
        needs=QWEN_ZERO,
        modes=CHOOSES_BLOCK,
    ),
    few(name="qwen_replace", make=partial(patched, masked, partial(run_original, *both)), modes=CHOOSES_BLOCK),
    case(name="qwen_skip", make=partial(patched, masked, partial(skip, *both)), modes=CHOOSES_BLOCK),
    case(
        name="qwen_override",
        make=partial(patched, masked, override),
        base=masked,
        ring_raises="UnsupportedError",
    ),
    wrong(name="no_qwen_attention", change=partial(without, attention=False)),
    wrong(name="no_qwen_rope", loud=True, change=partial(without, shared="image_rotary_emb")),
    wrong(
        name="no_qwen_mask",
        loud=True,
        change=partial(without, shared="encoder_hidden_states_mask"),
        needs=QWEN_ATTN,
    ),
    wrong(
        name="no_qwen_index",
        make=timed,
        base=timed,
        change=partial(without, shared="timestep_zero_index"),
        needs=QWEN_ZERO,
    ),
    wrong(
        name="no_qwen_patches",
        make=partial(patched, masked, calls(attn1_patch=mix)),
        change=without_patches,
        needs=QWEN_ATTN,
    ),
    wrong(name="no_qwen_patch_mask", make=counted, change=without_patch_mask, needs=QWEN_ATTN),
    wrong(
        name="qwen_wrong_trunk",
        make=partial(patched, masked, calls(double_block=slope)),
        modes=TRUNK,
    ),
)
