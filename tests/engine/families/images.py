"""HiDream, OmniGen2, PixArt and ERNIE-Image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..case import CHOOSES_BLOCK, EVERY, Case, Inputs, build, override, patched, random
from .changes import as_first_rank, with_sites, without_whole


def hidream(**more: Any) -> torch.nn.Module:
    sizes = dict(patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=12)
    text = dict(num_attention_heads=5, caption_channels=[16, 20], text_emb_dim=8, llama_layers=[0, 1, 2, 2])
    rest = dict(axes_dims_rope=(4, 4, 4), max_resolution=(16, 16), num_routed_experts=4, num_activated_experts=2)
    return build("comfy.ldm.hidream.model.HiDreamImageTransformer2DModel", **{**sizes, **text, **rest, **more})


def hidream_picture(batch: int = 1, text: int = 7, t5: int = 5, width: int = 10, **more: Any) -> Inputs:
    x, t = random(batch, 4, 6, width), torch.linspace(400, 600, batch)
    return (x, t, random(batch, 8), random(batch, t5, 16)), {
        "encoder_hidden_states_llama3": random(batch, 3, text, 20),
        **more,
    }


def omnigen2(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, hidden_size=60, num_layers=2, num_refiner_layers=2, num_attention_heads=5)
    rest = dict(num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), text_feat_dim=16)
    return build("comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel", **{**sizes, **rest, **more})


def omnigen2_picture(batch: int = 1, text: int = 7, width: int = 10, **more: Any) -> Inputs:
    return (random(batch, 4, 6, width), torch.linspace(0.3, 0.6, batch), random(batch, text, 16), text), more


def pixart(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, hidden_size=60, depth=3, num_heads=5, mlp_ratio=2.0, caption_channels=16)
    return build("comfy.ldm.pixart.pixartms.PixArtMS", **{**sizes, "model_max_length": 7, **more})


def pixart_picture(batch: int = 1) -> Inputs:
    # positions need a side of 64 on average
    return (random(batch, 4, 6, 62), torch.linspace(400, 600, batch), random(batch, 7, 16)), {}


def ernie(**more: Any) -> torch.nn.Module:
    sizes = dict(hidden_size=60, num_attention_heads=5, num_layers=3, ffn_hidden_size=64, in_channels=4)
    rest = dict(out_channels=4, text_in_dim=16, rope_axes_dim=(4, 4, 4))
    return build("comfy.ldm.ernie.model.ErnieImageModel", **{**sizes, **rest, **more})


def ernie_picture(batch: int = 1, text: int = 7) -> Inputs:
    return (random(batch, 4, 3, 5), torch.linspace(400, 600, batch), random(batch, text, 16)), {}


def references(batch: int = 1) -> list[torch.Tensor]:
    return [random(batch, 4, 4, 6), random(batch, 4, 6, 4, seed=2)]


ERNIE = ("comfy.ldm.ernie.model", "")
hidream_case = partial(Case, family="HiDreamImageTransformer2DModel", model=hidream)
omnigen2_case = partial(Case, family="OmniGen2Transformer2DModel", model=omnigen2)
pixart_case = partial(Case, family="PixArtMS", model=pixart)
ernie_case = partial(Case, family="ErnieImageModel", model=ernie, needs=ERNIE)
unwrapped = tuple(mode for mode in EVERY if mode != "wrapped")

CASES = (
    hidream_case(name="hidream", make=hidream_picture, modes=EVERY),
    hidream_case(name="hidream_batch", make=partial(hidream_picture, batch=2)),
    hidream_case(name="hidream_text1", make=partial(hidream_picture, text=1)),
    hidream_case(name="hidream_edit", make=partial(hidream_picture, image_cond=random(1, 4, 6, 10, seed=2))),
    hidream_case(name="hidream_dense", model=partial(hidream, num_routed_experts=0), make=hidream_picture),
    hidream_case(name="hidream_control", make=partial(hidream_picture, control={"output": []}), modes=CHOOSES_BLOCK),
    hidream_case(
        name="hidream_override",
        make=partial(patched, hidream_picture, override),
        base=hidream_picture,
        ring_raises="UnsupportedError",
    ),
    hidream_case(name="no_hidream_attention", make=hidream_picture, change=with_sites, wrong=True, meshes=("u2",)),
    hidream_case(
        name="no_hidream_rope",
        make=partial(hidream_picture, t5=6, width=12),
        change=partial(as_first_rank, name="rope"),
        wrong=True,
        meshes=("u2",),
    ),
    # its forward calls no wrappers
    omnigen2_case(name="omnigen2", make=omnigen2_picture, modes=unwrapped),
    omnigen2_case(name="omnigen2_batch", make=partial(omnigen2_picture, batch=2)),
    omnigen2_case(name="omnigen2_text1", make=partial(omnigen2_picture, text=1)),
    omnigen2_case(name="omnigen2_references", make=partial(omnigen2_picture, ref_latents=references())),
    omnigen2_case(
        name="omnigen2_references_batch", make=partial(omnigen2_picture, batch=2, ref_latents=references(batch=2))
    ),
    omnigen2_case(name="no_omnigen2_attention", make=omnigen2_picture, change=with_sites, wrong=True, meshes=("u2",)),
    omnigen2_case(
        name="no_omnigen2_rope",
        make=partial(omnigen2_picture, text=8, width=12),
        change=partial(as_first_rank, name="image_rotary_emb"),
        wrong=True,
        meshes=("u2",),
    ),
    pixart_case(name="pixart", make=pixart_picture),
    pixart_case(name="pixart_batch", make=partial(pixart_picture, batch=2)),
    pixart_case(name="pixart_norms", model=partial(pixart, qk_norm=True, micro_condition=False), make=pixart_picture),
    pixart_case(name="no_pixart_whole", make=pixart_picture, change=without_whole, wrong=True, meshes=("u2",)),
    ernie_case(name="ernie", make=ernie_picture),
    ernie_case(name="ernie_batch", make=partial(ernie_picture, batch=2)),
    ernie_case(name="no_ernie_whole", loud=True, make=ernie_picture, change=without_whole, wrong=True, meshes=("u2",)),
)
