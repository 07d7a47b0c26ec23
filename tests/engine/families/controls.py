"""ControlNets that the ranks of a sequence share: what they return are the residuals."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch

from ..case import Case, Inputs, build, random
from . import flux, mmdit, qwen

PLAIN = ("auto",)


def flux_control(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, vec_in_dim=8, context_in_dim=16, hidden_size=48, num_heads=3, patch_size=2)
    shape = dict(mlp_ratio=2.0, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000)
    rest = dict(qkv_bias=True, guidance_embed=True, out_channels=4, latent_input=True)
    later: dict[str, Any] = dict(txt_ids_dims=[]) if "txt_ids_dims" in _flux_parameters() else {}
    return build("comfy.ldm.flux.controlnet.ControlNetFlux", {**sizes, **shape, **rest, **later, **more})


def _flux_parameters() -> set[str]:
    from comfy.ldm.flux.model import FluxParams

    return {field.name for field in fields(FluxParams)}


def qwen_control() -> torch.nn.Module:
    sizes = dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=5)
    rest = dict(joint_attention_dim=16, axes_dims_rope=(4, 4, 4))
    return build("comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel", {**sizes, **rest})


def sd3_control() -> torch.nn.Module:
    text = {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 192}}
    sizes = dict(input_size=None, depth=3, mlp_ratio=2.0, adm_in_channels=8, context_embedder_config=text)
    rest = dict(num_patches=64, pos_embed_max_size=8, qk_norm="rms", in_channels=4)
    model: Any = build("comfy.cldm.mmdit.ControlNet", {**sizes, **rest}, num_blocks=2, control_latent_channels=4)
    model.pos_embed.copy_(random(1, 64, 192))
    return model


def named(inputs: Inputs, *names: str, hint: torch.Tensor) -> Inputs:
    """As ComfyUI calls them: everything by name."""
    args, more = inputs
    return (), {**dict(zip(names, args, strict=False)), **more, "hint": hint}


def flux_inputs(batch: int = 1) -> Inputs:
    size = (6, 10)
    names = ("x", "timesteps", "context", "y", "guidance")
    return named(flux.image(batch, size=size), *names, hint=random(batch, 4, *size, seed=3))


def qwen_inputs(batch: int = 1) -> Inputs:
    return named(qwen.image(batch), "x", "timesteps", "context", hint=random(batch, 4, 1, 6, 10, seed=3))


def sd3_inputs(batch: int = 1) -> Inputs:
    return named(mmdit.picture(batch), "x", "timesteps", "context", "y", hint=random(batch, 4, 6, 10, seed=3))


case = partial(Case, modes=PLAIN)

CASES = (
    case(name="control_flux", family="ControlNetFlux", model=flux_control, make=flux_inputs),
    case(
        name="control_flux_batch",
        family="ControlNetFlux",
        model=partial(flux_control, depth_single_blocks=0),
        make=partial(flux_inputs, 3),
        meshes=("u2", "u2r2"),
    ),
    case(name="control_qwen", family="QwenImageControlNetModel", model=qwen_control, make=qwen_inputs),
    case(name="control_sd3", family="ControlNet", model=sd3_control, make=sd3_inputs),
)
