"""HunyuanVideo, 1.5, HunyuanImage 2.1 and its refiner; Hunyuan3D 2 and 2.1; HunyuanDiT."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy_raylight.raylight.cuts import Rope
from comfy_raylight.raylight.layout import Layout
from comfy_raylight.raylight.plan import Part, Plan, Region

from ..case import CHOOSES_BLOCK, EVERY, Case, Inputs, build, override, patched, random, run_original, skip, without
from .changes import sharpened, without_whole
from .flux import FEW, across, both, calls, ends, guide, residuals, without_patches


def hunyuan(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=16, hidden_size=60, num_heads=5)
    shape = dict(mlp_ratio=2.0, depth=2, depth_single_blocks=2, axes_dim=[4, 4, 4], theta=256, patch_size=[1, 2, 2])
    rest = dict(qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, meanflow_sum=False)
    vision = dict(use_cond_type_embedding=False, vision_in_dim=None)
    return build("comfy.ldm.hunyuan_video.model.HunyuanVideo", **{**sizes, **shape, **rest, **vision, **more})


def video(batch: int = 1, mask: bool = True, channels: int = 4, **more: Any) -> Inputs:
    if mask:
        more["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    t = torch.linspace(500.0, 250.0, batch)
    more = {"guidance": torch.full((batch,), 6.0), **more}
    return (random(batch, channels, 3, 6, 10), t, random(batch, 7, 16), random(batch, 8)), more


def described(batch: int = 1, channels: int = 4, vision: int = 4, **more: Any) -> Inputs:
    """Of 1.5: two more kinds of text tokens, no pooled text."""
    (x, t, context, _), rest = video(batch, mask=False, channels=channels, **more)
    if vision:
        rest["clip_fea"] = random(batch, vision, 8)
    return (x, t, context), {**rest, "txt_byt5": random(batch, 5, 1472)}


def picture(batch: int = 1, mask: bool = False, **more: Any) -> Inputs:
    (_, t, context, _), rest = video(batch, mask=mask, **more)
    return (random(batch, 4, 5, 7), t, context), rest


def sigmas() -> dict[str, Any]:
    return {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}


def shape3d(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=8, context_in_dim=16, hidden_size=60, mlp_ratio=2.0, num_heads=5)
    return build("comfy.ldm.hunyuan3d.model.Hunyuan3Dv2", **{**sizes, "depth": 2, "depth_single_blocks": 2, **more})


def latents(batch: int = 1, **more: Any) -> Inputs:
    return (random(batch, 8, 17), torch.linspace(0.5, 0.25, batch), random(batch, 9, 16)), more


def shape3d_21(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=8, hidden_size=60, context_dim=16, depth=5, num_heads=5, num_moe_layers=2, num_experts=3)
    path = "comfy.ldm.hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain"
    return build(path, **{**sizes, "guidance_cond_proj_dim": None, **more})


def replaced(*blocks: int, skipped: tuple[int, ...] = ()) -> dict[str, Any]:
    """Replacements that run the original with half of what an earlier block gives, or nothing."""

    def half(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        early = args["skip"]
        return extra["original_block"]({**args, "skip": early if early is None else early * 0.5})

    def nothing(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return args["x"]

    replacements = {("block", index): half for index in blocks} | {("block", index): nothing for index in skipped}
    return {"patches_replace": {"dit": replacements}}


def other_order(plan: Plan) -> Plan:
    """The plan with the order of the other ComfyUI version."""
    (double,), single = plan.regions[0].blocks, plan.regions[1]
    order = double.order[::-1]
    return Plan(Region(replace(double, order=order, shared={**double.shared, "pe": Rope(*order)})), single)


def hydit(**more: Any) -> torch.nn.Module:
    sizes = dict(hidden_size=80, depth=6, num_heads=5, text_states_dim=16, text_states_dim_t5=16)
    model = build("comfy.ldm.hydit.models.HunYuanDiT", **{**sizes, "text_len": 5, "text_len_t5": 7, **more})
    return sharpened(model, "q_norm.weight", "k_norm.weight")


def picture_of_two_texts(batch: int = 1, width: int = 9, **more: Any) -> Inputs:
    masks = {"text_embedding_mask": torch.tensor([[1, 1, 1, 0, 0]]), "text_embedding_mask_t5": torch.ones(1, 7)}
    given = {name: mask.repeat(batch, 1) for name, mask in masks.items()}
    t = torch.linspace(500.0, 250.0, batch)
    return (random(batch, 4, 7, width), t, random(batch, 5, 16)), {
        **given,
        "encoder_hidden_states_t5": random(batch, 7, 16),
        **more,
    }


def other_part(plan: Plan) -> Plan:
    """Cross-attention has the first rank's part of the rope table."""
    (region,) = plan.regions

    def first(value: Any, layout: Layout) -> Any:
        return Rope(dim=0)(value, replace(layout, rank=0))

    parts = tuple(Part(part.at, dict.fromkeys(part.shared, first)) for part in region.parts)
    return Plan(Region(*region.blocks, exit=region.exit, whole=region.whole, parts=parts))


HUNYUAN_ATTN = ("comfy.ldm.flux.layers", "attn1_patch")
hunyuan15 = partial(
    hunyuan, vec_in_dim=None, guidance_embed=False, byt5=True, use_cond_type_embedding=True, vision_in_dim=8
)
upscaler = partial(hunyuan15, in_channels=10, meanflow=True, meanflow_sum=True)
image21 = partial(hunyuan, vec_in_dim=None, patch_size=[1, 1], axes_dim=[6, 6], byt5=True, meanflow=True)
refiner = partial(hunyuan, vec_in_dim=None, in_channels=8, patch_size=[1, 1, 1], meanflow=True)
guided = partial(video, guiding_frame_index=torch.tensor([0.0]))
with_reference = partial(video, ref_latent=random(1, 4, 1, 6, 10))
adds = partial(residuals, 45, 60)
case = partial(Case, family="HunyuanVideo", model=hunyuan, make=video)
case3d = partial(Case, family="Hunyuan3Dv2", model=shape3d, make=latents)
case3d_21 = partial(Case, family="HunYuanDiTPlain", model=shape3d_21, make=partial(latents, 2))
dit = partial(Case, family="HunYuanDiT", model=hydit, make=picture_of_two_texts)
few = partial(case, meshes=FEW)
case3d_few = partial(case3d, meshes=FEW)
wrong = partial(case, base=video, wrong=True, meshes=("u2",))


def refined(**more: Any) -> Inputs:
    (x, t, context, _), rest = video(disable_time_r=True, **more)
    return (torch.cat((x, x * 0.75), 1)[..., :5, :7], t, context), rest


CASES = (
    case(name="hunyuan", modes=EVERY),
    case(name="hunyuan_batch", make=partial(video, batch=2, mask=False)),
    case(name="hunyuan_guided", make=guided, modes=EVERY),
    few(name="hunyuan_i2v", model=partial(hunyuan, in_channels=9), make=partial(guided, channels=9, mask=False)),
    case(name="hunyuan_ref", make=with_reference),
    few(name="hunyuan_ref_guided", make=partial(guided, ref_latent=random(1, 4, 1, 6, 10))),
    case(name="hunyuan_across", make=partial(patched, video, across), needs=HUNYUAN_ATTN),
    few(name="hunyuan_across_guided", make=partial(patched, guided, across), needs=HUNYUAN_ATTN),
    few(
        name="hunyuan_nag",
        make=partial(patched, partial(video, batch=2, mask=False), calls(attn1_output_patch=guide)),
        needs=HUNYUAN_ATTN,
    ),
    case(name="hunyuan_control", make=partial(video, control=adds()), modes=CHOOSES_BLOCK),
    few(name="hunyuan_replace", make=partial(patched, guided, partial(run_original, *both)), modes=CHOOSES_BLOCK),
    case(name="hunyuan_skip", make=partial(patched, video, partial(skip, *ends)), modes=CHOOSES_BLOCK),
    case(name="hunyuan_override", make=partial(patched, video, override), base=video, ring_raises="UnsupportedError"),
    case(name="hunyuan15", model=hunyuan15, make=described),
    few(name="hunyuan15_batch", model=hunyuan15, make=partial(described, batch=2)),
    few(name="hunyuan15_t2v", model=hunyuan15, make=partial(described, vision=0)),
    few(
        name="hunyuan15_upscale",
        model=upscaler,
        make=partial(patched, partial(described, channels=10, disable_time_r=False), sigmas),
    ),
    case(name="hunyuan_image", model=image21, make=partial(patched, picture, sigmas), modes=EVERY),
    few(
        name="hunyuan_image_byt5",
        model=image21,
        make=partial(patched, partial(picture, batch=2, txt_byt5=random(2, 5, 1472)), sigmas),
    ),
    few(name="hunyuan_image_mask", model=image21, make=partial(patched, partial(picture, mask=True), sigmas)),
    few(name="hunyuan_refiner", model=refiner, make=refined),
    case3d(name="hunyuan3d", modes=EVERY),
    case3d_few(name="hunyuan3d_batch", make=partial(latents, batch=2)),
    case3d_few(
        name="hunyuan3d_guidance",
        model=partial(shape3d, guidance_embed=True),
        make=partial(latents, guidance=torch.tensor([5.0])),
    ),
    case3d(name="hunyuan3d_across", make=partial(patched, latents, across), needs=HUNYUAN_ATTN),
    case3d_few(
        name="hunyuan3d_replace", make=partial(patched, latents, partial(run_original, *both)), modes=CHOOSES_BLOCK
    ),
    case3d(name="hunyuan3d_skip", make=partial(patched, latents, partial(skip, *ends)), modes=CHOOSES_BLOCK),
    case3d_21(name="hunyuan3d_21", modes=("trunk", "block", "auto")),
    case3d_21(name="hunyuan3d_21_batch", make=partial(latents, 4)),
    case3d_21(
        name="hunyuan3d_21_replace",
        make=partial(patched, partial(latents, 2), partial(replaced, 0, 3, 4)),
        modes=CHOOSES_BLOCK,
    ),
    case3d_21(
        name="hunyuan3d_21_skip",
        make=partial(patched, partial(latents, 2), partial(replaced, 1, 3, skipped=(0, 4))),
        modes=CHOOSES_BLOCK,
    ),
    # its forward calls no wrappers
    dit(name="hunyuan_dit", modes=tuple(mode for mode in EVERY if mode not in ("wrapped", "kernel"))),
    dit(name="hunyuan_dit_batch", make=partial(picture_of_two_texts, batch=2)),
    dit(
        name="hunyuan_dit_sized",
        model=partial(hydit, size_cond=True, use_style_cond=True),
        make=partial(picture_of_two_texts, image_meta_size=torch.tensor([[8, 8, 7, 9, 0, 1]])),
    ),
    dit(
        name="hunyuan_dit_control",
        make=partial(picture_of_two_texts, control={"output": [random(1, 20, 80), random(1, 20, 80, seed=2)]}),
        modes=CHOOSES_BLOCK,
    ),
    dit(
        name="hunyuan_dit_replace",
        make=partial(patched, picture_of_two_texts, partial(run_original, ("double_block", 0), ("double_block", 4))),
        modes=CHOOSES_BLOCK,
    ),
    dit(
        name="hunyuan_dit_skip",
        make=partial(patched, picture_of_two_texts, partial(skip, ("double_block", 1), ("double_block", 5))),
        modes=CHOOSES_BLOCK,
    ),
    dit(name="no_hunyuan_dit_attention", loud=True, change=without_whole, wrong=True, meshes=("u2",)),
    dit(name="no_hunyuan_dit_part", change=other_part, wrong=True, meshes=("u2",)),
    wrong(name="no_hunyuan_attention", make=partial(video, mask=False), change=partial(without, attention=False)),
    wrong(name="no_hunyuan_rope", loud=True, change=partial(without, shared="pe")),
    wrong(name="hunyuan_other_order", change=other_order),
    wrong(name="no_hunyuan_double_dims", make=guided, change=partial(without, shared="modulation_dims_img")),
    wrong(name="no_hunyuan_single_dims", make=guided, change=partial(without, shared="modulation_dims")),
    wrong(name="no_hunyuan_patches", make=partial(patched, video, across), change=without_patches, needs=HUNYUAN_ATTN),
    case3d(name="no_hunyuan3d_attention", change=partial(without, attention=False), wrong=True, meshes=("u2",)),
    case3d_21(name="no_hunyuan3d_21_attention", change=without_whole, wrong=True, meshes=("u2",)),
)
