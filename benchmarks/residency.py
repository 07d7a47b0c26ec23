"""Weights divided over ranks: what each holds, what a block waits for its weights, what a step takes.

    python benchmarks/residency.py [--size 1.7] [--dims 1280,384] [--ranks 2,4] [--tokens 240] [--steps 3]
        [--comfy PATH]

A Wan file of random weights (float32, `size` GB) per width, and so per size of blocks, is loaded by ranks that share
its sequence over gloo, on one host, with one thread each. "held" are a rank's own storages, "own memory" what the
kernel says that its memory has grown by, activations included, "computed" the sum that the log shows; what stays whole
is the file's map on a CPU, and counts in none of them. "waits" is the time from a block's turn until its weights are
there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import environment

FFN = 4
"""Widths of the model that its feed-forward layers have."""
MOST = 8
"""Ranks that bytes are computed for."""
VARIANTS = (("resident", "off"), ("sharded", "off"), ("sharded", "on"), ("streamed", "off"), ("streamed", "on"))


def main() -> int:
    """Set up, then print the tables in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.7, help="of a file, in GB")
    parser.add_argument("--dims", type=numbers, default=(1280, 384), help="widths of the models")
    parser.add_argument("--ranks", type=numbers, default=(2, 4))
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--steps", type=int, default=3, help="timed after the first, which learns the order of blocks")
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    options = parser.parse_args()
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    with tempfile.TemporaryDirectory() as folder:
        for dim in options.dims:
            path = checkpoint(Path(folder), dim, options.size)
            print(f"width {dim}: {path.stat().st_size / 1e9:.2f} GB\n")
            bytes_computed(path)
            times(path, options)
            path.unlink()
    return 0


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def checkpoint(folder: Path, dim: int, size: float) -> Path:
    from comfy_raylight.tests.host.checkpoints import Job, write

    layer = (8 + 2 * FFN) * dim * dim * 4
    path = folder / f"{dim}.safetensors"
    sizes = {"dim": dim, "ffn": FFN * dim, "layers": max(2, round(size * 1e9 / layer))}
    write([Job(family="wan", path=path, dtype="float32", size=sizes)], comfy_root=Path(sys.path[0]))
    return path


def bytes_computed(path: Path) -> None:
    """What each of 1 to MOST ranks holds."""
    from math import prod

    from comfy_raylight.raylight.packing import Packing, footprint
    from comfy_raylight.tests.host.checkpoints import shapes

    blocks: dict[str, list[int]] = {}
    outside = 0
    for key, shape in shapes(path).items():
        if key.startswith("blocks."):
            blocks.setdefault(key.split(".")[1], []).append(4 * prod(shape))
        else:
            outside += 4 * prod(shape)
    print("| ranks | resident MB | sharded MB | without prefetch | streamed MB | without prefetch |")
    print("|---|---|---|---|---|---|")
    for ranks in range(1, MOST + 1):
        packings = [Packing(tuple(sizes), ranks) for sizes in blocks.values()]
        found = [
            footprint(residency, packings, outside=outside, prefetch=prefetch == "on").total / 1e6
            for residency, prefetch in (VARIANTS[0], VARIANTS[2], VARIANTS[1], VARIANTS[4], VARIANTS[3])
        ]
        print(f"| {ranks} | {' | '.join(f'{size:.0f}' for size in found)} |")
    print(flush=True)


def times(path: Path, options: argparse.Namespace) -> None:
    """Load and run the file in every variant."""
    print(
        "| ranks | weights | prefetch | computed MB | held MB | own memory MB | load and first step s | step s "
        "| block waits ms | step against resident |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    sys.path.append(str(environment.ROOT / "tests"))
    from engine.ranks import fork

    for ranks in options.ranks:
        resident = 0.0
        for residency, prefetch in VARIANTS:
            job = (str(path), residency, prefetch, options.tokens, options.steps)
            found = fork(ranks, work, job)
            for table in found.values():
                if isinstance(table, str):
                    raise RuntimeError(table)
            step = max(table["step"] for table in found.values())
            resident = resident or step
            row: dict[str, Any] = found[0]
            print(
                f"| {ranks} | {residency} | {prefetch if residency != 'resident' else ''} | {row['computed']:.0f} "
                f"| {row['held']:.0f} | {row['private']:.0f} | {max(t['first'] for t in found.values()):.1f} "
                f"| {step:.2f} | {1e3 * max(t['waits'] for t in found.values()):.0f} | {step / resident:.2f} |",
                flush=True,
            )
    print()


def work(rank: int, size: int, store: str, job: tuple[str, str, str, int, int]) -> dict[str, float]:
    """One rank."""
    import torch
    from comfy_raylight.raylight.config import ModelSpec, ParallelConfig
    from comfy_raylight.tests.weights.memory import private
    from comfy_raylight.workers.mapping.loading import normal_tensors
    from comfy_raylight.workers.worker.model import WorkerModel
    from engine.ranks import mesh_of

    path, residency, prefetch, tokens, steps = job
    parallel = ParallelConfig(world=size, ulysses=size, ring=1, cfg=1, residency=residency, prefetch=prefetch)
    mesh = mesh_of(parallel, rank=rank, path=store)
    me = [os.getpid()]
    begun, before = time.perf_counter(), private(me)
    with normal_tensors():
        model = WorkerModel(ModelSpec.of(path), torch.float32, mesh, None)
    args = inputs(tokens)

    def step() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            with model.agreed(), normal_tensors():
                model.make_resident(room=model.activations(args))
            model.run("_forward", args, {"transformer_options": {}})
        return time.perf_counter() - start

    step()
    first, grown = time.perf_counter() - begun, private(me) - before
    rotation = model._blocks.rotation if model._blocks is not None else None
    waited, gathers = (rotation.waited, rotation.gathers) if rotation else (0.0, 0)
    took = min(step() for _ in range(steps))
    mesh.control.all_reduce(torch.zeros(1))
    mesh.close()
    return {
        "first": first,
        "step": took,
        "waits": (rotation.waited - waited) / (rotation.gathers - gathers) if rotation else 0.0,
        "private": grown / 1e6,
        "held": (model._blocks.bytes if model._blocks is not None else 0) / 1e6,
        "computed": (model._blocks.footprint(0).total if model._blocks is not None else 0) / 1e6,
    }


def inputs(tokens: int) -> tuple[Any, ...]:
    """x, timestep and context of a Wan with about so many tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    side = max(2, round(tokens**0.5))
    x = torch.randn(1, 16, 1, 2 * side, 2 * side, generator=generator)
    return (x, torch.tensor([500.0]), torch.randn(1, 12, 4096, generator=generator))


if __name__ == "__main__":
    sys.exit(main())
