"""The same prompts on plain ComfyUI and on a pool of workers: pictures, equality, speed, and memory.

    python benchmarks/demo.py [--workers 2] [--steps 5] [--comfy PATH] [--words red circle right]

Sets everything up on a fresh machine (see tests/host/setup.py). First the demo model of examples/comfyui makes a small
animation, by examples/api/demo.json and by the same prompt with ComfyUI's own nodes. It is too small to gain by
sharing: speed and memory are those of a wider model of random weights, plain ComfyUI with the threads of one worker.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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
CORE: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "RayUNETLoader": ("UNETLoader", {"ray_actors_init": ""}),
    "RayModelSamplingSD3": ("ModelSamplingSD3", {"ray_actors": "model"}),
    "XFuserKSamplerAdvanced": ("KSamplerAdvanced", {"ray_actors": "model"}),
    "RayVAEDecodeDistributed": ("VAEDecode", {}),
}
"""ComfyUI's nodes for those of the demo's prompt, and its names of their inputs; "" for none."""
ENLARGED = 4
"""Pixels of an animation for each of the demo's."""


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
    root = options.comfy or setup.COMFY
    if setup.inside(root):
        return compare(options)
    try:
        setup.ensure()
        python = setup.ensure(root)
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

    from browser import files
    from host import checkpoints
    from host.client import PromptError
    from host.server import ComfyServer

    comfy = options.comfy or setup.COMFY
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    shutil.rmtree(FOLDER / "comfy", ignore_errors=True)
    with ComfyServer(comfy, base=FOLDER / "comfy", threads=threads) as server:
        print(f"ComfyUI at {comfy} answers, {threads} thread(s)", flush=True)
        files.copy_demo(server.base)
        checkpoints.write(
            [checkpoints.Job(family="wan", path=server.models / "wan.safetensors", size=SIZE)], comfy_root=comfy
        )
        with server.client() as client:
            shown = None if options.only else animations(server, client, options)
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
    assert shown is not None
    return 0 if beside(shown["plain"], shown["pool"], FOLDER) and equal else 1


def animations(server: ComfyServer, client: ComfyClient, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What the demo's prompt makes on both sides: (frames, height, width, 3), from 0 to 1."""
    from browser import files
    from safetensors.torch import load_file

    prompt = files.demo_prompt(options.words)
    for node in prompt.values():
        if node["class_type"] == "RayInitializer":
            node["inputs"].update(GPU=options.workers, ulysses_degree=options.workers)
    found = {}
    for name, side in {"plain": without_pool(prompt), "pool": prompt}.items():
        images = next(node["inputs"]["images"] for node in side.values() if node["class_type"] == "SaveAnimatedWEBP")
        saved = {"class_type": "RLTestSavePixels", "inputs": {"images": images, "name": f"demo-{name}"}}
        client.run({**side, "pixels": saved})
        found[name] = load_file(server.output / f"demo-{name}.safetensors")["pixels"]
    client.free()
    return found


def without_pool(prompt: Prompt) -> Prompt:
    """The demo's prompt with ComfyUI's own nodes in place of this pack's."""
    plain: Prompt = {}
    for number, node in prompt.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        if kind in ("RayInitializer", "RayReport"):
            continue
        if kind in CORE:
            kind, kept = CORE[kind]
            inputs = {kept.get(name, name): value for name, value in inputs.items() if kept.get(name, name)}
        if node["class_type"] == "RayVAEDecodeDistributed":
            plain["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": node["inputs"]["vae_name"]}}
            inputs = {"samples": inputs["samples"], "vae": ["vae", 0]}
        plain[number] = {"class_type": kind, "inputs": inputs}
    return plain


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
        second = client.run(build(replace(case, steps=steps, seed=2, name=name)))
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


def beside(plain: torch.Tensor, pool: torch.Tensor, folder: Path) -> bool:
    """Write each animation, and one of both with their difference times 100; whether they are equal."""
    difference = (pool - plain).abs()
    most = difference.max().item()
    panels = {"plain ComfyUI": plain, "pool": pool, "difference x 100": (difference * 100).clamp(0, 1)}
    for name, part in {"plain": [plain], "pool": [pool]}.items():
        animate(part, [], folder / f"{name}.webp")
    path = animate(list(panels.values()), list(panels), folder / "comparison.webp")
    print(f"\nThe demo's animations differ by {most:.1e} at most, where the largest value is {plain.max().item():.2f}")
    print(f"Look at {path} (and plain.webp and pool.webp beside it)")
    return most <= TOLERANCE


def animate(panels: list[torch.Tensor], labels: list[str], path: Path) -> Path:
    """Write videos (frames, height, width, 3) side by side, enlarged, with labels above them."""
    import torch
    from PIL import Image, ImageDraw

    strip = torch.cat(panels, dim=2).mul(255).round().byte().numpy()
    head, frames = (20 if labels else 0), []
    for number in range(len(strip)):
        row = Image.fromarray(strip[number])
        row = row.resize((row.width * ENLARGED, row.height * ENLARGED), Image.Resampling.NEAREST)
        frame = Image.new("RGB", (row.width, row.height + head))
        frame.paste(row, (0, head))
        for column, label in enumerate(labels):
            ImageDraw.Draw(frame).text((column * row.width // len(labels) + 4, 4), label)
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=120, loop=0, lossless=True)
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
    words = "what moves in the animation: its colour, its shape, and its direction (default red circle right)"
    parser.add_argument("--words", nargs=3, default=["red", "circle", "right"], metavar="WORD", help=words)
    options = parser.parse_args()
    if options.steps < 2 or options.workers < 1:
        parser.error("--steps must be at least 2, --workers at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
