"""What feed-forward layers in stretches of tokens save (patches/ffn.py, the node RayLTXFFNChunker), and what they cost.

    python benchmarks/ffn_chunks.py [--tokens 4096] [--rounds 3] [--comfy PATH]

LTX-Video and Wan at width 1024, one block, fp32, one thread, PyTorch's attention as on a GPU. Bytes are of tensors
alive at once, weights and inputs not counted: in one feed-forward layer, and in a forward of the model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import environment

WIDTH = 1024
CHUNKS = (1, 2, 4, 8, 16)


def main() -> int:
    """Set up, then measure in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3, help="forwards to take the median of")
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    options = parser.parse_args()
    if options.tokens < 64 or options.tokens % 64:
        parser.error(f"--tokens {options.tokens} is not a multiple of 64")
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    print(f"{options.tokens} tokens, width {WIDTH}\n")
    print("| model | chunks | one layer: peak MB | forward: peak MB | seconds | largest relative difference |")
    print("|---|---|---|---|---|---|")
    for name, (model, make) in models(options.tokens).items():
        measure(name, model, make, options)
    return 0


def models(tokens: int) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """One block of each model, and what makes its inputs: 4 frames of tokens."""
    import sizes
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy_raylight.tests.engine.case import patched
    from comfy_raylight.tests.engine.families import ltx, wan

    def as_on_a_gpu() -> dict[str, Any]:
        # ComfyUI's own choice for a CPU keeps the scores of all tokens, which would hide everything else
        return {"optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)}

    ltx_video = partial(ltx.video, shape=(4, 8, tokens // 32))
    wan_video = partial(wan.video, frames=4, height=16, width=tokens // 16)
    wan_like = wan.wan(dim=WIDTH, ffn_dim=4 * WIDTH, num_heads=WIDTH // 128, num_layers=1)
    return {
        "LTX-Video": (sizes.ltx_like(heads=WIDTH // 128, blocks=1), partial(patched, ltx_video, as_on_a_gpu)),
        "Wan": (wan_like, partial(patched, wan_video, as_on_a_gpu)),
    }


def measure(name: str, model: Any, make: Callable[[], Any], options: argparse.Namespace) -> None:
    """One line for each number of chunks; the first is without hooks."""
    import torch
    from comfy_raylight.patches.ffn import ChunkedFeedForward, feed_forwards
    from comfy_raylight.tests.engine.ranks import difference, forward_of
    from comfy_raylight.tests.host.live_bytes import LiveBytes

    forward, (layer, *_) = forward_of(model), feed_forwards(model)
    with torch.inference_mode():
        x = torch.randn(1, options.tokens, WIDTH, generator=torch.Generator().manual_seed(1))
        args, kwargs = make()
        reference = forward(*args, **kwargs)
        for chunks in CHUNKS:
            chunked = ChunkedFeedForward(model, chunks) if chunks > 1 else None
            with LiveBytes() as alone:
                layer(x)
            args, kwargs = make()
            with LiveBytes() as whole:
                out = forward(*args, **kwargs)
            seconds = []
            for _ in range(options.rounds):
                args, kwargs = make()
                began = time.perf_counter()
                forward(*args, **kwargs)
                seconds.append(time.perf_counter() - began)
            if chunked is not None:
                chunked.remove()
            print(
                f"| {name} | {chunks} | {alone.peak / 1e6:.1f} | {whole.peak / 1e6:.1f} | "
                f"{statistics.median(seconds):.2f} | {difference(out, reference):.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
