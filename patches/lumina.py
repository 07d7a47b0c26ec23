"""Lumina Image 2, NewBie and Z-Image (comfy/ldm/lumina/model.py): the image's refiner, then layers over all tokens."""

from ..raylight.cuts import Ranges, Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region


def _blocks(at: str) -> Blocks:
    return Blocks(
        at=at,
        streams={"x": Split(1)},
        shared={"freqs_cis": Rope(), "timestep_zero_index": Ranges()},
        optional=("timestep_zero_index",),
        outputs=(Split(1),),
        attention=("attention",),
    )


# text and vision refiners stay whole, they are short
REFINER = Region(_blocks("noise_refiner.*"))

LUMINA = Plan(
    REFINER,
    Region(
        _blocks("layers.*"),
        exit=Head("final_layer", shared={"timestep_zero_index": Ranges()}, optional=("timestep_zero_index",)),
    ),
)

# no Head: the pixel decoder is given the image's tokens only
PIXEL_SPACE = Plan(REFINER, Region(_blocks("layers.*")))
