"""One LoRA-like file of each kind that ComfyUI applies, for the linear layers of a small model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..host.checkpoints import shapes

if TYPE_CHECKING:
    import torch

Draw = Callable[..., "torch.Tensor"]
RANK = 4

Make = Callable[[Draw, int, int], "Mapping[str, torch.Tensor]"]

ADAPTERS: dict[str, Make] = {}
"""By name: makes the tensors for a weight [rows, columns], by the end of their keys."""


def adapter(function: Make) -> Make:
    ADAPTERS[function.__name__] = function
    return function


@adapter
def lora(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {".lora_A.weight": draw(RANK, columns), ".lora_B.weight": draw(rows, RANK), ".alpha": draw().abs() + 2}


@adapter
def dora(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {**lora(draw, rows, columns), ".dora_scale": draw(rows, 1).abs() + 1}


@adapter
def loha(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {
        ".hada_w1_a": draw(rows, RANK),
        ".hada_w1_b": draw(RANK, columns),
        ".hada_w2_a": draw(rows, RANK),
        ".hada_w2_b": draw(RANK, columns),
    }


@adapter
def lokr(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {".lokr_w1": draw(8, 8), ".lokr_w2_a": draw(rows // 8, RANK), ".lokr_w2_b": draw(RANK, columns // 8)}


@adapter
def glora(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {
        ".a1.weight": draw(columns, RANK),
        ".a2.weight": draw(RANK, columns),
        ".b1.weight": draw(rows, RANK),
        ".b2.weight": draw(RANK, columns),
    }


@adapter
def oft(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {".oft_blocks": draw(rows // 8, 8, 8)}


@adapter
def boft(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {".oft_blocks": draw(2, rows // 8, 8, 8), ".alpha": draw().abs() + 5}


@adapter
def diff(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {".diff": draw(rows, columns) / 4, ".diff_b": draw(rows)}


@adapter
def replaced(draw: Draw, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    return {".set_weight": draw(rows, columns)}


def write_adapter(checkpoint: Path, path: Path, kind: str, *, seed: int = 1, part: str = "attn") -> Path:
    """Write an adapter of a kind for the linear layers with `part` in their names."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (0.5 / math.sqrt(shape[-1]) if shape else 1.0)

    tensors = {}
    for key, shape in shapes(checkpoint).items():
        if "blocks." in key and part in key and key.endswith(".weight") and len(shape) == 2:
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            made = ADAPTERS[kind](draw, *shape)
            tensors.update({name + end: value.contiguous() for end, value in made.items()})
    assert tensors, f"{checkpoint} has no weights with {part!r}"
    save_file(tensors, path)
    return path
