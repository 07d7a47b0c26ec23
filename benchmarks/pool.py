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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from host import setup  # noqa: E402  (tests/ is on the path now)

ROUNDS = 3
CALLS = 25
STEPS = 2


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


def boot(root: Path) -> None:
    """Make this process a quiet ComfyUI on the CPU, with one thread and the pack on its path."""
    import logging

    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.pop(0)
    sys.path.insert(0, str(root))
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
        print(
            f"| {name} | {total:.1f} | {laps['ray']:.1f} | {laps['workers']:.1f} | {laps['groups']:.2f} |", flush=True
        )
        pool.close_all()


def overhead(options: argparse.Namespace) -> None:
    """Calls of a narrow model with many channels: large latents, little work."""
    import torch
    from comfy_raylight.raylight.config import ModelSpec
    from comfy_raylight.workers import remote

    channels = 2048
    sizes = {"1": 64, "8": 512}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = checkpoint(folder, dim=128, ffn=128, layers=1, channels=channels)
        model = remote.load_model(config(options.workers), ModelSpec.of(file))
        print("| latent MB | context MB | overhead ms, median | worst | bytes of the first call | of later calls |")
        print("|---|---|---|---|---|---|")
        for frames, height, width in ((1, 2, 6), (1, 14, 18), (5, 20, 26)):
            for name, tokens in sizes.items():
                x = torch.randn(1, channels, frames, height, width)
                context = torch.randn(1, tokens, 4096)
                times, sent = [], []
                for _ in range(CALLS + 1):
                    x, same = x.roll(1), context.clone()  # equal content in a new tensor, as ComfyUI makes it
                    traffic = model.link.traffic()
                    before = (traffic.worker_seconds, traffic.bytes_sent)
                    began = time.perf_counter()
                    answer = model.model.diffusion_model._forward(
                        x, torch.tensor([500.0]), same, transformer_options={"sigmas": x[0, 0, 0, 0]}
                    )
                    elapsed = time.perf_counter() - began
                    assert answer.shape == x.shape
                    times.append((elapsed - (traffic.worker_seconds - before[0])) * 1e3)
                    sent.append(traffic.bytes_sent - before[1] - x.nbytes)
                print(
                    f"| {x.nbytes / 1e6:.1f} | {name} | {statistics.median(times[1:]):.2f} | {max(times[1:]):.2f} "
                    f"| latent + {sent[0]} | latent + {max(sent[1:])} |",
                    flush=True,
                )


def sampling(options: argparse.Namespace) -> None:
    """Alternating runs, so that both sides see the same machine."""
    import comfy.sample
    import comfy.sd
    import torch
    from comfy_raylight.raylight.config import ModelSpec
    from comfy_raylight.workers import remote

    generator = torch.Generator().manual_seed(1)
    conditioning = [[torch.randn(1, 128, 4096, generator=generator), {}]]

    def run(model: Any, noise: torch.Tensor) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        samples = comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "simple", conditioning, conditioning, torch.zeros_like(noise),
            disable_pbar=True, seed=1,
        )  # fmt: skip
        return (time.perf_counter() - began) / STEPS, samples

    print(f"width 768, 8 layers, one thread each; medians of {ROUNDS} alternating runs of {STEPS} steps")
    print("| workers | tokens | plain s/step | pool s/step | speed-up (worst to best) | in collectives | difference |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = checkpoint(folder, dim=768, ffn=3072, layers=8)
        plain = comfy.sd.load_diffusion_model(str(path))
        pooled = remote.load_model(config(options.workers), ModelSpec.of(path))
        for width in (44, 88):
            noise = torch.randn(1, 16, 5, 40, width, generator=generator)
            first, second = run(plain, noise)[1], run(pooled, noise)[1]
            difference = (first - second).abs().max() / first.abs().max()
            traffic = pooled.link.traffic()
            before = (traffic.seconds, traffic.collective_seconds)
            seconds = [(run(plain, noise)[0], run(pooled, noise)[0]) for _ in range(ROUNDS)]
            share = (traffic.collective_seconds - before[1]) / (traffic.seconds - before[0])
            plain_s, pool_s = (statistics.median(column) for column in zip(*seconds, strict=True))
            ratios = sorted(a / b for a, b in seconds)
            print(
                f"| {options.workers} | {noise[0, 0].numel() // 4} | {plain_s:.3f} | {pool_s:.3f} | "
                f"{plain_s / pool_s:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {share:.0%} | {difference:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
