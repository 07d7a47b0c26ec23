"""SD1.5, SD2, SDXL and what is built like them (comfy/ldm/modules/diffusionmodules/openaimodel.py)."""

from __future__ import annotations

import re

from torch import nn

from ..raylight.plan import RowPlan

BLOCK = re.compile(r"(^|\.)transformer_blocks\.\d+$")
"""Not `time_stack`, whose attention is over the frames of each position."""
ANY_LAYER = "forward_timestep_embed_patch"
"""Takes the place of a layer, which needs its neighbours' rows."""
AROUND_ATTENTION = frozenset(
    {"attn1_patch", "attn1_output_patch", "attn2_patch", "attn2_output_patch", "middle_patch", "attn1", "attn2"}
)


def unet(model: nn.Module) -> RowPlan:
    """The plan of a UNetModel."""
    parts = dict(model.named_modules())
    blocks = {name: part for name, part in parts.items() if BLOCK.search(name)}
    refused = {ANY_LAYER}
    if any("time_stack" in name for name in parts):
        # called for tokens in time as well
        refused |= AROUND_ATTENTION
    attending = [name for name, block in blocks.items() if not block.disable_self_attn]
    if len(attending) < len(blocks):
        # where it is off, tokens of the text take the place of the picture's
        refused |= {"attn1_patch", "attn1"}
    return RowPlan(
        halvings=sum(type(part).__name__ == "Downsample" for part in parts.values()),
        attention=tuple(f"{name}.attn1" for name in attending),
        cross=tuple(
            path
            for name, block in blocks.items()
            for path, there in (
                (f"{name}.attn1", block.disable_self_attn),
                (f"{name}.attn2", block.attn2 is not None),
            )
            if there
        ),
        refused=frozenset(refused),
    )
