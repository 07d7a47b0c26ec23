"""Finds the plan of a model file's class and prints it as source, with its proof.

    python benchmarks/find_plan.py FILE --comfy ROOT [--size 6x10] [--frames 3] [--text 7] [--width N] [--pooled N]

FILE is a diffusion model as ComfyUI loads it; run this with the Python that runs the ComfyUI at ROOT. The model is
loaded in fp32, on the CPU, which takes four bytes of memory for each weight, and called as ComfyUI's sampling calls it,
with a small random latent and random text; OMP_NUM_THREADS is the number of threads, by default that of cores. The
widths of text and of pooled text are tried among the sizes of the model's weights; name them where that fails.
Whatever else a class is given (masks, references) is another kind of call: write a case for it.

Exit status: 0 a plan is printed, 1 there is none, 2 it could not run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment


class Unable(Exception):
    """Why it cannot run."""


def main() -> int:
    """Load, find, prove, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a diffusion model")
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("--size", default="", help="rows x columns of the latent (default: 6x10, in pixels 96x160)")
    parser.add_argument("--frames", type=int, default=3, help="of the latent, where it has any")
    parser.add_argument("--text", type=int, default=7, help="tokens of text")
    parser.add_argument("--width", type=int, help="of text")
    parser.add_argument("--pooled", type=int, help="width of pooled text")
    options = parser.parse_args()
    if not (options.comfy / "comfy").is_dir():
        parser.error(f"--comfy names {options.comfy}, which holds no ComfyUI")
    if not options.file.is_file():
        parser.error(f"there is no file {options.file}")
    environment.boot(options.comfy.resolve())
    try:
        return report(options)
    except Unable as why:
        print(why, file=sys.stderr)
        return 2


def report(options: argparse.Namespace) -> int:
    """Print what is found for a file; the exit code."""
    import comfy.sd
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    patcher = comfy.sd.load_diffusion_model(str(options.file), model_options={"dtype": torch.float32})
    base, diffusion = patcher.model, patcher.model.diffusion_model.requires_grad_(False)
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in diffusion.parameters()):
        diffusion.float()
    return tell(diffusion, *call_of(base, options))


def tell(model: Any, method: str, inputs: Any) -> int:
    """Print a model's plan with its proof, or why there is none; the exit code."""
    from comfy_raylight.raylight.found import proof
    from comfy_raylight.raylight.found.find import find
    from comfy_raylight.raylight.found.source import source
    from comfy_raylight.raylight.found.values import Refused

    name, start = type(model).__name__, time.perf_counter()
    try:
        known = find(model, getattr(model, method), inputs)
        held = proof.prove(model, method, known.plan, known.inputs)
    except Refused as why:
        print(f"{name} has no plan that was found: {why}")
        return 1
    ranks = ", ".join(map(str, proof.SIZES[:-1]))
    print(f"# {name}, found and proved in {time.perf_counter() - start:.1f} s: on {ranks} and {proof.SIZES[-1]} ranks")
    print(f"# within {held.error:.0e} of the model alone, for {len(known.inputs)} sizes of what it is given.")
    print(f"# It divides {held.share:.0%} of a forward's multiplications.")
    for note in (*known.notes, *held.notes):
        print(f"# {note}.")
    print(f"PLAN = {source(held.plan)}")
    return 0


def call_of(base: Any, options: argparse.Namespace) -> tuple[str, Any]:
    """The method that runs the model, and what ComfyUI calls it with.

    Raises:
        Unable: the model takes none of what was tried.
    """
    widths = list(sizes_of(base.diffusion_model))
    text = [options.width] if options.width else widths
    pooled = [options.pooled] if options.pooled else [0, *widths]
    last: Exception | None = None
    # some classes of pictures have a latent of videos
    for frames, wide, each in itertools.product(dict.fromkeys((options.frames, 1)), pooled, text):
        try:
            return call_with(base, options, width=each, pooled=wide, frames=frames)
        except Exception as error:
            # whatever it raises: it does not take a text of that width
            last = error
    raise Unable(
        f"{type(base.diffusion_model).__name__} takes no latent with text of any width among the sizes of its weights: "
        f"{type(last).__name__}: {last}. Name them with --width and --pooled, or write a case with its inputs."
    )


def sizes_of(model: Any) -> Iterator[int]:
    """Widths that layers outside of the blocks take, the largest first."""
    import torch

    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    every = ((name, p) for name, p in model.named_parameters() if p.ndim == 2)
    outside = {p.shape[1] for name, p in every if not name.startswith(inside)}
    yield from sorted(outside, reverse=True)


def call_with(base: Any, options: argparse.Namespace, *, width: int, pooled: int, frames: int) -> tuple[str, Any]:
    """As `call_of`, with text of one width and so many frames."""
    import torch
    from comfy_raylight.raylight.found.values import copied

    generator = torch.Generator().manual_seed(1)
    text = {"cross_attn": torch.randn(1, options.text, width, generator=generator)}
    if pooled:
        text["pooled_output"] = torch.randn(1, pooled, generator=generator)
    latent = torch.randn(shape_of(base.latent_format, options.size, frames), generator=generator)
    place = {"noise": latent, "device": latent.device, "width": latent.shape[-1] * 8, "height": latent.shape[-2] * 8}
    conditions = base.extra_conds(**place, **text)
    given = {
        name: condition.process_cond(batch_size=1, device=latent.device, area=None).cond
        for name, condition in conditions.items()
    }
    seen: dict[str, Any] = {}

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen["_forward"] = copied((args, kwargs))
        return executor(*args, **kwargs)

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen["forward"] = copied((args, kwargs))

    handle = base.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    wrappers = {"diffusion_model": {"find_plan": [wrapper]}}
    try:
        with torch.no_grad():
            base.apply_model(latent, torch.tensor([0.5]), **given, transformer_options={"wrappers": wrappers})
    finally:
        handle.remove()
    method = "_forward" if "_forward" in seen else "forward"
    args, kwargs = seen[method]
    return method, without_wrappers(args, kwargs)


def without_wrappers(args: Any, kwargs: Any) -> Any:
    """The call with transformer_options as they are without this wrapper."""

    def clean(value: Any) -> Any:
        return {k: v for k, v in value.items() if k != "wrappers"} if isinstance(value, dict) else value

    return tuple(map(clean, args)), {name: clean(value) for name, value in kwargs.items()}


def shape_of(latent_format: Any, size: str, frames: int) -> list[int]:
    """Of a small latent that has several tokens each way."""
    pixels = 16 if getattr(latent_format, "spacial_downscale_ratio", 8) == 1 else 1
    rows, columns = map(int, size.split("x")) if size else (6 * pixels, 10 * pixels)
    sizes = {1: [rows * columns], 2: [rows, columns], 3: [frames, rows, columns]}
    return [1, latent_format.latent_channels, *sizes[latent_format.latent_dimensions]]


if __name__ == "__main__":
    sys.exit(main())
