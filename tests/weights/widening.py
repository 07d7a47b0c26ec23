"""LoRA files that widen a model's input layer, as control LoRAs do."""

from __future__ import annotations

import math
from pathlib import Path

from ..host.checkpoints import shapes

RANK = 8


def write_widening(checkpoint: Path, path: Path, layer: str, columns: int) -> Path:
    """Write a LoRA after which a layer of the checkpoint takes that many channels."""
    import torch
    from safetensors.torch import save_file

    rows, _, *kernel = shapes(checkpoint)[f"{layer}.weight"]
    draw, name = torch.Generator().manual_seed(5), f"diffusion_model.{layer}."
    save_file(
        {
            name + "lora_down.weight": torch.randn(RANK, columns, *kernel, generator=draw) / math.sqrt(columns),
            name + "lora_up.weight": torch.randn(rows, RANK, *[1] * len(kernel), generator=draw) / math.sqrt(RANK),
            name + "reshape_weight": torch.tensor([rows, columns, *kernel]),
        },
        path,
    )
    return path
