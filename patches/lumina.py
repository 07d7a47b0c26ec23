"""Lumina Image 2 and Z-Image (comfy/ldm/lumina/model.py): the image's refiner, then layers over text and image."""

from ..raylight.plan import Blocks, Head, Plan, Ranges, Region, Rope, Split


def _blocks(at: str) -> Blocks:
    return Blocks(
        at=at,
        streams={"x": Split(1)},
        shared={"freqs_cis": Rope(), "timestep_zero_index": Ranges()},
        optional=("timestep_zero_index",),
        outputs=(Split(1),),
        attention=("attention",),
    )


LUMINA = Plan(
    Region(_blocks("noise_refiner.*")),
    Region(
        _blocks("layers.*"),
        exit=Head("final_layer", shared={"timestep_zero_index": Ranges()}, optional=("timestep_zero_index",)),
    ),
)
