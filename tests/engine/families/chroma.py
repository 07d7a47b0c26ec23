"""Chroma and Chroma Radiance, on Flux's blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_raylight.patches.flux import FLUX

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
from .flux import FEW, across, both, calls, ends, guide, image_first, regions, residuals, without_patches

SIZES = dict(context_in_dim=16, hidden_size=48, mlp_ratio=2.0, num_heads=3, axes_dim=[4, 6, 6], theta=10000)
REST = dict(depth=3, depth_single_blocks=3, patch_size=2, qkv_bias=True, txt_ids_dims=[], vec_in_dim=None)
GUIDE = dict(in_dim=64, out_dim=48, hidden_dim=32, n_layers=1)


def chroma(mmdit: tuple[int, ...] = (), dit: tuple[int, ...] = (), **more: Any) -> Any:
    path = "comfy.ldm.chroma.model.Chroma"
    model: Any = build(path, **{**SIZES, **REST, **GUIDE, "in_channels": 16, "out_channels": 16, **more})
    model.skip_mmdit, model.skip_dit = list(mmdit), list(dit)
    return model


def radiance(**more: Any) -> torch.nn.Module:
    nerf = dict(nerf_hidden_size=4, nerf_mlp_ratio=2, nerf_depth=2, nerf_max_freqs=2, nerf_tile_size=0)
    rest = dict(in_channels=3, out_channels=3, nerf_final_head_type="conv", nerf_embedder_dtype=None)
    rest |= dict(use_x0=False, use_sequential_txt_ids=False)
    path = "comfy.ldm.chroma_radiance.model.ChromaRadiance"
    return build(path, **{**SIZES, **REST, **GUIDE, **nerf, **rest, **more})


def image(batch: int = 1, channels: int = 4, size: tuple[int, int] = (5, 9), **more: Any) -> Inputs:
    t = torch.linspace(0.5, 0.25, batch)
    return (random(batch, channels, *size), t, random(batch, 7, 16), torch.zeros(batch)), more


pixels = partial(image, channels=3)
tiles = partial(radiance, nerf_tile_size=4)
CHROMA_ATTN = ("comfy.ldm.flux.layers", "attn1_patch")
RADIANCE_X0 = ("comfy.ldm.chroma_radiance.model", "use_x0")
RADIANCE_IDS = ("comfy.ldm.chroma_radiance.model", "use_sequential_txt_ids")
case = partial(Case, family="Chroma", model=chroma, make=image)
pixel_case = partial(Case, family="ChromaRadiance", model=radiance, make=pixels)
few = partial(case, meshes=FEW)
pixel_case_few = partial(pixel_case, meshes=FEW)
wrong = partial(case, base=image, wrong=True, meshes=("u2",))

CASES = (
    case(name="chroma", modes=EVERY),
    case(name="chroma_batch", make=partial(image, batch=2)),
    case(name="chroma_mask", make=partial(image, attention_mask=regions())),
    case(name="chroma_across", make=partial(patched, image, across), needs=CHROMA_ATTN),
    few(
        name="chroma_nag",
        make=partial(patched, partial(image, batch=2), calls(attn1_output_patch=guide)),
        needs=CHROMA_ATTN,
    ),
    case(name="chroma_skips_ends", model=partial(chroma, mmdit=(0,), dit=(2,)), modes=("trunk", "block", "auto")),
    few(name="chroma_skips_all", model=partial(chroma, mmdit=(0, 1, 2), dit=(0,))),
    case(name="chroma_skips_middle", model=partial(chroma, mmdit=(1,), dit=(1,)), modes=("trunk", "block", "auto")),
    case(name="chroma_control", make=partial(image, control=residuals()), modes=CHOOSES_BLOCK),
    few(
        name="chroma_skips_control",
        model=partial(chroma, mmdit=(2,), dit=(0, 1)),
        make=partial(image, control=residuals()),
        modes=CHOOSES_BLOCK,
    ),
    few(name="chroma_replace", make=partial(patched, image, partial(run_original, *both)), modes=CHOOSES_BLOCK),
    case(name="chroma_skip", make=partial(patched, image, partial(skip, *ends)), modes=CHOOSES_BLOCK),
    case(
        name="chroma_override",
        make=partial(patched, image, override),
        base=image,
        ring_raises="UnsupportedError",
    ),
    pixel_case(name="radiance", modes=EVERY),
    pixel_case(name="radiance_batch", make=partial(pixels, batch=2)),
    pixel_case_few(name="radiance_linear", model=partial(radiance, nerf_final_head_type="linear")),
    pixel_case_few(name="radiance_tiles", model=tiles),
    pixel_case(name="radiance_tiles_batch", model=tiles, make=partial(pixels, batch=2)),
    pixel_case_few(
        name="radiance_x0",
        model=partial(radiance, use_x0=True),
        make=partial(pixels, batch=2, size=(6, 10)),
        needs=RADIANCE_X0,
    ),
    pixel_case_few(
        name="radiance_text_ids",
        model=partial(radiance, use_sequential_txt_ids=True),
        make=partial(pixels, batch=2),
        needs=RADIANCE_IDS,
    ),
    pixel_case_few(name="radiance_control", make=partial(pixels, control=residuals()), modes=CHOOSES_BLOCK),
    pixel_case_few(name="radiance_skip", make=partial(patched, pixels, partial(skip, *ends)), modes=CHOOSES_BLOCK),
    wrong(name="no_chroma_attention", change=partial(without, attention=False)),
    wrong(name="no_chroma_rope", loud=True, change=partial(without, shared="pe")),
    wrong(
        name="no_chroma_skips",
        loud=True,
        model=partial(chroma, mmdit=(0,), dit=(2,)),
        change=lambda plan: FLUX,
        modes=TRUNK,
    ),
    pixel_case(name="no_radiance_s", loud=True, change=partial(without, shared="s"), wrong=True, meshes=("u2",)),
    wrong(name="chroma_rope_order", change=image_first),
    wrong(name="no_chroma_patches", change=without_patches, make=partial(patched, image, across), needs=CHROMA_ATTN),
)
