"""LTX-Video and LTX-2 (comfy/ldm/lightricks/model.py, av_model.py): video, and video with its sound."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..raylight.cuts import PerFrame, Replicated, Rope, Split
from ..raylight.layout import Layout
from ..raylight.plan import Blocks, Plan, Region, Site
from ..raylight.sequence.masks import QueryMask, QueryMasks


@dataclass(frozen=True)
class Table:
    """The rope table of some tokens, whose number a dim of heads may equal.

    [B, 1, L, ...] up to ComfyUI 0.3.75; then a pair of [B, L, D] or [B, H, L, D] and a flag; from 0.29 on a matrix
    [B, L, H, D/2, 2, 2] and a flag.
    """

    over: str = "x"

    def __call__(self, value: Any, layout: Layout) -> Any:
        dim = (1 if value[0].ndim == 6 else -2) if isinstance(value, tuple) else 2
        return Rope(self.over, dim=dim)(value, layout)


def guide_masks(value: Any, layout: Layout) -> Any:
    """The masks of a GuideAttentionMask (ComfyUI 0.21.2 and later), before it a whole tensor, for one attention call.

    A model with it calls attention for the noisy tokens, for those of guides and for what is behind them, each over
    all keys; ranks hold different ones of these.
    """
    if isinstance(value, torch.Tensor):
        return value
    guides, behind = value.guide_start, value.guide_start + value.tracked_count
    return QueryMasks(
        (
            QueryMask(0, guides, value.noisy_mask, exact=True),
            QueryMask(guides, behind, value.tracked_mask, exact=True),
            QueryMask(behind, value.noisy_mask.shape[-1]),
        )
    )


LTXV = Plan(
    # no Head: the output is scaled by a timestep per token, outside of any module
    Region(
        Blocks(
            at="transformer_blocks.*",
            streams={"x": Split(1)},
            # one row, or one per token
            shared={"pe": Table(), "timestep": PerFrame(1, ndim=3), "self_attention_mask": guide_masks},
            optional=("self_attention_mask",),
            outputs=(Split(1),),
            attention=("attn1",),
        )
    )
)


@functools.cache
def _selecting(kind: Any) -> Any:
    """A subclass of ComfyUI's CompressedTimestep, which blocks test for, whose values are one row per local token."""

    def expand_for_computation(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        rows = kind.expand_for_computation(self, *args, **kwargs)
        return tuple(row.index_select(1, self.row_of_token) for row in rows)

    return type(kind.__name__, (kind,), {"expand_for_computation": expand_for_computation})


def local_timestep(value: Any, layout: Layout) -> Any:
    """This rank's part of a CompressedTimestep (or of a tensor [B, 1 or L, C]), which holds one row per frame.

    It stays one row per frame, a view of those frames that this rank's tokens touch: only the values that a
    block asks for get a row per token, and only for this rank's tokens. An uncompressed one (frames of one
    token, or masked and dropped tokens) has a row per token already.
    """
    if isinstance(value, torch.Tensor):
        return PerFrame(1, ("v",), ndim=3)(value, layout)
    each = value.patches_per_frame
    if each * value.num_frames == 1:
        # one row for all tokens
        return value
    start, stop = layout.span("v")
    first, last = start // each, -(-stop // each)
    kind: Any = type(value)
    local: Any = object.__new__(kind if each == 1 else _selecting(kind))
    local.data = value.data[:, first:last]
    local.batch_size, local.feature_dim = value.batch_size, value.feature_dim
    # its rows are its tokens as far as ComfyUI's own method goes
    local.num_frames, local.patches_per_frame = last - first, 1
    if each > 1:
        local.row_of_token = layout.positions(("v",), device=value.data.device) // each - first
    return local


LTXAV = Plan(
    Region(
        Blocks(
            at="transformer_blocks.*",
            order=("v",),
            # sound is a few hundred tokens: every rank computes all of it
            streams={"x.0": Split(1, "v"), "x.1": Replicated(1, "a")},
            shared={
                "v_pe": Table("v"),
                "v_cross_pe": Table("v"),
                "v_timestep": local_timestep,
                "v_cross_scale_shift_timestep": local_timestep,
                "v_cross_gate_timestep": local_timestep,
                "self_attention_mask": guide_masks,
            },
            optional=("self_attention_mask",),
            outputs=(Split(1, "v"), Replicated(1, "a")),
            # the others have keys that every rank holds
            attention=("attn1", Site(at="video_to_audio_attn", replicated_query=True)),
        )
    )
)
