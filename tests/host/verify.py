"""Checks in one process of plain ComfyUI that the checkpoints of `families` are worth comparing pools with.

    python tests/host/verify.py --comfy ROOT FOLDER [FAMILY ...]

Each must load as its class, sample without NaN, and answer to each of its inputs; one JSON line per family says how.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HOST = Path(__file__).resolve().parent
BLIND = 1e-4
"""Smallest change, over the largest output, that a comparison within 1e-5 surely sees."""


def check(name: str, folder: Path) -> dict[str, Any]:
    """Sample one family, then change its model's inputs one by one.

    Returns:
        The classes and dtypes found, and by input how much the output changes when it does: `far` is the end of the
        output when the first half of the latent changes, which only attention can bring about.
    """
    import comfy.sample
    import comfy.sd
    import torch

    from host.families import FAMILIES, case
    from host.nodes import RLTestConditioning, RLTestLatent
    from host.prompts import plain

    family, prompt = FAMILIES[name], plain(case(name))
    options = {"dtype": torch.float8_e4m3fn} if family.weight_dtype == "fp8_e4m3fn" else {}
    began = time.perf_counter()
    patcher = comfy.sd.load_diffusion_model(str(folder / prompt["loader"]["inputs"]["unet_name"]), options)
    loaded = time.perf_counter()
    model = patcher.model.diffusion_model
    assert type(model).__name__ == family.model, f"{name} is a {type(model).__name__}"
    conds = [RLTestConditioning().make(**prompt[side]["inputs"])[0] for side in ("positive", "negative")]
    latent = RLTestLatent().make(**prompt["latent"]["inputs"])[0]
    samples = latent["samples"]
    if hasattr(comfy.sample, "fix_empty_latent_channels"):
        samples = comfy.sample.fix_empty_latent_channels(patcher, samples)
    noise = comfy.sample.prepare_noise(samples, 7)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []

    def remember(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((copied(args), copied(kwargs)))

    with torch.inference_mode():
        hooks = [
            model.register_forward_pre_hook(remember, with_kwargs=True),
            model.register_forward_hook(lambda *given: outputs.append(copied(given[-1]))),
        ]
        result = comfy.sample.sample(
            patcher,
            noise,
            2,
            family.cfg,
            "euler",
            "simple",
            *conds,
            samples,
            denoise=family.denoise,
            noise_mask=latent.get("noise_mask"),
            seed=7,
        )
        for hook in hooks:
            hook.remove()
        parts = result.unbind() if getattr(result, "is_nested", False) else [result]
        assert all(part.isfinite().all() for part in parts), f"{name} gives NaN"
        report = reactions(model, *calls[0], parts_of(outputs[0]))
    return {
        "family": name,
        "config": type(patcher.model.model_config).__name__,
        "model": type(model).__name__,
        "weights": str(patcher.model.get_dtype()),
        "compute": str(patcher.model.manual_cast_dtype or patcher.model.get_dtype()),
        "std": min(float(part.std()) for part in parts),
        "reacts": report,
        "load_s": round(loaded - began, 2),
        "total_s": round(time.perf_counter() - began, 2),
    }


def reactions(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], first: list[Any]) -> dict[str, float]:
    """How much the output changes, from `first`, with each tensor among the inputs of a forward."""

    def output(args: Any, kwargs: Any) -> list[Any]:
        return parts_of(model(*copied(args), **copied(kwargs)))

    def change(found: list[Any]) -> float:
        return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(first, found, strict=True))

    report = {}
    given = {"args": args, "kwargs": {key: value for key, value in kwargs.items() if key != "transformer_options"}}
    for path, _ in tensors(given):
        other = replaced(given, path, jolted)
        report[".".join(map(str, path[1:]))] = change(output(other["args"], {**kwargs, **other["kwargs"]}))
    latent = next(path for path, _ in tensors(given))
    moved = replaced(given, latent, lambda value: halves(value)[0])
    after = output(moved["args"], kwargs)[0]
    report["far"] = float((halves(after)[1] - halves(first[0])[1]).abs().max() / first[0].abs().max())
    return report


def parts_of(output: Any) -> list[Any]:
    """The tensors of a model's output, which may be several."""
    return [part.float() for part in (output if isinstance(output, list | tuple) else [output])]


def jolted(value: Any) -> Any:
    """Another tensor of the same kind."""
    import torch

    if not value.is_floating_point():
        return value.roll(1, -1) if value.dtype is not torch.bool and value.max() > 1 else 1 - value
    if value.numel() <= 4 or value.ndim < 2:  # a timestep or a scale
        return value * 0.7 + 0.01
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(99)).to(value)


def halves(value: Any) -> tuple[Any, Any]:
    """The latent with another first half, of its frames, rows or else positions, and the last of these alone."""
    other = value.clone()
    dim = 2 if value.shape[2] > 1 else 3
    other.narrow(dim, 0, value.shape[dim] // 2).add_(1.0)
    return other, value.narrow(dim, value.shape[dim] - 1, 1)


def tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every tensor in nested containers, with the way to it."""
    import torch

    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from tensors(each, (*path, key))
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from tensors(each, (*path, number))


def replaced(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """The nested containers with the value at `path` changed."""
    if not path:
        return change(value)
    first, *rest = path
    if isinstance(value, dict):
        return {key: replaced(each, tuple(rest), change) if key == first else each for key, each in value.items()}
    items = [replaced(each, tuple(rest), change) if n == first else each for n, each in enumerate(value)]
    return type(value)(items)


def copied(value: Any) -> Any:
    """The nested containers with every tensor cloned: some models write into their inputs."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return type(value)(copied(each) for each in value) if isinstance(value, list | tuple) else value


def main() -> int:
    """Check the families named, or all that have a file in the folder."""
    parser = argparse.ArgumentParser(description="Check checkpoints in plain ComfyUI.")
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("folder", type=Path, help="where the checkpoints are, as FAMILY.safetensors")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    sys.path[0] = str(options.comfy.resolve())
    sys.path.append(str(HOST.parent))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("utils.extra_config")  # as main.py does: later comfy/utils.py would take its name
    from host.families import FAMILIES

    failed = 0
    for name in options.names or FAMILIES:
        file = options.folder / f"{FAMILIES[name].recipe or name}.safetensors"
        if not options.names and not file.is_file():
            continue
        try:
            report = check(name, options.folder)
            blind = [key for key, change in report["reacts"].items() if not change > BLIND]
            blind = [key for key in blind if key not in FAMILIES[name].ignores]
            report["blind"] = blind
        except Exception as error:
            report = {"family": name, "error": f"{type(error).__name__}: {error}"}
        failed += "error" in report or bool(report["blind"])
        print(json.dumps(report), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
