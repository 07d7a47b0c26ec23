"""Stable Diffusion 3 and 3.5 (comfy/ldm/modules/diffusionmodules/mmdit.py): text beside image."""

from ..raylight.cuts import Split
from ..raylight.plan import Blocks, Head, Plan, Region, Site

SD3 = Plan(
    Region(
        Blocks(
            at="joint_blocks.*",
            order=("txt", "img"),
            # the block's forward names no arguments
            streams={0: Split(1, "txt"), 1: Split(1, "img")},
            # the last block returns no text
            outputs=(Split(1, "txt"), Split(1, "img")),
            # 3.5 medium has a second attention, over the image alone
            attention=(Site(also=("img",)),),
        ),
        exit=Head("final_layer", outputs=(Split(1, "img"),)),
    )
)
