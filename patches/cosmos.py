"""Cosmos Predict2, Anima and Cosmos 1 (comfy/ldm/cosmos/predict2.py, model.py, comfy/ldm/anima/model.py)."""

from __future__ import annotations

from typing import Any

from ..raylight.cuts import PerFrame, Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region

# one row, or one per frame
MODULATION = {"emb_B_T_D": PerFrame(1, ndim=3), "adaln_lora_B_T_3D": PerFrame(1, ndim=3)}

PREDICT2 = Plan(
    Region(
        Blocks(
            at="blocks.*",
            streams={"x_B_T_H_W_D": Split(1, grid=3)},
            shared={"rope_emb_L_1_1_D": Rope(), "extra_per_block_pos_emb": Split(1, grid=3), **MODULATION},
            outputs=(Split(1, grid=3),),
            attention=("self_attn",),
        ),
        exit=Head("final_layer", shared=MODULATION, outputs=(Split(1, grid=3),)),
    )
)


def cosmos1(model: Any) -> Plan:
    """Blocks are lists of parts, and which of them is self-attention is the checkpoint's choice."""
    parts = next(model.blocks.children()).blocks
    sites = [f"blocks.{index}.block.attn" for index, part in enumerate(parts) if part.block_type in ("full_attn", "fa")]
    return Plan(
        Region(
            Blocks(
                at="blocks.*",
                streams={"x": Split(0, grid=3)},
                shared={"rope_emb_L_1_1_D": Rope(dim=0)},
                outputs=(Split(0, grid=3),),
                attention=tuple(sites),
            ),
            # the model adds its position embedding between blocks
            per_block=True,
        )
    )
