"""AuraFlow (comfy/ldm/aura/mmdit.py): blocks of text (with register tokens) beside image, then of both in one."""

from ..raylight.cuts import Split
from ..raylight.plan import Blocks, Plan, Region

# no rope: positions are added before the blocks
AURAFLOW = Plan(
    Region(
        Blocks(
            at="double_layers.*",
            order=("txt", "img"),
            streams={"c": Split(1, "txt"), "x": Split(1, "img")},
            outputs=(Split(1, "txt"), Split(1, "img")),
            attention=("attn",),
        )
    ),
    # no Head: text tokens are dropped, and the rest modulated outside of any module
    Region(Blocks(at="single_layers.*", streams={"cx": Split(1)}, outputs=(Split(1),), attention=("attn",))),
)
