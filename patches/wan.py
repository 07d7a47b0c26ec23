"""Wan 2.1 and 2.2 (comfy/ldm/wan/model.py): text, image and reference to video, one or one per frame timestep."""

from ..raylight.plan import Blocks, Head, PerFrame, Plan, Region, Rope, Split

WAN = Plan(
    Region(
        Blocks(
            at="blocks.*",
            streams={"x": Split(1)},
            # a 3-D e is [B, 6, C]: not per frame
            shared={"freqs": Rope(), "e": PerFrame(1, ndim=4)},
            outputs=(Split(1),),
            attention=("self_attn",),
            patches=("attn1_patch", "attn2_patch"),
        ),
        # reference tokens are dropped after the head
        exit=Head("head", shared={"e": PerFrame(1, ndim=3)}),
    )
)
