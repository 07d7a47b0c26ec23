"""Flux.1 and Flux.2 (comfy/ldm/flux/model.py, layers.py): blocks of text beside image, then of both in one."""

from ..raylight.cuts import Ranges, Rope, Split
from ..raylight.plan import Blocks, Plan, Region

PATCHES = {"attn1_patch": 2, "attn1_output_patch": 1}
"""The first sees q, k, v [B, H, L, D] and pe, the second [B, L, C]."""


def double_blocks(order: tuple[str, ...] = ("txt", "img")) -> Blocks:
    """Blocks with a stream for text and one for the image, which attention concatenates in `order`."""
    return Blocks(
        at="double_blocks.*",
        order=order,
        streams={"img": Split(1, "img"), "txt": Split(1, "txt")},
        shared={
            "pe": Rope(*order),
            "modulation_dims_img": Ranges("img"),
            "modulation_dims_txt": Ranges("txt"),
        },
        outputs=(Split(1, "img"), Split(1, "txt")),
        attention=("",),
        patches=PATCHES,
    )


def single_blocks() -> Blocks:
    """Blocks over both as one stream: cut as a whole, so their order does not matter."""
    return Blocks(
        at="single_blocks.*",
        streams={"x": Split(1)},
        shared={"pe": Rope(), "modulation_dims": Ranges()},
        outputs=(Split(1),),
        attention=("",),
        patches=PATCHES,
    )


# no Head: text tokens are dropped before the final layer
FLUX = Plan(Region(double_blocks()), Region(single_blocks()))
