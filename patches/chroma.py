"""Chroma (comfy/ldm/chroma/model.py) and its pixel-space variant Radiance (comfy/ldm/chroma_radiance/model.py)."""

from collections.abc import Collection
from typing import Any

from ..raylight.cuts import Split
from ..raylight.plan import Blocks, Plan, Region
from .flux import double_blocks, single_blocks

NERF = Region(
    # a token is a patch of one picture here, [B * patches, pixels, C]; they do not see each other
    Blocks(
        at="nerf_blocks.*",
        streams={"x": Split(0)},
        shared={"s": Split(0)},
        outputs=(Split(0),),
        attention=(),
    )
    # no Head: a convolution may follow
)
"""What turns each patch's token into its pixels: 7 % of Radiance's work, run by every rank if it were not cut."""


def chroma(model: Any) -> Plan:
    """The plan of a Chroma model, with what it skips."""
    return Plan(*_transformer(model))


def radiance(model: Any) -> Plan:
    """The plan of a Chroma Radiance model, with what it skips."""
    return Plan(*_transformer(model), NERF)


def _transformer(model: Any) -> tuple[Region, Region]:
    return (
        _region(double_blocks(), len(model.double_blocks), model.skip_mmdit),
        _region(single_blocks(), len(model.single_blocks), model.skip_dit),
    )


def _region(blocks: Blocks, count: int, skipped: Collection[int]) -> Region:
    # tokens enter at the first block and leave at the last: where one of them never runs, at every block
    return Region(blocks, per_block=0 in skipped or count - 1 in skipped)
