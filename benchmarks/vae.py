"""What decoding on several ranks gains and costs: a Wan decoder, P ranks of one thread each against one.

    python benchmarks/vae.py [--comfy PATH] [--dim 96] [--frames 17] [--size 256] [--rounds 2] [--ways strips,tiles]
        [--picture FILE]

speed: seconds of 2 ranks against one process, in strips and by tiles. memory: the most that a rank takes during a
decode in strips, on 1, 2 and 4 ranks, its own rows of pixels included: bytes of tensors that are alive, and anonymous
memory that is resident, which has what kernels and the allocator take besides. `--picture` draws a frame of one
process, of three ranks in strips, of three that exchange nothing, and what is different, amplified.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
from vae_ways import Ways, tiled


def main() -> int:
    """Set up, then measure in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    parser.add_argument("--dim", type=int, default=96, help="width of the decoder; 96 is Wan 2.1's")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256, help="rows and columns of pixels")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="strips,tiles", help="to time, comma-separated")
    parser.add_argument("--picture", type=Path, help="only draw, into this file")
    options = parser.parse_args()
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    if options.picture:
        draw(options)
    else:
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
        for way in options.ways.split(","):
            whole = ways[way]
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
        print(
            "\n| ranks | rows of the tallest strip | most MB of tensors on a rank | ratio | most MB resident | ratio |"
        )
        print("|---|---|---|---|---|---|")
        alone: list[float] = []
        for size in (1, 2, 4):
            ranks = results(fork(size, functools.partial(on_rank, way="memory", rounds=1), model, latent))
            peaks = [max(rank[kind] for rank in ranks) / 1e6 for kind in (0, 1)]
            alone = alone or peaks
            each = " | ".join(f"{peak:.1f} | {peak / one:.2f}" for peak, one in zip(peaks, alone, strict=True))
            print(f"| {size} | {-(-latent.shape[-2] // size)} of {latent.shape[-2]} | {each} |", flush=True)


def draw(options: argparse.Namespace) -> None:
    """The middle frame of a smooth video, decoded in three ways, and the differences to the first."""
    import torch
    from comfy_raylight.tests.decode.families import fill, wan
    from comfy_raylight.tests.engine.ranks import fork
    from PIL import Image

    with torch.inference_mode():
        model: Any = fill(wan(dim=options.dim, num_res_blocks=2))
        rows = options.size // 8
        y, x = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, rows), indexing="ij")
        latent = torch.stack([torch.sin(4 * (x * (c % 3) + y * (c % 5)) + c) for c in range(16)])
        latent = latent[None, :, None].repeat(1, 1, (options.frames + 3) // 4, 1, 1)
        whole = model.decode(latent)
        found = {
            way: torch.cat(
                [
                    torch.tensor(part)
                    for part in results(fork(3, functools.partial(on_rank, way=way, rounds=1), model, latent))
                ],
                -2,
            )
            for way in ("pixels", "alone")
        }
    scale = whole.abs().max()
    pictures = []
    for name, pixels in {"one process": whole, "three ranks": found["pixels"], "no exchange": found["alone"]}.items():
        apart = (pixels - whole).abs() / scale
        print(f"{name}: largest difference {apart.max():.1e}")
        shown = (pixels / scale / 2 + 0.5, (apart * 1e5).clamp(max=1))
        pictures.append(torch.cat([part[0, :, part.shape[2] // 2] for part in shown], -2))
    image = torch.cat(pictures, -1).mul(255).byte().movedim(0, -1).numpy()
    Image.fromarray(image).save(options.picture)


def results(ranks: dict[int, Any]) -> list[tuple[float, ...]]:
    """What the ranks returned, the first one first.

    Raises:
        RuntimeError: one failed.
    """
    failed = [rank for rank in ranks.values() if isinstance(rank, str)]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [ranks[rank] for rank in sorted(ranks)]


def on_rank(rank: int, size: int, path: str, model: Any, latent: Any, *, way: str, rounds: int) -> tuple[float, ...]:
    """Seconds, CPU seconds and share of collectives of this rank; or its peaks of memory."""
    import torch
    from comfy_raylight.raylight.config import ParallelConfig
    from comfy_raylight.tests.engine.ranks import mesh_of
    from comfy_raylight.tests.host.live_bytes import LiveBytes
    from comfy_raylight.tests.weights.memory import Watch, private

    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    ways = Ways(mesh, model, latent)
    with torch.inference_mode():
        if way == "memory":
            mine = [os.getpid()]
            before = private(mine)
            with Watch(private, mine) as resident, LiveBytes() as meter:
                ways.strips()
            found: tuple[float, ...] = (float(meter.peak), float(resident.peak - before))
        elif way in ("pixels", "alone"):
            found = (ways.strips() if way == "pixels" else model.decode(ways.own(latent).contiguous())).tolist()
        else:
            work = ways.strips if way == "strips" else ways.tiles
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


if __name__ == "__main__":
    sys.exit(main())
