"""Krea 2 (comfy/ldm/krea2/model.py): text and picture, with references behind it, in one sequence."""

from ..raylight.cuts import Index, Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region

KREA2 = Plan(
    Region(
        Blocks(
            at="blocks.*",
            streams={"x": Split(1)},
            shared={"freqs": Rope(), "timestep_zero_index": Index()},
            outputs=(Split(1),),
            attention=("attn",),
        ),
        exit=Head("last"),
    )
)
