"""What the pool costs and what it gains, against plain ComfyUI in the same run.

    python benchmarks/pool.py start | overhead | sampling [--workers 2] [--comfy PATH]

start: seconds from nothing to a pool that can be used. overhead: milliseconds of a model call beyond the
workers' own time, and the bytes that cross. sampling: seconds per step of a Wan-like model wide enough that
computing dominates, workers with one thread each against plain ComfyUI with one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from host import setup

ROUNDS = 7
CALLS = 25
STEPS = 3


def main() -> int:
    """Set up, then measure in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "overhead", "sampling"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    options = parser.parse_args()
    if Path(sys.prefix).resolve() != (setup.HOME / "venv").resolve():
        try:
            python = setup.ensure(more=[options.comfy] if options.comfy else [])
        except setup.SetupError as error:
            print(error, file=sys.stderr)
            return 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([str(python), __file__, *sys.argv[1:]], env=environment, check=False).returncode
    boot((options.comfy or setup.COMFY).resolve())
    {"start": start, "overhead": overhead, "sampling": sampling}[options.what](options)
    return 0


def boot(comfy: Path) -> None:
    """Make this process a quiet ComfyUI on the CPU, with one thread and the pack on its path."""
    import logging

    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.pop(0)
    sys.path.insert(0, str(comfy))
    sys.path.append(str(ROOT / "workers" / "import_root"))
    logging.disable(logging.WARNING)
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_num_threads(1)


def config(workers: int) -> Any:
    from comfy_raylight.raylight.config import ParallelConfig, PoolConfig

    return PoolConfig(parallel=ParallelConfig(world=workers, ulysses=workers, ring=1, cfg=1))


def checkpoint(folder: str, **size: int) -> Path:
    """A Wan checkpoint of these sizes."""
    from comfy_raylight.tests.host.checkpoints import Job, write

    path = Path(folder) / "wan.safetensors"
    write([Job(family="wan", path=path, size=size)], comfy_root=Path(sys.path[0]))
    return path


def start(options: argparse.Namespace) -> None:
    """Cold: no Ray, no workers. Then with Ray running, as after a failure."""
    from comfy_raylight.workers import pool, remote

    print(f"| pool of {options.workers} | total s | Ray s | workers s (spawn, import torch and ComfyUI) | groups s |")
    print("|---|---|---|---|---|")
    for name in ("cold", "Ray running"):
        began = time.perf_counter()
        laps = remote.start_pool(config(options.workers)).laps
        total = time.perf_counter() - began
        print(f"| {name} | {total:.1f} | {laps['ray']:.1f} | {laps['workers']:.1f} | {laps['groups']:.2f} |", flush=True)
        pool.close_all()


def overhead(options: argparse.Namespace) -> None:
    """Calls of a narrow model with many channels: large latents, little work."""
    import torch
    from comfy_raylight.raylight.config import ModelSpec
    from comfy_raylight.workers import remote

    channels = 2048
    context = torch.randn(1, 512, 4096)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = remote.load_model(
            config(options.workers), ModelSpec.of(checkpoint(folder, dim=128, ffn=128, layers=1, channels=channels))
        )
        print("| latent MB | overhead ms, median | worst | bytes of the first call | of later calls |")
        print("|---|---|---|---|---|")
        for megabytes, (frames, height, width) in {0.1: (1, 2, 6), 2: (1, 14, 18), 20: (5, 20, 26)}.items():
            x = torch.randn(1, channels, frames, height, width)
            times, sent = [], []
            for _ in range(CALLS + 1):
                x = x.roll(1)
                traffic = model.link.traffic()
                before = (traffic.seconds, traffic.worker_seconds, traffic.bytes_sent)
                began = time.perf_counter()
                answer = model.model.diffusion_model._forward(
                    x, torch.tensor([500.0]), context.clone(), transformer_options={"sigmas": x[0, 0, 0, 0]}
                )
                elapsed = time.perf_counter() - began
                assert answer.shape == x.shape
                times.append((elapsed - (traffic.worker_seconds - before[1])) * 1e3)
                sent.append(traffic.bytes_sent - before[2])
            own = x.nbytes
            print(
                f"| {own / 1e6:.1f} | {statistics.median(times[1:]):.2f} | {max(times[1:]):.2f} "
                f"| latent + {sent[0] - own} | latent + {max(sent[1:]) - own} |",
                flush=True,
            )
            context = torch.randn(1, 512, 4096)
            assert abs(own / 1e6 - megabytes) < 0.4 * megabytes + 0.1


def sampling(options: argparse.Namespace) -> None:
    """Alternating runs, so that both sides see the same machine."""
    import comfy.sample
    import comfy.sd
    import torch
    from comfy_raylight.raylight.config import ModelSpec
    from comfy_raylight.workers import remote

    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, 5, 40, 44, generator=generator)
    tokens = noise[0, 0].numel() // 4
    conditioning = [[torch.randn(1, 128, 4096, generator=generator), {}]]

    def run(model: Any) -> tuple[float, Any]:
        began = time.perf_counter()
        with torch.inference_mode():
            samples = comfy.sample.sample(
                model, noise, STEPS, 1.0, "euler", "simple", conditioning, conditioning, torch.zeros_like(noise),
                disable_pbar=True, seed=1,
            )  # fmt: skip
        return (time.perf_counter() - began) / STEPS, samples

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = checkpoint(folder, dim=768, ffn=3072, layers=8)
        plain = comfy.sd.load_diffusion_model(str(path))
        pooled = remote.load_model(config(options.workers), ModelSpec.of(path))
        measure: dict[str, Callable[[], tuple[float, Any]]] = {"plain": lambda: run(plain), "pool": lambda: run(pooled)}
        results = {name: call()[1] for name, call in measure.items()}
        traffic = pooled.link.traffic()
        before = (traffic.seconds, traffic.collective_seconds)
        seconds: dict[str, list[float]] = {name: [] for name in measure}
        for _ in range(ROUNDS):
            for name, call in measure.items():
                seconds[name].append(call()[0])
    difference = (results["plain"] - results["pool"]).abs().max() / results["plain"].abs().max()
    share = (traffic.collective_seconds - before[1]) / (traffic.seconds - before[0])
    plain_s, pool_s = (statistics.median(seconds[name]) for name in ("plain", "pool"))
    ratios = sorted(a / b for a, b in zip(seconds["plain"], seconds["pool"], strict=True))
    print(f"{tokens} tokens, width 768, 8 layers; medians of {ROUNDS} alternating runs of {STEPS} steps")
    print("| workers | plain s/step | pool s/step | speed-up (worst to best) | in collectives | difference |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {options.workers} | {plain_s:.3f} | {pool_s:.3f} | {plain_s / pool_s:.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {share:.0%} | {difference:.1e} |"
    )


if __name__ == "__main__":
    sys.exit(main())
