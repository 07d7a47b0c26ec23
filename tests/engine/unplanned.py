"""Classes of ComfyUI that have no written plan, at tiny widths: what finding plans is for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .case import Case, Inputs, build, random

JOY = ("comfy.ldm.joyimage.model", "class JoyImageTransformer3DModel")
LENS = ("comfy.ldm.lens.model", "class LensTransformer2DModel")
MAGE = ("comfy.ldm.mage_flow.model", "class MageFlowTransformer2DModel")
BOOGU = ("comfy.ldm.boogu.model", "class BooguTransformer2DModel")
PIXDIT = ("comfy.ldm.pixeldit.model", "class PixDiT_T2I")
SPLAT = ("comfy.ldm.triposplat.model", "class LatentSeqMMFlowModel")


def joy() -> torch.nn.Module:
    sizes: dict[str, Any] = dict(hidden_size=60, num_attention_heads=5, text_dim=24, num_layers=3)
    return build("comfy.ldm.joyimage.model.JoyImageTransformer3DModel", rope_dim_list=[4, 4, 4], **sizes)


def joy_picture(batch: int = 1, refs: bool = False) -> Inputs:
    more: dict[str, Any] = {"ref_latents": [random(batch, 16, 1, 4, 6)]} if refs else {}
    return (random(batch, 16, 1, 6, 10), torch.linspace(300.0, 600.0, batch), random(batch, 7, 24)), {
        **more,
        "transformer_options": {},
    }


def lens() -> torch.nn.Module:
    sizes: dict[str, Any] = dict(num_layers=3, attention_head_dim=16, num_attention_heads=5, enc_hidden_dim=24)
    rest: dict[str, Any] = dict(in_channels=128, axes_dims_rope=(4, 6, 6), selected_layer_index=(0, 1))
    return build("comfy.ldm.lens.model.LensTransformer2DModel", **sizes, **rest)


def lens_picture(batch: int = 1, masked: bool = False) -> Inputs:
    mask = torch.arange(7)[None] < torch.tensor([[7], [5]])[-batch:] if masked else None
    return (random(batch, 128, 3, 5), torch.linspace(0.3, 0.6, batch), random(batch, 7, 48), mask), {}


def mage() -> torch.nn.Module:
    sizes: dict[str, Any] = dict(num_layers=3, attention_head_dim=16, num_attention_heads=5, joint_attention_dim=24)
    return build("comfy.ldm.mage_flow.model.MageFlowTransformer2DModel", axes_dims_rope=(4, 6, 6), **sizes)


def mage_picture(batch: int = 1, refs: bool = False, masked: bool = False) -> Inputs:
    more: dict[str, Any] = {"ref_latents": [random(batch, 128, 2, 4)]} if refs else {}
    if masked:
        more["attention_mask"] = (torch.arange(7)[None] < torch.tensor([[7], [5]])[-batch:]).long()
    return (random(batch, 128, 3, 5), torch.linspace(0.3, 0.6, batch), random(batch, 7, 24)), more


def boogu() -> torch.nn.Module:
    sizes: dict[str, Any] = dict(hidden_size=60, num_layers=2, num_double_stream_layers=2, num_refiner_layers=1)
    heads: dict[str, Any] = dict(num_attention_heads=5, num_kv_heads=5, multiple_of=16, instruction_feat_dim=24)
    axes: dict[str, Any] = dict(axes_dim_rope=(4, 4, 4), axes_lens=(64, 64, 64))
    return build("comfy.ldm.boogu.model.BooguTransformer2DModel", **sizes, **heads, **axes)


def boogu_picture(batch: int = 1, refs: bool = False) -> Inputs:
    more: dict[str, Any] = {"ref_latents": [random(batch, 16, 4, 6)]} if refs else {}
    return (random(batch, 16, 6, 10), torch.linspace(0.3, 0.6, batch), random(batch, 7, 24), 7), more


def pixdit() -> torch.nn.Module:
    sizes: dict[str, Any] = dict(num_groups=5, hidden_size=80, pixel_hidden_size=8, pixel_attn_hidden_size=64)
    rest: dict[str, Any] = dict(pixel_num_groups=4, patch_depth=3, pixel_depth=1, patch_size=4, txt_embed_dim=24)
    return build("comfy.ldm.pixeldit.model.PixDiT_T2I", **sizes, **rest)


def pixdit_picture(batch: int = 1) -> Inputs:
    return (random(batch, 3, 12, 20), torch.linspace(300.0, 600.0, batch), random(batch, 7, 24)), {}


def splat() -> torch.nn.Module:
    sizes: dict[str, Any] = dict(q_token_length=21, model_channels=64, cond_channels=24, num_blocks=3)
    rest: dict[str, Any] = dict(num_refiner_blocks=1, num_head_channels=16, cond2_channels=8)
    return build("comfy.ldm.triposplat.model.LatentSeqMMFlowModel", **sizes, **rest)


def splat_points(batch: int = 1) -> Inputs:
    latents = [random(batch, 21, 16), random(batch, 1, 5)]
    return (latents, torch.linspace(0.3, 0.6, batch), random(batch, 13, 24), [random(batch, 8, 2, 3)]), {}


MODELS = {
    "JoyImageTransformer3DModel": ("JoyImage", 95),
    "LensTransformer2DModel": ("Lens", 94),
    "MageFlowTransformer2DModel": ("Mage-Flow", 94),
    "BooguTransformer2DModel": ("Boogu-Image", 92),
    "PixDiT_T2I": ("PixelDiT", 77),
    "LatentSeqMMFlowModel": ("TripoSplat", 74),
}
"""What users know them by, and how much of a step of these cases is divided, in percent."""
FIXED = {"LatentSeqMMFlowModel": "the number of its latents is fixed, and too large to try a plan with"}
"""Classes for which a plan is found in these sizes, and not in those of their files."""

joyimage = partial(Case, family="JoyImageTransformer3DModel", model=joy, needs=JOY)
lensed = partial(Case, family="LensTransformer2DModel", model=lens, needs=LENS)
mageflow = partial(Case, family="MageFlowTransformer2DModel", model=mage, needs=MAGE)
boo = partial(Case, family="BooguTransformer2DModel", model=boogu, needs=BOOGU)
pixeldit = partial(Case, family="PixDiT_T2I", model=pixdit, needs=PIXDIT)
triposplat = partial(Case, family="LatentSeqMMFlowModel", model=splat, needs=SPLAT)

CASES = (
    joyimage(name="joyimage", make=joy_picture),
    joyimage(name="joyimage_reference", make=partial(joy_picture, batch=2, refs=True)),
    lensed(name="lens", make=lens_picture),
    lensed(name="lens_masked", make=partial(lens_picture, batch=2, masked=True)),
    mageflow(name="mageflow", make=mage_picture),
    mageflow(name="mageflow_reference", make=partial(mage_picture, refs=True)),
    mageflow(name="mageflow_masked", make=partial(mage_picture, batch=2, masked=True)),
    boo(name="boogu", make=boogu_picture),
    boo(name="boogu_reference", make=partial(boogu_picture, refs=True)),
    pixeldit(name="pixeldit", make=partial(pixdit_picture, batch=2)),
    triposplat(name="triposplat", make=splat_points),
)
