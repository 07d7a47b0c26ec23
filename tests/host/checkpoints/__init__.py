"""Writes small real checkpoints: random weights of ComfyUI's own model classes, which it detects as the family.

    python tests/host/checkpoints --comfy ROOT --make wan FILE dim=256 dtype=float32 [--make ...]

`write` does the same in a process of its own, since `comfy` can be imported once and for one ComfyUI only.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint to write.

    Attributes:
        family: a key of `recipes.RECIPES` or of `controls.SCHEMES`.
        path: the file; one that exists is kept.
        dtype: torch's name, or "" for the family's.
        size: overrides of the family's sizes.
        layout: "diffusers" for a file with its names and shapes, "" for ComfyUI's.
    """

    family: str
    path: Path
    dtype: str = ""
    seed: int = 0
    size: Mapping[str, int] = field(default_factory=dict)
    layout: str = ""


def write(jobs: Sequence[Job], *, comfy_root: Path, python: Path | None = None) -> None:
    """Write the checkpoints that do not exist yet, all in one process, which takes seconds to start.

    Args:
        comfy_root: the ComfyUI that must detect them.
        python: interpreter with ComfyUI's packages, by default the running one.
    """
    command = [str(python or sys.executable), str(Path(__file__).resolve().parent), "--comfy", str(comfy_root)]
    missing = [job for job in jobs if not job.path.is_file()]
    for job in missing:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        options = {"dtype": job.dtype, "seed": job.seed, "layout": job.layout, **job.size}
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
