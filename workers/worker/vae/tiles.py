"""ComfyUI's own tiled decode, walked by every rank, its tiles dealt out."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch

from ....raylight.mesh import Mesh
from ....vae.tiles import Dealer, Survey, deal
from ...wire.vae_messages import DecodeRequest, PartReply, TileSizes
from ..conversation import Line
from .strips import inline, watching


def decode(vae: Any, request: DecodeRequest, mesh: Mesh, line: Line) -> PartReply:
    """Decode this rank's tiles; the first rank blends all of them into the shared output, or into the reply.

    Raises:
        Cancelled: the driver wanted it to end.
    """
    latent, comm = request.latent.open(), mesh.axis("world")
    if vae.latent_dim == 2 and latent.ndim == 5:
        latent = latent[:, :, 0]
    assert request.tiles is not None
    survey = Survey()
    _walk(vae, survey, latent, request.tiles, torch.device("meta"))
    owners = deal(survey.costs, comm.size)
    watch = watching(mesh.control, line, len(owners))
    dealer = Dealer(comm, vae.first_stage_model.decode, survey.tiles, owners, seed=request.seed, watch=watch)
    first = comm.rank == 0
    images = _walk(vae, dealer, latent, request.tiles, vae.output_device if first else torch.device("meta"))
    dealer.finish()
    if not first:
        return PartReply(rows=(0, 0), drew=dealer.drew)
    line.report(len(owners), len(owners))
    if request.output is None or request.output.arena is None:
        return PartReply(rows=(0, images.shape[1]), part=inline(images.cpu()), drew=dealer.drew)
    # a frame at a time, so that a conversion needs no second copy of all
    for source, target in zip(images, request.output.open().view(images.shape), strict=True):
        target.copy_(source)
    return PartReply(rows=(0, images.shape[1]), drew=dealer.drew)


def shape_of(vae: Any, shape: tuple[int, ...], tiles: TileSizes) -> tuple[int, ...]:
    """Shape of a tiled decode's result, [frames, rows, width, channels]; nothing is decoded."""
    latent = torch.empty(shape, device="meta")
    return tuple(_walk(vae, Survey(), latent, tiles, torch.device("meta")).shape)


def _walk(vae: Any, decoder: Any, latent: torch.Tensor, tiles: TileSizes, device: torch.device) -> torch.Tensor:
    """What ComfyUI's VAEDecodeTiled makes of a latent with another decoder.

    Args:
        device: where its tiles are blended.
    """
    stand_in = copy.copy(vae)
    stand_in.first_stage_model = decoder
    stand_in.output_device = device
    if latent.is_meta:
        stand_in.device = latent.device
    node = importlib.import_module("nodes").VAEDecodeTiled()
    images: torch.Tensor = node.decode(
        stand_in,
        {"samples": latent},
        tile_size=tiles.size,
        overlap=tiles.overlap,
        temporal_size=tiles.frames,
        temporal_overlap=tiles.frame_overlap,
    )[0]
    return images
