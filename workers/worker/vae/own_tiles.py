"""A VAE that cuts tiles by itself: every rank takes its walk, and the calls of its decoder are dealt out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from comfy import model_management
from torch import nn

from ....raylight.mesh import Mesh
from ....vae.tiles import Dealer, Survey, deal
from ...wire.vae_messages import DecodeRequest, PartReply
from ..conversation import Line
from .strips import inline, output_dtype, watching

PARTS: Mapping[str, str] = MappingProxyType({"MiniMaxH3VideoVAE": "decoder"})
"""Classes that decode a video by calls of one part, tile after tile and stretch after stretch in time, each from the
latent alone, and do nothing else but put together what it gives; and the name of that part."""


class _Calls(nn.Module):
    """Stands in for that part."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(x)


def shape_of(vae: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a decode's result, [batch, frames, rows, width, channels]; () for a VAE whose calls are not dealt out.

    Args:
        shape: of the latent; ComfyUI may cut a batch by the memory at hand, which ranks need not agree on.
    """
    model = vae.first_stage_model
    if type(model).__name__ not in PARTS or shape[0] != 1:
        return ()
    batch, channels, *size = model.decode_output_shape(shape)
    return (batch, *size, channels)


def decode(vae: Any, request: DecodeRequest, mesh: Mesh, line: Line) -> PartReply:
    """Decode this rank's tiles; the first rank puts all of them together, in the shared output or in the reply.

    Raises:
        Cancelled: the driver wanted it to end.
    """
    model, comm = vae.first_stage_model, mesh.axis("world")
    latent = request.latent.open()
    needed = vae.memory_used_decode(latent.shape, vae.vae_dtype)
    model_management.load_models_gpu([vae.patcher], memory_required=needed)
    shape = tuple(model.decode_output_shape(latent.shape))
    latent = latent.to(device=vae.device, dtype=vae.vae_dtype)
    survey = Survey()
    _walk(model, survey.decode, latent, torch.empty(shape, device="meta"))
    owners = deal(survey.costs, comm.size)
    watch = watching(mesh.control, line, len(owners))
    part = getattr(model, PARTS[type(model).__name__])
    dealer = Dealer(comm, part, survey.tiles, owners, seed=request.seed, watch=watch)
    if comm.rank:
        _walk(model, dealer.decode, latent, torch.empty(shape, device="meta"))
        dealer.finish()
        return PartReply(rows=(0, 0), drew=dealer.drew)
    shared = request.output is not None and request.output.arena is not None
    if request.output is not None and shared:
        # pixels have their channels last: this is the same memory as the decoder writes it
        pixels = request.output.open().movedim(-1, 1)
    else:
        pixels = torch.empty(shape, dtype=output_dtype(vae))
    _walk(model, dealer.decode, latent, pixels)
    dealer.finish()
    # in place, as ComfyUI calls it
    vae.process_output(pixels)
    line.report(len(owners), len(owners))
    images = pixels.movedim(1, -1)
    return PartReply(rows=(0, images.shape[2]), part=None if shared else inline(images), drew=dealer.drew)


def _walk(
    model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], latent: torch.Tensor, pixels: torch.Tensor
) -> None:
    """The model's own decode into `pixels` [batch, channels, frames, rows, width], with another part in its place."""
    walker: Any = copy.copy(model)
    # its own dict: the model itself stays as it is
    walker._modules = {**model._modules, PARTS[type(model).__name__]: _Calls(function)}
    walker.decode(latent, output_buffer=pixels)
