"""Flux.1 and Flux.2 (comfy/ldm/flux/model.py, layers.py): blocks of text beside image, then of both in one."""

from ..raylight.plan import Blocks, Plan, Ranges, Region, Rope, Split

FLUX = Plan(
    Region(
        Blocks(
            at="double_blocks.*",
            order=("txt", "img"),
            streams={"img": Split(1, "img"), "txt": Split(1, "txt")},
            shared={
                "pe": Rope("txt", "img"),
                "modulation_dims_img": Ranges("img"),
                "modulation_dims_txt": Ranges("txt"),
            },
            outputs=(Split(1, "img"), Split(1, "txt")),
            attention=("",),
        )
    ),
    # no Head: text tokens are dropped before the final layer
    Region(
        Blocks(
            at="single_blocks.*",
            streams={"x": Split(1)},
            shared={"pe": Rope(), "modulation_dims": Ranges()},
            outputs=(Split(1),),
            attention=("",),
        )
    ),
)
