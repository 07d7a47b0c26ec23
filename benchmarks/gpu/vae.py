"""Decoding a video on 1, 2, ... GPUs against plain ComfyUI on one: seconds, memory and difference.

    python benchmarks/gpu/vae.py --comfy ROOT [--frames 81] [--height 480] [--width 832] [--rounds 5] [--gpus 1,2]

Run it with a Python that has ComfyUI's packages; it installs nothing. The decoder is Wan 2.1's with random weights.
Plain is `model.decode` in one process on one GPU. A difference is the largest one to it, over the largest value; what
bf16 itself does is plain's difference to its own result in fp32. Memory is what the allocator gave out at most.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import add_video, mesh_of, spawn, timed
from tables import Table

SMALL = 2
"""Frames of the latent at which results are compared: all of a long video takes long in fp32."""


@dataclass(frozen=True)
class Options:
    """What is decoded, and how often."""

    comfy: str
    size: int
    frames: int
    height: int
    width: int
    rounds: int
    dtype: str


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    add_video(parser)
    parser.add_argument("--rounds", type=int, default=5, help="to take the median of")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gpus", default="1,2", help="how many, comma-separated")
    given = parser.parse_args()
    options = Options(
        comfy=str(given.comfy.resolve()),
        size=1,
        frames=given.frames,
        height=given.height,
        width=given.width,
        rounds=given.rounds,
        dtype=given.dtype,
    )
    print(f"{options.frames} frames of {options.width} x {options.height}, {options.dtype}, median of {options.rounds}")
    columns = ["GPUs", "way", "s", "speed-up", "GB at most", "of plain's", "difference", "bf16's own"]
    table = Table("vae", columns, difference=".1e", **{"bf16's": ".1e"})
    plain: dict[str, float] = {}
    for size in map(int, given.gpus.split(",")):
        ranks = spawn(size, on_rank, dataclasses.replace(options, size=size))
        for way in ranks[0]["ways"]:
            seconds = max(rank["ways"][way]["seconds"] for rank in ranks)
            peak = max(rank["ways"][way]["peak"] for rank in ranks) / 1e9
            wrong = max(rank["ways"][way]["difference"] for rank in ranks)
            plain = plain or {"seconds": seconds, "peak": peak}
            ratios = plain["seconds"] / seconds, peak, peak / plain["peak"] if peak else 0.0
            table.row(size, way, seconds, *ratios, wrong, ranks[0]["rounding"])
    return 0


def on_rank(rank: int, store: str, options: Options) -> dict[str, Any]:
    """Seconds, peak and difference of every way, as one rank sees them."""
    import torch
    from comfy import model_management
    from comfy_raylight.raylight.config import ParallelConfig
    from comfy_raylight.tests.decode.families import fill, random, wan
    from vae_ways import Ways

    device, dtype = model_management.get_torch_device(), getattr(torch, options.dtype)
    mesh = mesh_of(ParallelConfig(world=options.size, ulysses=options.size, ring=1, cfg=1), rank, store)
    with torch.inference_mode():
        exact: Any = fill(wan(dim=96, num_res_blocks=2)).to(device)
        frames = (options.frames + 3) // 4
        noise = random(1, 16, frames, options.height // 8, options.width // 8, seed=1).to(device)
        small = noise[:, :, :SMALL]
        precise = exact.decode(small)
        model = exact.to(dtype)
        latent, small = noise.to(dtype), small.to(dtype)
        undivided = model.decode(small)
        scale = undivided.float().abs().max()
        rounding = float((undivided.float() - precise.float()).abs().max() / scale)
        del precise
        whole, part = Ways(mesh, model, latent, tile=32, overlap=8), Ways(mesh, model, small, tile=32, overlap=8)
        ways: dict[str, Callable[[], Any]] = {"strips": whole.strips, "tiles": whole.tiles}
        found: dict[str, Any] = {}
        for way, run in ({"plain": lambda: model.decode(latent)} | ways if options.size == 1 else ways).items():
            if way == "strips" and options.size == 1:
                continue
            difference = 0.0
            if way == "strips":
                difference = float((part.strips().float() - part.own(undivided).float()).abs().max() / scale)
            seconds, peak = timed(run, options.rounds, mesh)
            found[way] = {"seconds": seconds, "peak": peak, "difference": difference}
    mesh.close()
    return {"ways": found, "rounding": rounding}


if __name__ == "__main__":
    sys.exit(main())
