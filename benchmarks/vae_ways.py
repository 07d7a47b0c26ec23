"""The two ways to decode on several ranks, for benchmarks on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FORMULA = (4, 8, 8)
"""Frames and pixels per latent's, of Wan."""
TILE, OVERLAP = 16, 4
"""Of a tile in the latent: 128 pixels, 32 of them shared with the next one."""


class Ways:
    """Decodes a latent of Wan's on the ranks of a mesh, by the code that workers run.

    Args:
        latent: [batch, channels, frames, rows, width], the same on every rank.
        tile: rows and columns of a tile of the latent.
    """

    def __init__(self, mesh: Any, model: Any, latent: Any, *, tile: int = TILE, overlap: int = OVERLAP) -> None:
        from comfy_raylight.raylight.rows.strips import Strips

        self._mesh, self._model, self._latent = mesh, model, latent
        self._tile, self._overlap = tile, overlap
        comm = mesh.axis("world")
        self._strips = Strips.of(latent.shape[-2], ranks=comm.size, rank=comm.rank)

    def strips(self) -> Any:
        """This rank's rows of the pixels."""
        from comfy_raylight.raylight.rows.strips import Rows
        from comfy_raylight.vae.divided import strip_of
        from comfy_raylight.workers.worker.vae.loading import attend

        own = self._strips.own(self._latent).contiguous()
        comm = self._mesh.axis("world")
        if comm.size == 1:
            return self._model.decode(own)
        with strip_of(self._model, Rows(comm, self._strips), attend):
            return self._model.decode(own)

    def tiles(self) -> Any:
        """All pixels on rank 0."""
        from comfy_raylight.raylight.watch import Watch
        from comfy_raylight.vae.tiles import Dealer, Survey, deal

        comm, survey = self._mesh.axis("world"), Survey()
        self._walk(survey.decode, "meta")
        owners = deal(survey.costs, comm.size)
        watch = Watch(self._mesh.control, wanted=lambda: False)
        dealer = Dealer(comm, self._model.decode, survey.tiles, owners, seed=0, watch=watch)
        pixels = self._walk(dealer.decode, "cpu" if comm.rank == 0 else "meta")
        dealer.finish()
        return pixels

    def own(self, pixels: Any) -> Any:
        """This rank's rows of all pixels."""
        return self._strips.own(pixels)

    def _walk(self, decode: Callable[[Any], Any], device: str) -> Any:
        return tiled(self._latent, decode, device, tile=self._tile, overlap=self._overlap)


def tiled(latent: Any, decode: Callable[[Any], Any], device: str, *, tile: int = TILE, overlap: int = OVERLAP) -> Any:
    """ComfyUI's tiled decode.

    Args:
        device: where tiles are blended.
    """
    import comfy.utils

    grid = {
        "tile": (latent.shape[2], tile, tile),
        "overlap": (1, overlap, overlap),
        "index_formulas": FORMULA,
    }
    up = (lambda frames: frames * 4 - 3, *FORMULA[1:])
    return comfy.utils.tiled_scale_multidim(latent, decode, upscale_amount=up, output_device=device, **grid)
