"""Lumina Image 2, NewBie and Z-Image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..case import CHOOSES_BLOCK, EVERY, TRUNK, Case, Inputs, build, patched, random, without
from .changes import as_first_rank, with_sites


def lumina(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, dim=60, n_layers=3, n_refiner_layers=2, n_heads=5, n_kv_heads=1, multiple_of=8)
    rest = dict(ffn_dim_multiplier=1.0, qk_norm=True, cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[64, 64, 64])
    return build("comfy.ldm.lumina.model.NextDiT", **{**sizes, **rest, **more})


def zimage(**more: Any) -> torch.nn.Module:
    sizes = dict(dim=260, n_kv_heads=5, axes_dims=[20, 16, 16], z_image_modulation=True, pad_tokens_multiple=8)
    return lumina(**{**sizes, **more})


def pixel_space(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, dim=260, n_layers=3, n_refiner_layers=2, n_heads=5, n_kv_heads=5, multiple_of=8)
    rest = dict(ffn_dim_multiplier=1.0, qk_norm=True, cap_feat_dim=16, axes_dims=[20, 16, 16], axes_lens=[64, 64, 64])
    kind = dict(z_image_modulation=True, pad_tokens_multiple=8, use_x0=True)
    decoder = dict(decoder_hidden_size=32, decoder_num_res_blocks=2, decoder_max_freqs=4)
    return build("comfy.ldm.lumina.model.NextDiTPixelSpace", **{**sizes, **rest, **kind, **decoder, **more})


def sheet(batch: int = 1, text: int = 7, **more: Any) -> Inputs:
    return (random(batch, 4, 6, 10), torch.full((batch,), 0.5), random(batch, text, 16), text), more


def slope(name: str) -> dict[str, Any]:
    def patch(data: dict[str, Any]) -> dict[str, Any]:
        img = data["img"]
        rows, columns = (torch.linspace(-1, 1, n) for n in img.shape[1:])
        return {"img": img * (1 + rows[:, None] * columns), "txt": data["txt"]}

    return {"patches": {name: [patch]}}


LUMINA_PATCH = ("comfy.ldm.lumina.model", '"double_block" in patches')
LUMINA_REFINER = ("comfy.ldm.lumina.model", '"noise_refiner" in patches')
LUMINA_OMNI = ("comfy.ldm.lumina.model", "ref_contexts")
LUMINA_CLIP = ("comfy.ldm.lumina.model", "clip_text_pooled_proj")
PIXEL_SPACE = ("comfy.ldm.lumina.model", "NextDiTPixelSpace")
omni = partial(sheet, ref_latents=[random(1, 4, 4, 6)], ref_contexts=[random(1, 5, 16), random(1, 6, 16)])
seen = partial(omni, siglip_feats=[random(1, 2, 3, 8)])
# ComfyUI itself fails on a batch with text after the last reference
pair = partial(seen, batch=2, ref_contexts=[random(1, 5, 16)])
newbie = partial(lumina, clip_text_dim=8)
omni_model = partial(zimage, siglip_feat_dim=8)
unwrapped = tuple(mode for mode in EVERY if mode != "wrapped")
pixel_case = partial(Case, family="NextDiTPixelSpace", model=pixel_space, needs=PIXEL_SPACE)
wrong = partial(Case, family="NextDiT", wrong=True, meshes=("u2",))

CASES = (
    Case(name="lumina2", family="NextDiT", model=lumina, make=sheet, modes=EVERY),
    Case(name="lumina2_batch", family="NextDiT", model=lumina, make=partial(sheet, batch=2)),
    Case(name="zimage", family="NextDiT", model=zimage, make=sheet, modes=EVERY),
    Case(name="zimage_text1", family="NextDiT", model=zimage, make=partial(sheet, text=1)),
    Case(name="zimage_omni", family="NextDiT", model=omni_model, make=omni, needs=LUMINA_OMNI),
    Case(name="zimage_omni_batch", family="NextDiT", model=omni_model, make=pair, needs=LUMINA_OMNI),
    Case(name="zimage_omni_seen", family="NextDiT", model=omni_model, make=seen, needs=LUMINA_OMNI),
    Case(
        name="newbie",
        family="NextDiT",
        model=newbie,
        make=partial(sheet, batch=2, clip_text_pooled=random(2, 8)),
        needs=LUMINA_CLIP,
    ),
    Case(name="newbie_no_clip", family="NextDiT", model=newbie, make=sheet, needs=LUMINA_CLIP),
    # what is around its forward below the wrappers is not the model
    pixel_case(name="pixel_space", make=sheet, modes=unwrapped),
    pixel_case(name="pixel_space_batch", make=partial(sheet, batch=2)),
    pixel_case(name="pixel_space_omni", model=partial(pixel_space, siglip_feat_dim=8), make=pair),
    pixel_case(
        name="pixel_space_double_block",
        make=partial(patched, sheet, partial(slope, "double_block")),
        modes=CHOOSES_BLOCK,
    ),
    pixel_case(name="no_pixel_space_attention", make=sheet, change=with_sites, wrong=True, meshes=("u2",)),
    wrong(name="no_lumina_attention", model=lumina, make=sheet, change=with_sites),
    wrong(name="no_zimage_rope", model=zimage, make=sheet, change=partial(as_first_rank, name="freqs_cis")),
    wrong(
        name="no_zimage_omni_index",
        model=omni_model,
        make=omni,
        change=partial(without, shared="timestep_zero_index"),
        needs=LUMINA_OMNI,
    ),
    Case(
        name="zimage_double_block",
        family="NextDiT",
        model=zimage,
        make=partial(patched, sheet, partial(slope, "double_block")),
        modes=CHOOSES_BLOCK,
        needs=LUMINA_PATCH,
    ),
    Case(
        name="zimage_noise_refiner",
        family="NextDiT",
        model=zimage,
        make=partial(patched, sheet, partial(slope, "noise_refiner")),
        modes=CHOOSES_BLOCK,
        needs=LUMINA_REFINER,
    ),
    Case(
        name="zimage_wrong_trunk",
        family="NextDiT",
        model=zimage,
        make=partial(patched, sheet, partial(slope, "double_block")),
        base=sheet,
        modes=TRUNK,
        needs=LUMINA_PATCH,
        wrong=True,
        meshes=("u2",),
    ),
)
