"""A VAE of ComfyUI's own class from a file, and the attention it gets while several ranks decode."""

from __future__ import annotations

from typing import Any

import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ..raylight.config import ModelSpec
from ..raylight.errors import LoadError


def load_vae(spec: ModelSpec) -> Any:
    """A comfy.sd.VAE with the file's weights.

    Args:
        spec: of a VAE file; its `dtype` is the type to compute in, "" for what ComfyUI chooses for that VAE.

    Raises:
        LoadError: the file changed since the driver looked at it, or ComfyUI finds no VAE in it.
    """
    now = ModelSpec.of(spec.path, dtype=spec.dtype, options=spec.options)
    if now != spec:
        raise LoadError(
            f"{spec.path} changed while it was being loaded", "", "Wait until the file is complete, then try again"
        )
    try:
        state, metadata = comfy.utils.load_torch_file(spec.path, return_metadata=True)
        vae = comfy.sd.VAE(sd=state, metadata=metadata, dtype=getattr(torch, spec.dtype) if spec.dtype else None)
    except Exception as error:  # whatever ComfyUI stumbles over in a file that is something else
        raise LoadError(
            f"{spec.path} cannot be read as a VAE file", f"{type(error).__name__}: {error}", "Choose a VAE file"
        ) from error
    if vae.first_stage_model is None:
        raise LoadError(f"ComfyUI does not recognise a VAE in {spec.path}", "", "Choose a VAE file")
    return vae


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one head over all positions, for more keys than queries.

    Some of ComfyUI's own take the queries' shape for the keys', and its fallback for too little memory does.

    Args:
        q: [batch, channels, ...]; k and v may have more positions.
    """
    batch, channels = q.shape[:2]
    flat = [t.reshape(batch, 1, channels, -1).transpose(2, 3).contiguous() for t in (q, k, v)]
    out = comfy.ops.scaled_dot_product_attention(*flat, attn_mask=None, dropout_p=0.0, is_causal=False)
    return out.transpose(2, 3).reshape(q.shape)
