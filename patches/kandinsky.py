"""Kandinsky 5 (comfy/ldm/kandinsky5/model.py): text blocks stay whole, they are few and short."""

from ..raylight.cuts import Rope, Split
from ..raylight.plan import Blocks, Plan, Region

KANDINSKY5 = Plan(
    # no Head: the next line reshapes to the grid
    Region(
        Blocks(
            at="visual_transformer_blocks.*",
            streams={"visual_embed": Split(1)},
            shared={"freqs": Rope()},
            outputs=(Split(1),),
            attention=("self_attention",),
        )
    )
)
