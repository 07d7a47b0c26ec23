"""MiniMax-H3 (comfy/ldm/minimax/model.py): text, references, sound and video in one sequence, without a batch dim."""

from __future__ import annotations

from typing import Any

import torch

from ..raylight.cuts import Rope, Split, Stretch
from ..raylight.layout import Layout
from ..raylight.plan import Blocks, Called, Head, Plan, Region

Segment = tuple[int, int, Any]
"""(start, stop, row of the modulation table, or int64 [stop - start] with one for each token)."""


def segment(value: Segment, layout: Layout) -> Segment:
    """A segment of the sequence as this rank's tokens have it; it may be empty."""
    start, stop, row = value
    first, last = (layout.boundary(position, over=("x",)) for position in (start, stop))
    if isinstance(row, torch.Tensor):
        row = row[layout.positions(("x",), device=row.device)[first:last] - start]
    return first, last, row


def segments(value: list[Segment], layout: Layout) -> list[Segment]:
    """All of them, without those of which this rank has nothing."""
    return [found for found in (segment(each, layout) for each in value) if found[0] < found[1]]


MINIMAX = Plan(
    # the text refiner is short and stays whole
    Region(
        Blocks(
            at="blocks.*",
            streams={"x": Split(0)},
            shared={"rope_freqs": Rope(dim=1), "mod_segments": segments},
            outputs=(Split(0),),
            attention=("attn",),
            # after 0.33 a node (Model Sparse Attention) may hand blocks another one, which projects q, k and v itself
            called={"attention": Called(stream=Split(0), shared=("rope_freqs",))},
        ),
        # video and sound leave by themselves: 512 bytes for each token in place of the whole width
        exit=Head(
            "final_layer",
            shared={"video_seg": segment, "audio_seg": segment},
            outputs=(Stretch("video_seg"), Stretch("audio_seg")),
        ),
    )
)
