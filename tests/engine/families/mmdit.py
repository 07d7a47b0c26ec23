"""Stable Diffusion 3 and 3.5, and AuraFlow."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..case import CHOOSES_BLOCK, EVERY, Case, Inputs, build, override, patched, random, run_original, skip
from .changes import with_sites


def sd3(**more: Any) -> torch.nn.Module:
    text = {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 192}}
    sizes = dict(input_size=None, depth=3, num_blocks=3, mlp_ratio=2.0, adm_in_channels=8, context_embedder_config=text)
    rest = dict(num_patches=64, pos_embed_max_size=8, qk_norm="rms")
    path = "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper"
    model: Any = build(path, **{**sizes, **rest, **more})
    model.pos_embed.copy_(random(1, 64, 192))
    return model


def aura(**more: Any) -> torch.nn.Module:
    sizes = dict(dim=60, n_layers=4, n_double_layers=2, n_heads=5, global_conddim=60, cond_seq_dim=16, max_seq=64)
    return build("comfy.ldm.aura.mmdit.MMDiT", **{**sizes, **more})


def picture(batch: int = 1, text: int = 7, **more: Any) -> Inputs:
    return (random(batch, 4, 6, 10), torch.linspace(400, 600, batch), random(batch, text, 16), random(batch, 8)), more


def plain_picture(batch: int = 1, text: int = 7) -> Inputs:
    (x, t, context, _), more = picture(batch, text)
    return (x, t / 1000, context), more


def residuals() -> dict[str, Any]:
    add = random(1, 15, 192) * 0.1
    return {"output": [add, None, add * 2]}


medium = partial(sd3, x_block_self_attn_layers=[0, 1])
sd3_case = partial(Case, family="OpenAISignatureMMDITWrapper", model=sd3)
aura_case = partial(Case, family="MMDiT", model=aura)
wrong = partial(Case, wrong=True, meshes=("u2",))
unwrapped = tuple(mode for mode in EVERY if mode != "wrapped")
doubles = (("double_block", 0), ("double_block", 2))
both = (("double_block", 0), ("double_block", 1), ("single_block", 0), ("single_block", 3))

CASES = (
    # its forward calls no wrappers
    sd3_case(name="sd3", make=picture, modes=unwrapped),
    sd3_case(name="sd3_batch", make=partial(picture, batch=2)),
    sd3_case(name="sd3_text1", make=partial(picture, text=1)),
    sd3_case(name="sd3_medium", model=medium, make=picture, modes=unwrapped),
    sd3_case(name="sd3_medium_batch", model=medium, make=partial(picture, batch=2)),
    sd3_case(name="sd3_control", make=partial(picture, control=residuals()), modes=CHOOSES_BLOCK),
    sd3_case(name="sd3_medium_control", model=medium, make=partial(picture, control=residuals()), modes=CHOOSES_BLOCK),
    sd3_case(name="sd3_replace", make=partial(patched, picture, partial(run_original, *doubles)), modes=CHOOSES_BLOCK),
    sd3_case(name="sd3_skip", make=partial(patched, picture, partial(skip, *doubles)), modes=CHOOSES_BLOCK),
    sd3_case(
        name="sd3_override", make=partial(patched, picture, override), base=picture, ring_raises="UnsupportedError"
    ),
    wrong(
        name="no_sd3_attention",
        family="OpenAISignatureMMDITWrapper",
        model=sd3,
        make=picture,
        change=with_sites,
    ),
    wrong(
        name="no_sd3_second_attention",
        loud=True,
        family="OpenAISignatureMMDITWrapper",
        model=medium,
        make=picture,
        change=lambda plan: with_sites(plan, ""),
    ),
    aura_case(name="aura", make=plain_picture, modes=EVERY),
    aura_case(name="aura_batch", make=partial(plain_picture, batch=2)),
    aura_case(name="aura_text1", make=partial(plain_picture, text=1)),
    aura_case(name="aura_single", model=partial(aura, n_double_layers=0), make=plain_picture),
    aura_case(
        name="aura_replace", make=partial(patched, plain_picture, partial(run_original, *both)), modes=CHOOSES_BLOCK
    ),
    wrong(
        name="no_aura_attention",
        family="MMDiT",
        model=aura,
        make=plain_picture,
        change=with_sites,
    ),
)
