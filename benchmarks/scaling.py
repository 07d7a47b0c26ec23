"""The cost model (raylight/cost.py): predicted speed-up by link and model, and the model against this CPU.

    python benchmarks/scaling.py predict | check [--comfy PATH]

predict: the tables of docs/scaling.md, from the rates assumed there. check: rates fitted to plain forwards of a
Wan-like model and to a measured exchange, then predicted and measured speed-up of 2 ranks at other sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import environment


def main() -> int:
    """Set up, then predict or compare in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("predict", "check"))
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    options = parser.parse_args()
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    {"predict": predict, "check": check}[options.what](options)
    return 0


def machines() -> dict[str, Any]:
    """Rates of machines: assumed for the RTX 4090 (dense bf16, about 0.6 of the datasheet in linear layers, 0.5 in
    attention), measured for the H200 (benchmarks/gpu/sampling.py; linear layers with the norms and sums between them).

    Links are what one GPU sends while all do: PCIe 4.0 is 15.8 GB/s at x8 and 31.5 GB/s at x16, of which GPUs without
    peer access keep about 0.4 (each byte crosses host memory). NVLink 4 is 450 GB/s, of which NCCL gave 255. Starting a
    block was measured for Flux and Z-Image beside the H200 and is taken for the other. What a step costs outside of the
    model is measured by `benchmarks/pool.py overhead`.
    """
    from comfy_raylight.raylight.cost import RATES

    gaming = RATES["cuda"]
    rates = dict(linear=5.6e14, attention=5.4e14, link=2.55e11, latency=3e-5, call=5e-3)
    return {
        "RTX 4090, PCIe 4 x8": gaming,
        "RTX 4090, PCIe 4 x16": dataclasses.replace(gaming, link=12e9),
        "H200, NVLink": dataclasses.replace(gaming, **rates),
    }


def models() -> dict[str, Any]:
    """Published shapes. Weights per token and block: attention 4 C^2, cross-attention 2 C^2, feed-forward 2 C F."""
    from comfy_raylight.raylight.cost import Work

    def weights(width: int, wide: int, *, cross: bool = False, gates: int = 2) -> float:
        return 4.0 * width**2 + (2.0 * width**2 if cross else 0.0) + gates * width * wide

    wan = Work(tokens=75600, width=5120, blocks=40, weights=weights(5120, 13824, cross=True), context=512, out=64)
    ltx = Work(tokens=14080, width=4096, blocks=48, weights=weights(4096, 16384, cross=True), context=1024)
    return {
        "Wan 14B, 720p, 81 frames": wan,
        "Wan 14B, 480p, 81 frames": dataclasses.replace(wan, tokens=32760),
        "LTX-2, 720p, 121 frames": ltx,
        "Flux.1, 1024 x 1024": Work(tokens=4608, width=3072, blocks=57, weights=weights(3072, 12288)),
        "Z-Image, 1024 x 1024": Work(tokens=4352, width=3840, blocks=32, weights=weights(3840, 10240, gates=3), out=64),
        "Flux.1, 512 x 512": Work(tokens=1536, width=3072, blocks=57, weights=weights(3072, 12288)),
    }


def predict(_: argparse.Namespace) -> None:
    """Speed-up by model, link and number of GPUs; and from how many tokens on it pays."""
    from comfy_raylight.raylight import cost

    counts = (2, 4, 8)
    for name, machine in machines().items():
        print(f"\n**{name}**\n")
        print(f"| model | tokens | 1 GPU s | {' | '.join(f'{n} GPUs' for n in counts)} | 8 as 4 x ring 2 |")
        print("|---|---|---|" + "---|" * (len(counts) + 1))
        for title, work in models().items():
            gains = [cost.speedup([work], machine, ulysses=n) for n in counts]
            mixed = cost.speedup([work], machine, ulysses=4, ring=2)
            cells = " | ".join(f"{gain:.1f}x" for gain in gains)
            print(f"| {title} | {work.tokens} | {cost.seconds([work], machine):.2f} | {cells} | {mixed:.1f}x |")
    print("\n| pays from so many tokens on | 2 GPUs | 4 GPUs | 8 GPUs |\n|---|---|---|---|")
    for name, machine in machines().items():
        for title, work in (
            ("Wan 14B", models()["Wan 14B, 720p, 81 frames"]),
            ("Flux.1", models()["Flux.1, 512 x 512"]),
        ):
            least = [cost.enough_tokens(work, machine, ulysses=n) for n in counts]
            print(f"| {title}, {name} | {' | '.join(map(str, least))} |")
    print("\n| FSDP costs nothing from so many tokens on | 2 GPUs | 4 GPUs | 8 GPUs |\n|---|---|---|---|")
    for name, machine in machines().items():
        for title in ("Wan 14B, 720p, 81 frames", "LTX-2, 720p, 121 frames", "Flux.1, 1024 x 1024"):
            least = [cost.hidden_from(models()[title], machine, ranks=n, weight_bytes=2) for n in counts]
            print(f"| {title.split(',')[0]}, {name} | {' | '.join(map(str, least))} |")


def check(_: argparse.Namespace) -> None:
    """Fit on two sizes, predict the others."""
    import parallel
    import sizes
    import torch
    from comfy_raylight.raylight import cost
    from comfy_raylight.tests.engine.ranks import fork

    model, make = sizes.wan_like()
    works, plain, measured = [], [], []
    for tokens in (256, 512, 1024, 2048):
        seconds, (two,) = parallel.measure(model, partial(make, tokens), [parallel.Way(ulysses=2)], 3)
        works.append(two.works[0])
        plain.append(seconds)
        measured.append(seconds / two.seconds)
    # the second and the last size: small ones are spoiled by what is neither linear layer nor attention
    fitted = torch.tensor([[works[i].linear_flops, works[i].attention_flops] for i in (1, 3)], dtype=torch.float64)
    rates = torch.linalg.solve(fitted, torch.tensor([plain[1], plain[3]], dtype=torch.float64))
    link, latency = min(fork(2, _exchange).values())
    machine = cost.Machine(
        linear=1 / rates[0].item(), attention=1 / rates[1].item(), link=link, latency=latency, call=0
    )
    print(
        f"fitted: linear {machine.linear / 1e9:.1f} GFLOP/s, attention {machine.attention / 1e9:.1f} GFLOP/s, "
        f"link {link / 1e9:.2f} GB/s, {latency * 1e6:.0f} us per exchange\n"
    )
    print("| tokens | plain s | predicted s | measured speed-up of 2 ranks | predicted |\n|---|---|---|---|---|")
    for work, seconds, gain in zip(works, plain, measured, strict=True):
        predicted = cost.speedup([work], machine, ulysses=2)
        print(f"| {work.tokens} | {seconds:.3f} | {cost.seconds([work], machine):.3f} | {gain:.2f} | {predicted:.2f} |")


def _exchange(rank: int, size: int, path: str) -> tuple[float, float]:
    """Bytes per second of a large all-to-all, and seconds of a tiny one."""
    import torch
    from comfy_raylight.raylight.config import ParallelConfig
    from comfy_raylight.tests.engine.ranks import mesh_of

    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    comm, medians = mesh.axis("ulysses"), []
    for count in (1 << 20, 16):
        times = []
        pieces = list(torch.zeros(count // size * size).chunk(size))
        for _ in range(20):
            began = time.perf_counter()
            comm.all_to_all(pieces, shapes=[tuple(piece.shape) for piece in pieces])
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times))
    mesh.close()
    return (1 << 20) * 4 / 2 / medians[0], medians[1]


if __name__ == "__main__":
    sys.exit(main())
