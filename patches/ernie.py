"""ERNIE-Image (comfy/ldm/ernie/model.py): one stream of image and text."""

from ..raylight.cuts import Split
from ..raylight.plan import Blocks, Head, Plan, Region, Whole

ERNIE = Plan(
    Region(
        Blocks(at="layers.*", streams={"x": Split(1)}, outputs=(Split(1),), attention=()),
        # called without transformer_options, so that only whole tokens are right; the rest of a block is shared
        whole=(Whole("layers.*.self_attention", "x"),),
        # the norm before it treats every token by itself
        exit=Head("final_linear"),
    )
)
