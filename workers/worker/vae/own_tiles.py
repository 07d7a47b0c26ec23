"""A VAE that cuts tiles by itself: every rank takes its walk, and the calls of its decoder or encoder are dealt out."""

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
from ...wire.vae_messages import DecodeRequest, EncodeRequest, PartReply, VAEPlan
from ..conversation import Line
from .strips import inline, latent_shape, model_input, output_dtype, watching

DECODERS: Mapping[str, tuple[str, ...]] = MappingProxyType({"MiniMaxH3VideoVAE": ("decoder",)})
"""Classes that decode a video by calls of one part, tile after tile and stretch after stretch in time, each from the
latent alone, and do nothing else but put together what it gives; and the modules of that part, called in turn."""
ENCODERS: Mapping[str, tuple[str, ...]] = MappingProxyType({"MiniMaxH3VideoVAE": ("encoder", "quant_conv")})
"""The same of what they encode."""


class _Calls(nn.Module):
    """Stands in for that part."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(x)


def shape_of(vae: Any, plan: VAEPlan) -> tuple[int, ...]:
    """Shape of the result, of pixels [batch, frames, rows, width, channels]; () where calls are not dealt out.

    ComfyUI may cut a batch by the memory at hand, which ranks need not agree on: there must be one.
    """
    model = vae.first_stage_model
    if type(model).__name__ not in (ENCODERS if plan.encode else DECODERS):
        return ()
    shape = latent_shape(vae, plan)
    if shape[0] != 1 or plan.encode:
        return shape if shape[0] == 1 else ()
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
    parts = DECODERS[type(model).__name__]
    _walker(model, parts, survey.decode).decode(latent, output_buffer=torch.empty(shape, device="meta"))
    owners = deal(survey.costs, comm.size)
    watch = watching(mesh.control, line, len(owners))
    dealer = Dealer(comm, _part(model, parts), survey.tiles, owners, seed=request.seed, watch=watch)
    walker = _walker(model, parts, dealer.decode)
    if comm.rank:
        walker.decode(latent, output_buffer=torch.empty(shape, device="meta"))
        dealer.finish()
        return PartReply(rows=(0, 0), drew=dealer.drew)
    shared = request.output is not None and request.output.arena is not None
    if request.output is not None and shared:
        # pixels have their channels last: this is the same memory as the decoder writes it
        pixels = request.output.open().movedim(-1, 1)
    else:
        pixels = torch.empty(shape, dtype=output_dtype(vae))
    walker.decode(latent, output_buffer=pixels)
    dealer.finish()
    # in place, as ComfyUI calls it
    vae.process_output(pixels)
    line.report(len(owners), len(owners))
    images = pixels.movedim(1, -1)
    return PartReply(rows=(0, images.shape[2]), part=None if shared else inline(images), drew=dealer.drew)


def encode(vae: Any, request: EncodeRequest, mesh: Mesh, line: Line) -> PartReply:
    """Encode this rank's tiles; the first rank puts all of them together, in the reply.

    Pixels stay where ComfyUI leaves them, and no rank keeps more than the tile that it works at.

    Raises:
        Cancelled: the driver wanted it to end.
    """
    model, comm = vae.first_stage_model, mesh.axis("world")
    pixels = vae.process_input(model_input(vae, request.pixels.open())).to(vae.vae_dtype)
    model_management.load_models_gpu([vae.patcher], memory_required=vae.memory_used_encode(pixels.shape, vae.vae_dtype))
    parts, survey = ENCODERS[type(model).__name__], Survey()
    meta = torch.device("meta")
    _walker(model, parts, survey.decode).encode(pixels.to(meta), device=meta)
    owners = deal(survey.costs, comm.size)
    watch = watching(mesh.control, line, len(owners))
    dealer = Dealer(comm, _part(model, parts), (), owners, seed=0, watch=watch)
    latent = _walker(model, parts, dealer.decode).encode(pixels, device=vae.device)
    dealer.finish()
    if comm.rank:
        return PartReply(rows=(0, 0))
    line.report(len(owners), len(owners))
    latent = latent.to(device="cpu", dtype=output_dtype(vae))
    return PartReply(rows=(0, latent.shape[-2]), part=inline(latent))


def _part(model: nn.Module, names: tuple[str, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    return nn.Sequential(*(getattr(model, name) for name in names))


def _walker(model: nn.Module, names: tuple[str, ...], function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The model, for its own walk over tiles, with a function in the place of these modules."""
    walker: Any = copy.copy(model)
    first, *rest = names
    # its own dict: the model itself stays as it is
    walker._modules = {**model._modules, first: _Calls(function), **{name: nn.Identity() for name in rest}}
    return walker
