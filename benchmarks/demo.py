"""The same prompt on plain ComfyUI and on a pool of workers: equality, speed, memory, and a picture.

    python benchmarks/demo.py [--workers 2] [--steps 5] [--comfy PATH]

Sets everything up on a fresh machine (see tests/host/setup.py). Plain ComfyUI runs with the threads of one worker.
The weights are random, so the picture shows noise; what counts is that both sides show the same.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from host import setup

if TYPE_CHECKING:
    import torch
    from host.client import ComfyClient, Prompt, Result
    from host.prompts import Case
    from host.server import ComfyServer

FOLDER = setup.HOME / "demo"
TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest value of the plain result."""
SIZE = {"dim": 768, "ffn": 3072, "layers": 8}


@dataclass(frozen=True)
class Half:
    """What one side of the comparison gave.

    Attributes:
        start: seconds of the nodes before the sampler in the first prompt (pool start, load).
        step: mean seconds per step of the second prompt.
        memory: peak host memory of ComfyUI and everything it started, in bytes.
    """

    samples: torch.Tensor
    start: float
    step: float
    memory: int


def main() -> int:
    """Set up, then run the comparison in the environment."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options = _options()
    if Path(sys.prefix).resolve() == (setup.HOME / "venv").resolve():
        return compare(options)
    try:
        python = setup.ensure(more=[options.comfy] if options.comfy else [])
    except setup.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    command = [str(python), str(Path(__file__).resolve()), *sys.argv[1:]]
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    print(f"comparison: {time.monotonic() - start:.0f} s without the set-up")
    return code


def compare(options: argparse.Namespace) -> int:
    """Run both halves and print the table; 0 if the results are equal within `TOLERANCE`."""
    import shutil

    from host import checkpoints
    from host.client import PromptError
    from host.server import ComfyServer

    comfy = options.comfy or setup.COMFY
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    shutil.rmtree(FOLDER / "comfy", ignore_errors=True)
    with ComfyServer(comfy, base=FOLDER / "comfy", threads=threads) as server:
        print(f"ComfyUI at {comfy} answers, {threads} thread(s)", flush=True)
        checkpoints.write(
            [checkpoints.Job(family="wan", path=server.models / "wan.safetensors", size=SIZE)], comfy_root=comfy
        )
        with server.client() as client:
            halves = {}
            for name, build in _builders(options.workers).items():
                if options.only not in ("", name):
                    continue
                try:
                    halves[name] = measure(server, client, build, name=name, steps=options.steps)
                except PromptError as error:
                    print(f"{name} failed: {error}\nThe log is {server.base / 'comfyui.log'}", file=sys.stderr)
                    return 1
                print(f"{name}: {halves[name].step:.2f} s per step", flush=True)
    if options.only:
        return 0
    equal = table(halves["plain"], halves["pool"], workers=options.workers, threads=threads)
    print(f"picture: {picture(halves['plain'].samples, halves['pool'].samples, FOLDER / 'comparison.webp')}")
    return 0 if equal else 1


def measure(
    server: ComfyServer, client: ComfyClient, build: Callable[[Case], Prompt], *, name: str, steps: int
) -> Half:
    """Queue a short prompt, which starts and loads, then the measured one with another seed."""
    from host.processes import PeakMemory
    from host.prompts import FAMILIES, INIT, LOADER, Case
    from safetensors.torch import load_file

    # 5 x 20 x 20 patches: 2000 tokens
    inputs = replace(FAMILIES["wan"], frames=5, height=40, width=40)
    case = Case(file="wan.safetensors", inputs=inputs, cfg=1.0, steps=1, seed=1, name=f"{name}-first")
    with PeakMemory(server.pid) as peak:
        first = client.run(build(case))
        second = client.run(build(replace(case, steps=steps, seed=2, name=name, animate=name)))
    client.free()
    seconds = first.node_seconds()
    return Half(
        samples=load_file(server.output / f"{name}.safetensors")["samples"],
        start=seconds.get(INIT, 0.0) + seconds[LOADER],
        step=_mean_step(second),
        memory=peak.bytes,
    )


def table(plain: Half, pool: Half, *, workers: int, threads: int) -> bool:
    """Print the comparison and return whether the results are equal."""
    difference = (pool.samples - plain.samples).abs().max().item()
    relative = difference / plain.samples.abs().max().item()
    shape = "x".join(map(str, plain.samples.shape))
    rows = [
        ("", "plain ComfyUI", f"pool, {workers} workers"),
        ("threads", f"{threads}", f"{workers} x {threads}"),
        ("start and load, s", f"{plain.start:.1f}", f"{pool.start:.1f}"),
        ("seconds per step", f"{plain.step:.2f}", f"{pool.step:.2f}"),
        ("speed-up", "1.00", f"{plain.step / pool.step:.2f}"),
        ("peak host memory, GiB", f"{plain.memory / 2**30:.2f}", f"{pool.memory / 2**30:.2f}"),
        ("max difference, absolute", "", f"{difference:.1e}"),
        ("max difference, relative", "", f"{relative:.1e}"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print(f"\nWan-like model, {SIZE['dim']} wide, {SIZE['layers']} layers, fp32, latent {shape}\n")
    for number, row in enumerate(rows):
        label, *cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print("| " + " | ".join([label, *cells]) + " |")
        if number == 0:
            print("|-" + "-|-".join("-" * width for width in widths) + "-|")
    verdict = "equal" if relative <= TOLERANCE else "NOT equal"
    print(f"\nThe results are {verdict} (relative difference allowed: {TOLERANCE:.0e})")
    return relative <= TOLERANCE


def picture(plain: torch.Tensor, pool: torch.Tensor, path: Path) -> Path:
    """Write an animation: plain, pool, and their difference on the same scale times 100."""
    import torch
    from PIL import Image, ImageDraw

    low, span = plain.mean() - 2.5 * plain.std(), 5 * plain.std()
    panels = {"plain ComfyUI": (plain - low) / span, "pool": (pool - low) / span}
    panels["difference x 100"] = (pool - plain).abs() / span * 100
    frames = []
    for number in range(plain.shape[2]):
        parts = [values[0, :3, number].clamp(0, 1) for values in panels.values()]
        row = torch.nn.functional.interpolate(torch.cat(parts, dim=2)[None], scale_factor=8)[0]
        frame = Image.new("RGB", (row.shape[2], row.shape[1] + 16))
        frame.paste(Image.fromarray((row.movedim(0, -1) * 255).byte().numpy()), (0, 16))
        draw = ImageDraw.Draw(frame)
        for column, label in enumerate(panels):
            draw.text((column * row.shape[2] // len(panels) + 4, 2), label)
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, loop=0, lossless=True)
    return path


def _builders(workers: int) -> dict[str, Callable[[Case], Prompt]]:
    from host import prompts

    where = prompts.PoolCase(workers=workers)
    return {"plain": prompts.plain, "pool": lambda case: prompts.pool(case, where)}


def _mean_step(result: Result) -> float:
    seconds = result.step_seconds()
    return sum(seconds) / len(seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="workers of the pool (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="sampling steps of the measured prompts (default 5)")
    parser.add_argument("--comfy", type=Path, help="another ComfyUI than the default host")
    parser.add_argument("--only", choices=("plain", "pool"), default="", help="run one half, without the table")
    options = parser.parse_args()
    if options.steps < 2 or options.workers < 1:
        parser.error("--steps must be at least 2, --workers at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
