"""Ideogram 4 (comfy/ldm/ideogram4/model.py): text and picture in one sequence; without text the picture alone."""

from ..raylight.cuts import Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region

IDEOGRAM4 = Plan(
    Region(
        Blocks(
            at="layers.*",
            streams={"x": Split(1)},
            shared={"freqs_cis": Rope()},
            outputs=(Split(1),),
            attention=("attention",),
        ),
        exit=Head("final_layer"),
    )
)
