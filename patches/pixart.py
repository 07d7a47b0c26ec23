"""PixArt Alpha and Sigma (comfy/ldm/pixart/pixartms.py)."""

from ..raylight.cuts import Split
from ..raylight.plan import Blocks, Head, Plan, Region, Whole

PIXART = Plan(
    Region(
        Blocks(at="blocks.*", streams={"x": Split(1)}, outputs=(Split(1),), attention=()),
        # called without transformer_options, so that only whole tokens are right; the rest of a block is shared.
        # It may also shrink its keys on the image's grid
        whole=(Whole("blocks.*.attn", "x"),),
        exit=Head("final_layer"),
    )
)
