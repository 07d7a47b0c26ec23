"""Memory of LTX-2's modulation per frame on P ranks: the plan's local form against expanding it and cutting the tokens.

    python benchmarks/compressed_timestep.py --comfy PATH [--frames 900] [--patches 880]

PATH is a ComfyUI that has LTX-2. Bytes of one rank at LTX-2's real width in bf16, counted on tensors without data.
held: alive from block to block, for one argument of three. peak: the most at any moment of a forward, so at the
cut or while a block computes. Without ranks to share with the argument stays as ComfyUI made it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import environment

WIDTH, VALUES = 4096, 6
SLICES = (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6))
"""What a block asks for, one after another."""


def main() -> int:
    """Set up, then count in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI with LTX-2")
    parser.add_argument("--frames", type=int, default=900, help="of the latent")
    parser.add_argument("--patches", type=int, default=880, help="tokens per frame: 1280 x 704 pixels")
    options = parser.parse_args()
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    try:
        from comfy.ldm.lightricks.av_model import BasicAVTransformerBlock, CompressedTimestep
    except ImportError:
        print("This ComfyUI has no LTX-2: name one that has with --comfy", file=sys.stderr)
        return 1
    import torch
    from comfy_raylight.patches.ltx import local_timestep
    from comfy_raylight.raylight.layout import Layout, Segment
    from comfy_raylight.tests.host.live_bytes import LiveBytes

    tokens = options.frames * options.patches
    # rows of a frame are equal, and nothing is stored
    whole = torch.empty(1, 1, VALUES * WIDTH, dtype=torch.bfloat16, device="meta").expand(1, tokens, -1)
    value = CompressedTimestep(whole, options.patches)
    table = torch.empty(VALUES, WIDTH, dtype=torch.bfloat16, device="meta")

    def expanded_first(layout: Layout) -> torch.Tensor:
        return layout.split(value.expand(), dim=1, over=("v",))

    def count(cut: Callable[[], Any]) -> tuple[int, int]:
        with LiveBytes() as alive:
            local = cut()
            held = alive.bytes
            for indices in SLICES:
                BasicAVTransformerBlock.get_ada_values(None, table, 1, local, indices)
        return held, alive.peak

    print(f"{options.frames} frames of {options.patches} tokens; ComfyUI's own form: {_mb(value.data.nbytes)} MB\n")
    print("| ranks | tokens each | local form: held MB | peak MB | expanded, then cut: held MB | peak MB |")
    print("|---|---|---|---|---|---|")
    for size in (1, 2, 4, 8):
        layout = Layout(segments=(Segment("v", tokens),), rank=0, size=size)
        if size == 1:
            ours, other = count(lambda: value), count(value.expand)
        else:
            ours = count(partial(local_timestep, value, layout))
            other = count(partial(expanded_first, layout))
        print(f"| {size} | {layout.local(('v',))} | {' | '.join(map(_mb, (*ours, *other)))} |")
    return 0


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f}"


if __name__ == "__main__":
    sys.exit(main())
