"""Mochi (comfy/ldm/genmo/joint_model/asymm_models_joint.py): video beside padded text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..raylight.cuts import Replicated, Rope, Split
from ..raylight.layout import Layout, Segment
from ..raylight.plan import Blocks, Head, Plan, Region


@dataclass(frozen=True)
class Count(Replicated):
    """A replicated segment given by the argument that says how many of its tokens attention sees."""

    def segment(self, value: Any) -> Segment:
        return Segment(self.name, value, whole=True)

    def __call__(self, value: Any, layout: Layout) -> Any:
        return value


MOCHI = Plan(
    Region(
        Blocks(
            at="blocks.*",
            order=("x", "y"),
            # blocks keep the padding behind the text; attention drops it
            streams={"x": Split(1, "x"), "crop_y": Count(1, "y")},
            shared={"rope_cos": Rope(dim=0), "rope_sin": Rope(dim=0)},
            outputs=(Split(1, "x"), Replicated(1, "y")),
            attention=("attn",),
        ),
        exit=Head("final_layer"),
    )
)
