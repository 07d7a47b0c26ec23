"""What decoding on several ranks gains and costs: a Wan decoder, P ranks of one thread each against one.

    python benchmarks/vae.py [--comfy PATH] [--dim 96] [--frames 17] [--size 256] [--rounds 2]

speed: seconds of 2 ranks against one process, in strips and by tiles. memory: most bytes of tensors alive on a rank
during a decode in strips, on 1, 2 and 4 ranks; the rank's own rows of pixels included.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment

FORMULA = (4, 8, 8)
"""Frames and pixels per latent's, of Wan."""


def main() -> int:
    """Set up, then measure in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    parser.add_argument("--dim", type=int, default=96, help="width of the decoder; 96 is Wan 2.1's")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256, help="rows and columns of pixels")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    measure(options)
    return 0


def measure(options: argparse.Namespace) -> None:
    """Print both tables."""
    import torch
    from comfy_raylight.tests.decode.families import fill, random, wan
    from comfy_raylight.tests.engine.ranks import fork

    with torch.inference_mode():
        model: Any = fill(wan(dim=options.dim, num_res_blocks=2))
        latent = random(1, 16, (options.frames + 3) // 4, options.size // 8, options.size // 8, seed=1)
        ways: dict[str, Callable[[], Any]] = {
            "strips": lambda: model.decode(latent),
            "tiles": lambda: tiled(latent, model.decode, "cpu"),
        }
        print("| way | one s | 2 ranks s | ratio | CPU s of one | CPU s of the busier rank | ratio | in collectives |")
        print("|---|---|---|---|---|---|---|---|")
        for way, whole in ways.items():
            before = timed(whole, options.rounds)
            ranks = results(fork(2, functools.partial(on_rank, way=way, rounds=options.rounds), model, latent))
            after = timed(whole, options.rounds)
            one, cpu = (statistics.mean((before[i], after[i])) for i in (0, 1))
            slowest, busiest = (max(rank[i] for rank in ranks) for i in (0, 1))
            waiting = max(rank[2] for rank in ranks)
            print(
                f"| {way} | {one:.2f} | {slowest:.2f} | {one / slowest:.2f} | {cpu:.2f} | {busiest:.2f} "
                f"| {cpu / busiest:.2f} | {waiting:.0%} |",
                flush=True,
            )
        print("\n| ranks | most MB of tensors alive on a rank | of one rank's |\n|---|---|---|")
        alone = 0.0
        for size in (1, 2, 4):
            peaks = results(fork(size, functools.partial(on_rank, way="memory", rounds=1), model, latent))
            peak = max(rank[0] for rank in peaks) / 1e6
            alone = alone or peak
            print(f"| {size} | {peak:.1f} | {peak / alone:.2f} |", flush=True)


def results(ranks: dict[int, Any]) -> list[tuple[float, ...]]:
    """What the ranks returned.

    Raises:
        RuntimeError: one failed.
    """
    failed = [rank for rank in ranks.values() if isinstance(rank, str)]
    if failed:
        raise RuntimeError("\n".join(failed))
    return list(ranks.values())


def on_rank(rank: int, size: int, path: str, model: Any, latent: Any, *, way: str, rounds: int) -> tuple[float, ...]:
    """Seconds, CPU seconds and share of collectives of this rank; or its peak of memory."""
    import torch
    from comfy_raylight.raylight.config import ParallelConfig
    from comfy_raylight.tests.engine.ranks import mesh_of
    from comfy_raylight.vae.rules import strip_of
    from comfy_raylight.vae.strips import Rows, Strips
    from comfy_raylight.vae.tiles import Dealer, Survey, deal
    from comfy_raylight.vae.watch import Watch
    from comfy_raylight.workers.vae_loading import attend
    from live_bytes import LiveBytes

    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    comm = mesh.axis("world")
    strips = Strips.of(latent.shape[-2], ranks=size, rank=rank)

    def in_strips() -> Any:
        own = strips.own(latent).contiguous()
        if size == 1:
            return model.decode(own)
        with strip_of(model, Rows(comm, strips), attend):
            return model.decode(own)

    def by_tiles() -> Any:
        survey = Survey()
        tiled(latent, survey.decode, "meta")
        owners = deal(survey.costs, size)
        watch = Watch(comm, total=len(owners), device=latent.device, report=lambda *_: None, wanted=lambda: False)
        dealer = Dealer(comm, model.decode, owners, seed=0, watch=watch)
        tiled(latent, dealer.decode, "cpu" if rank == 0 else "meta")
        dealer.finish()

    with torch.inference_mode():
        if way == "memory":
            with LiveBytes() as meter:
                in_strips()
            found: tuple[float, ...] = (float(meter.peak),)
        else:
            work = in_strips if way == "strips" else by_tiles
            waited = mesh.seconds
            seconds, cpu = timed(work, rounds, together=lambda: mesh.control.all_reduce(torch.zeros(1)))
            found = (seconds, cpu, (mesh.seconds - waited) / ((rounds + 1) * seconds))
    mesh.control.all_reduce(torch.zeros(1))
    mesh.close()
    return found


def timed(work: Callable[[], Any], rounds: int, *, together: Callable[[], Any] = lambda: None) -> tuple[float, float]:
    """Medians of the wall clock and of the process's CPU time, after a first run."""
    work()
    walls, cpus = [], []
    for _ in range(rounds):
        together()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def tiled(latent: Any, decode: Callable[[Any], Any], device: str) -> Any:
    """ComfyUI's tiled decode with tiles of 128 pixels and an overlap of 32."""
    import comfy.utils

    grid = {"tile": (latent.shape[2], 16, 16), "overlap": (1, 4, 4), "index_formulas": FORMULA}
    up = (lambda frames: frames * 4 - 3, *FORMULA[1:])
    return comfy.utils.tiled_scale_multidim(latent, decode, upscale_amount=up, output_device=device, **grid)


if __name__ == "__main__":
    sys.exit(main())
