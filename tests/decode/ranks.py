"""Runs VAEs in strips and by tiles on forked ranks: `python -m decode.ranks COMFYUI_ROOT RESULTS [all | NAME]`.

ComfyUI is imported and the undivided results are computed once, before the ranks are forked. Results are one
JSON object: per number of ranks, per rank, per check.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.rows.row_rules import COPIED_BYTES
from comfy_raylight.raylight.rows.strips import Rows, Strips
from comfy_raylight.raylight.watch import Watch
from comfy_raylight.tests.engine.ranks import enter_comfy, fork, mesh_of
from comfy_raylight.tests.host.live_bytes import LiveBytes
from comfy_raylight.vae import budget
from comfy_raylight.vae.divided import strip_of
from comfy_raylight.vae.tiles import Dealer, Survey, deal

from .families import FAMILIES, TALL, TILED, Family, fill, random

HEIGHTS: dict[int, tuple[int, ...]] = {1: (3,), 2: (5,), 3: (3,), 5: (7,)}
"""Rows of the latent by number of ranks: uneven, and one each."""
MORE: dict[int, tuple[int, ...]] = {1: (7,), 2: (2, 5), 3: (3, 7), 5: (5, 7)}
"""The same for all families, on demand."""
CONTROL = (2, 5)
"""Ranks and rows at which strips also run without exchanges."""
SEAMS = (2, 3)
"""Ranks on which strips are also decoded as large ones are, without copies of them."""
SEED = 7


class Prepared:
    """A family's model, its inputs and what one process makes of them."""

    def __init__(self, family: Family, heights: Collection[int]) -> None:
        self.family = family
        self.model: Any = fill(family.build())
        self.decoded = {rows: self.whole("decode", family.latent(rows)) for rows in heights}
        self.encoded = {rows: self.whole("encode", family.picture(rows)) for rows in heights if family.encodes}

    def whole(self, verb: str, x: torch.Tensor) -> torch.Tensor:
        """What one process makes of an input."""
        torch.manual_seed(SEED)
        with self.chunked(Strips.of(x.shape[-2], ranks=1, rank=0)):
            return getattr(self.model, verb)(x)

    def chunked(self, strips: Strips) -> Any:
        return budget.agreed(self.model, strips, (self.family.chunk or 1 << 30) * strips.total)


def error(found: torch.Tensor, whole: torch.Tensor, strips: Strips) -> float:
    """Of this rank's rows, relative to the largest value."""
    wanted = strips.own(whole)
    assert found.shape == wanted.shape, (tuple(found.shape), tuple(wanted.shape))
    assert whole.isfinite().all() and whole.std() > 1e-3
    return ((found - wanted).abs().max() / whole.abs().max()).item()


def divided(
    prepared: Prepared,
    verb: str,
    x: torch.Tensor,
    rows: Rows,
    *,
    exchange: bool = True,
    copied_bytes: int = COPIED_BYTES,
) -> torch.Tensor:
    """This rank's part of decoding or encoding `x`."""
    attend = sys.modules["comfy_raylight.workers.worker.vae.loading"].attend
    torch.manual_seed(SEED)
    with ExitStack() as stack:
        stack.enter_context(prepared.chunked(rows.strips))
        if exchange:
            stack.enter_context(strip_of(prepared.model, rows, attend, copied_bytes=copied_bytes))
        return getattr(prepared.model, verb)(rows.strips.own(x).contiguous())


def strips_job(rank: int, size: int, path: str, everything: list[Prepared], heights: tuple[int, ...]) -> dict[str, Any]:
    """Errors of every family, by name, verb and rows; and whether the model is as before."""
    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for prepared in everything:
            family = prepared.family
            before = [getattr(m, "optimized_attention", None) for m in prepared.model.modules()]
            for height in heights:
                strips = Strips.of(height, ranks=size, rank=rank)
                rows = Rows(mesh.axis("world"), strips)
                for verb, wholes, x in (
                    ("decode", prepared.decoded, family.latent(height)),
                    ("encode", prepared.encoded, family.picture(height) if family.encodes else None),
                ):
                    if x is None:
                        continue
                    try:
                        found = divided(prepared, verb, x, rows)
                        results[f"{family.name}, {verb}, {height} rows"] = error(found, wholes[height], strips)
                        if size in SEAMS and verb == "decode":
                            found = divided(prepared, verb, x, rows, copied_bytes=0)
                            name = f"{family.name}, {verb} by seams, {height} rows"
                            results[name] = error(found, wholes[height], strips)
                    except Exception as problem:
                        where = f"in {verb} of {family.name}, {height} rows on {size} ranks"
                        raise RuntimeError(where) from problem
                if (size, height) == CONTROL:
                    alone = divided(prepared, "decode", family.latent(height), rows, exchange=False)
                    results[f"{family.name}, without exchanges"] = error(alone, prepared.decoded[height], strips)
            after = [getattr(m, "optimized_attention", None) for m in prepared.model.modules()]
            results[f"{family.name}, as before"] = before == after
            results[f"{family.name}, collectives"] = mesh.collectives
    mesh.control.all_reduce(torch.zeros(1))
    mesh.close()
    return results


def tiles_job(rank: int, size: int, path: str, prepared: list[Prepared], wholes: list[torch.Tensor]) -> dict[str, Any]:
    """Whether rank 0 blends the bits that one process does, for every family and grid."""
    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for one, whole in zip(prepared, wholes, strict=True):
            x, arguments = tiled(one)
            look = survey(x, arguments)
            owners = deal(look.costs, size)
            results[f"{one.family.name}, owners"] = owners
            told: list[int] = []
            watch = watching(mesh, len(owners), told)
            dealer = Dealer(mesh.axis("world"), one.model.decode, look.tiles, owners, seed=SEED, watch=watch)
            device = "cpu" if rank == 0 else "meta"
            out = walk(x, dealer.decode, arguments, device)
            dealer.finish()
            results[f"{one.family.name}, drew"] = dealer.drew
            results[f"{one.family.name}, told"] = told
            if rank == 0:
                results[f"{one.family.name}, same bits"] = torch.equal(out, whole)
    results["collectives"] = mesh.collectives
    mesh.control.all_reduce(torch.zeros(1))
    mesh.close()
    return results


def memory_job(rank: int, size: int, path: str, model: Any, latent: torch.Tensor) -> int:
    """Most bytes of tensors alive on this rank while it decodes its strip."""
    attend = sys.modules["comfy_raylight.workers.worker.vae.loading"].attend
    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    strips = Strips.of(latent.shape[-2], ranks=size, rank=rank)
    with torch.inference_mode(), ExitStack() as stack:
        meter = stack.enter_context(LiveBytes())
        own = strips.own(latent).contiguous()
        if size > 1:
            stack.enter_context(strip_of(model, Rows(mesh.axis("world"), strips), attend))
        model.decode(own)
    mesh.control.all_reduce(torch.zeros(1))
    mesh.close()
    return meter.peak


def watching(mesh: Mesh, total: int, told: list[int]) -> Watch:
    return Watch(mesh.control, total=total, report=lambda done, _: told.append(done), wanted=lambda: False)


def tiled(one: Prepared) -> tuple[torch.Tensor, dict[str, Any]]:
    """A latent of several tiles, and the grid."""
    family = one.family
    grid: dict[str, Any] = {"out_channels": next(iter(one.decoded.values())).shape[1]}
    if not family.frames:
        return family.latent(9, batch=2), {**grid, "tile": (4, 4), "overlap": 2, "upscale_amount": family.scale}
    # what two and three frames become says it for all numbers
    two, three = (one.whole("decode", family.latent(4, frames=count)).shape[2] for count in (2, 3))
    each = three - two
    grid |= {"tile": (3, 4, 4), "overlap": (1, 2, 2), "index_formulas": (each, family.scale, family.scale)}
    up = (lambda count: two + (count - 2) * each, family.scale, family.scale)
    return family.latent(9, frames=5, batch=2), {**grid, "upscale_amount": up}


def walk(x: torch.Tensor, function: Any, arguments: dict[str, Any], device: str) -> torch.Tensor:
    """ComfyUI's tiled decode."""
    import comfy.utils

    return comfy.utils.tiled_scale_multidim(x, function, output_device=device, **arguments)


def survey(x: torch.Tensor, arguments: dict[str, Any]) -> Survey:
    """The tiles of a walk."""
    look = Survey()
    walk(x, look.decode, arguments, "meta")
    return look


def seeded(decode: Any) -> Any:
    """A decode function that seeds each tile as the dealer does."""
    numbers = iter(range(1 << 20))

    def call(tile: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(SEED + next(numbers))
        return decode(tile)

    return call


def main(root: str, result: str, chosen: str = "") -> None:
    """Compute what one process makes, then what all ranks do, and write it down."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    enter_comfy(root)
    import comfy.ldm.lightricks.vae.causal_video_autoencoder as newest

    # before the ranks are forked: importing it in each would take longer than all decodes
    import comfy_raylight.workers.worker.vae.loading  # noqa: F401

    newer = hasattr(newest, budget.NAME)
    wanted = [f for f in FAMILIES if (f.every or chosen == "all") and (newer or not f.newer)]
    wanted = [f for f in wanted if f.name == chosen] if chosen not in ("", "all") else wanted
    with torch.inference_mode():
        chosen_heights = MORE if chosen == "all" else HEIGHTS
        every_height = {rows for of_size in chosen_heights.values() for rows in of_size}
        prepared = [Prepared(family, every_height) for family in wanted]
        tile = [one for one in prepared if chosen == "all" or one.family.name in TILED]
        wholes = [walk(x, seeded(one.model.decode), arguments, "cpu") for one in tile for x, arguments in [tiled(one)]]
    everything = {
        "strips": {size: fork(size, strips_job, prepared, heights) for size, heights in chosen_heights.items()},
        "tiles": {size: fork(size, tiles_job, tile, wholes) for size in HEIGHTS},
    }
    if chosen in ("", "all"):
        wan = next(one.model for one in prepared if one.family.name == "wan 2.1")
        latent = random(*TALL, seed=3)
        everything["memory"] = {size: fork(size, memory_job, wan, latent) for size in HEIGHTS}
    with open(result, "w", encoding="utf-8") as file:
        json.dump(everything, file)


if __name__ == "__main__":
    main(*sys.argv[1:4])
