"""Writes small real checkpoints: random weights of ComfyUI's own model classes, which it detects as the family.

    python tests/host/checkpoints.py --comfy ROOT --make wan FILE dim=256 dtype=float32 [--make ...]

`write` does the same in a process of its own, since `comfy` can be imported once and for one ComfyUI only.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BLOCK = (1 << 20) + 7
"""Random values drawn per file. Large weights repeat them; the odd length keeps their rows different."""
GAIN = 0.8


@dataclass(frozen=True)
class Recipe:
    """How to build a family: its model on the meta device, the detected class, sizes and dtype by default."""

    build: Callable[[Mapping[str, int]], torch.nn.Module]
    detected: str
    dtype: str
    size: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint to write.

    Attributes:
        family: a key of `RECIPES`.
        path: the file; one that exists is kept.
        dtype: torch's name, or "" for the family's.
        size: overrides of the family's sizes.
    """

    family: str
    path: Path
    dtype: str = ""
    seed: int = 0
    size: Mapping[str, int] = field(default_factory=dict)


def write(jobs: Sequence[Job], *, comfy_root: Path, python: Path | None = None) -> None:
    """Write the checkpoints that do not exist yet, all in one process, which takes seconds to start.

    Args:
        comfy_root: the ComfyUI that must detect them.
        python: interpreter with ComfyUI's packages, by default the running one.
    """
    command = [str(python or sys.executable), str(Path(__file__).resolve()), "--comfy", str(comfy_root)]
    missing = [job for job in jobs if not job.path.is_file()]
    for job in missing:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        options = {"dtype": job.dtype, "seed": job.seed, **job.size}
        command += ["--make", job.family, str(job.path), *(f"{name}={value}" for name, value in options.items())]
    if missing:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"no checkpoints for {comfy_root}:\n{done.stderr[-3000:]}")


def lora(checkpoint: Path, path: Path, *, rank: int = 4, seed: int = 1, strength: float = 0.3) -> Path:
    """Write a LoRA for the attention weights of `checkpoint` to `path`; ComfyUI is not needed."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for key, shape in shapes(checkpoint).items():
        if "attn" in key and key.endswith(".weight") and len(shape) == 2:
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            down = torch.randn(rank, shape[1], generator=generator) / math.sqrt(shape[1])
            adapters[f"{name}.lora_A.weight"] = down
            adapters[f"{name}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator) * strength
    assert adapters, f"{checkpoint} has no attention weights"
    save_file(adapters, path)
    return path


def shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Shape of every tensor of a safetensors file."""
    with checkpoint.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}


def _meta() -> dict[str, Any]:
    import comfy.ops
    import torch

    return {"device": "meta", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}


def _wan(size: Mapping[str, int], **more: Any) -> torch.nn.Module:
    from comfy.ldm.wan.model import WanModel

    model: torch.nn.Module = WanModel(
        dim=size["dim"],
        ffn_dim=size["ffn"],
        num_heads=size["dim"] // 128,
        num_layers=size["layers"],
        **{"model_type": "t2v", "in_dim": size["channels"], "out_dim": size["channels"], **more},
        **_meta(),
    )
    return model


def _wan_i2v(size: Mapping[str, int]) -> torch.nn.Module:
    return _wan(size, model_type="i2v", in_dim=36)


def _flux(size: Mapping[str, int]) -> torch.nn.Module:
    from comfy.ldm.flux.model import Flux, FluxParams

    # ComfyUI before 0.4 takes every Flux to have 24 heads
    narrow = "txt_ids_dims" in {field.name for field in fields(FluxParams)}
    dim = size["dim"] if narrow else 3072
    more: dict[str, Any] = {"txt_ids_dims": []} if narrow else {}
    model: torch.nn.Module = Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=size["pooled"],
        context_in_dim=size["context"],
        hidden_size=dim,
        mlp_ratio=4.0,
        num_heads=dim // 128,
        depth=size["double"],
        depth_single_blocks=size["single"],
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        **more,
        **_meta(),
    )
    return model


def _next_dit(size: Mapping[str, int], **more: Any) -> torch.nn.Module:
    from comfy.ldm.lumina.model import NextDiT

    model: torch.nn.Module = NextDiT(
        patch_size=2,
        in_channels=16,
        n_layers=size["layers"],
        cap_feat_dim=size["context"],
        qk_norm=True,
        **more,
        **_meta(),
    )
    return model


def _zimage(size: Mapping[str, int]) -> torch.nn.Module:
    return _next_dit(
        size,
        dim=3840,
        n_heads=30,
        n_kv_heads=30,
        axes_dims=[32, 48, 48],
        ffn_dim_multiplier=8.0 / 3.0,
        z_image_modulation=True,
        pad_tokens_multiple=32,
    )


def _lumina2(size: Mapping[str, int]) -> torch.nn.Module:
    return _next_dit(size, dim=2304, n_heads=24, n_kv_heads=8, axes_dims=[32, 32, 32], ffn_dim_multiplier=4.0)


def _unet(size: Mapping[str, int]) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model: torch.nn.Module = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1, 1],
        channel_mult=(1, 1),
        transformer_depth=[1, 1],
        transformer_depth_middle=1,
        transformer_depth_output=[1, 1, 1, 1],
        context_dim=size["context"],
        num_heads=8,
        use_spatial_transformer=True,
        legacy=False,
        **_meta(),
    )
    return model


RECIPES: Mapping[str, Recipe] = {
    "wan": Recipe(_wan, "WAN21_T2V", "float32", {"dim": 256, "ffn": 512, "layers": 2, "channels": 16}),
    "wan_i2v": Recipe(_wan_i2v, "WAN21_I2V", "float32", {"dim": 256, "ffn": 512, "layers": 2, "channels": 16}),
    "flux": Recipe(_flux, "Flux", "bfloat16", {"dim": 256, "double": 1, "single": 1, "context": 4096, "pooled": 768}),
    "zimage": Recipe(_zimage, "ZImage", "bfloat16", {"layers": 1, "context": 64}),
    "lumina2": Recipe(_lumina2, "Lumina2", "bfloat16", {"layers": 1, "context": 64}),
    "unet": Recipe(_unet, "SD15", "float32", {"context": 768}),
}
"""Families by name. Widths that ComfyUI fixes (Z-Image, Lumina2, older Flux) cannot be made smaller."""


def _fill(model: torch.nn.Module, *, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near 1: matrices by their fan-in, norm weights about 1, small biases."""
    import torch

    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))
    result = {}
    for number, (key, weight) in enumerate(model.state_dict().items()):
        if weight.ndim > 1 and weight.shape[0] > 1:
            mean, scale = 0.0, GAIN / math.sqrt(weight[0].numel())
        elif weight.ndim > 1:  # modulation tables and padding tokens, one row for all
            mean, scale = 0.0, 0.3
        elif key.endswith(("weight", "scale")):
            mean, scale = 1.0, 0.1
        else:
            mean, scale = 0.0, 0.02
        values = (mean + scale * noise.roll(-7919 * number % BLOCK)).to(dtype)
        count = weight.numel()
        result[key] = values.repeat(-(-count // BLOCK))[:count].view(weight.shape).contiguous()
    return result


def _job(parser: argparse.ArgumentParser, words: Sequence[str]) -> Job:
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        parser.error(f"--make needs FAMILY FILE [NAME=VALUE ...], not {' '.join(words)}")
    family, path, *options = words
    given = dict(option.split("=", 1) for option in options)
    dtype, seed = given.pop("dtype", ""), int(given.pop("seed", "0"))
    if family not in RECIPES:
        parser.error(f"no family {family}, only {', '.join(RECIPES)}")
    if unknown := given.keys() - RECIPES[family].size.keys():
        parser.error(f"{family} has no size {', '.join(unknown)}, only {', '.join(RECIPES[family].size)}")
    sizes = {name: int(value) for name, value in given.items()}
    return Job(family=family, path=Path(path), dtype=dtype, seed=seed, size=sizes)


def _make(job: Job) -> str:
    """Write one checkpoint and describe it."""
    import comfy.model_detection
    import torch
    from safetensors.torch import save_file

    recipe = RECIPES[job.family]
    dtype = getattr(torch, job.dtype or recipe.dtype)
    weights = _fill(recipe.build({**recipe.size, **job.size}), dtype=dtype, seed=job.seed)
    found = type(comfy.model_detection.model_config_from_unet(weights, "")).__name__
    if found != recipe.detected:
        raise RuntimeError(f"ComfyUI takes this {job.family} for {found}, not {recipe.detected}")
    partial = job.path.with_suffix(".partial")
    save_file(weights, partial)
    partial.replace(job.path)
    size = sum(weight.nbytes for weight in weights.values())
    return f"{job.path}: {found}, {dtype}, {len(weights)} tensors, {size >> 20} MiB"


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    help_make = (
        f"FAMILY FILE [NAME=VALUE ...]: one of {', '.join(RECIPES)}; the file; dtype, seed and sizes; may be repeated"
    )
    parser.add_argument("--make", nargs="+", action="append", required=True, metavar="WORD", help=help_make)
    options = parser.parse_args()
    jobs = [_job(parser, words) for words in options.make]

    # In place of this folder, which has a `nodes` of its own as ComfyUI has
    sys.path[0] = str(options.comfy.resolve())
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    for job in jobs:
        print(_make(job), flush=True)


if __name__ == "__main__":
    _main()
