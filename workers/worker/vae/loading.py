"""A VAE of ComfyUI's own class from a file, and the attention it gets while several ranks decode."""

from __future__ import annotations

import logging
from typing import Any

import comfy.ops
import comfy.sd
import torch

from ....loaders.source import Source
from ....raylight.config import ModelSpec
from ....raylight.errors import LoadError
from ...mapping.adopt import Adopting, homes_of, on_cpu
from ...mapping.loading import normal_tensors
from ...mapping.mapped_patcher import ATTACHMENT, MappedPatcher, Weights

log = logging.getLogger(__name__)


def load_vae(spec: ModelSpec) -> tuple[Any, Source]:
    """A comfy.sd.VAE with the file's weights, mapped where ComfyUI takes them as they are, and the file.

    Args:
        spec: of a VAE file; its `dtype` is the type to compute in, "" for what ComfyUI chooses for that VAE.

    Raises:
        LoadError: the file changed since the driver looked at it, or ComfyUI finds no VAE in it.
    """
    source = Source.of(spec)
    metadata = dict(source.header.metadata) or None
    # on a CPU only what is in the file as ComfyUI computes with it stays the file's memory
    mode = Adopting(source, convert=not on_cpu())
    try:
        with normal_tensors(), mode:
            vae = comfy.sd.VAE(
                sd=dict(source.tensors), metadata=metadata, dtype=getattr(torch, spec.dtype) if spec.dtype else None
            )
    except Exception as error:  # whatever ComfyUI stumbles over in a file that is something else
        raise LoadError(
            f"{spec.path} cannot be read as a VAE file", f"{type(error).__name__}: {error}", "Choose a VAE file"
        ) from error
    if vae.first_stage_model is None:
        raise LoadError(f"ComfyUI does not recognise a VAE in {spec.path}", "", "Choose a VAE file")
    found = vae.patcher
    vae.patcher = MappedPatcher(found.model, found.load_device, found.offload_device)
    vae.patcher.set_attachments(ATTACHMENT, Weights(source, homes_of(found.model, mode.dtype_of)))
    log.debug("%s is loaded as a VAE", spec.path)
    return vae, source


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
