"""Wan 2.1 and 2.2 (comfy/ldm/wan/model*.py): video from text, images, poses, audio, music and control videos."""

from dataclasses import replace

from ..raylight.cuts import PerFrame, Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region, Whole

_BLOCKS = Blocks(
    at="blocks.*",
    streams={"x": Split(1)},
    # a 3-D e is [B, 6, C]: not per frame (always so in VACE and Camera)
    shared={"freqs": Rope(), "e": PerFrame(1, ndim=4)},
    outputs=(Split(1),),
    attention=("self_attn",),
    patches={"attn1_patch": 1, "attn2_patch": 1},
)

# reference, motion and pose tokens are dropped after the head
_HEAD = Head("head", shared={"e": PerFrame(1, ndim=3)})

WAN = Plan(Region(_BLOCKS, exit=_HEAD))
"""Also Camera and SCAIL: what they add to the tokens comes before the blocks."""

VACE = Plan(
    Region(
        _BLOCKS,
        replace(
            _BLOCKS,
            at="vace_blocks.*",
            # a stream, so that it is cut for each context: a skipped first block lets ComfyUI write into x between them
            streams={"c": Split(1), "x": Split(1)},
            outputs=(Split(1), Split(1)),
        ),
        exit=_HEAD,
    )
)

# Audio, faces and music are attended to frame by frame: a part of the tokens is not whole frames.
HUMO = Plan(Region(_BLOCKS, exit=_HEAD, whole=(Whole("blocks.*.audio_cross_attn_wrapper", "x"),)))
S2V = Plan(Region(_BLOCKS, exit=_HEAD, whole=(Whole("audio_injector", "x"),)))
ANIMATE = Plan(Region(_BLOCKS, exit=_HEAD, whole=(Whole("face_adapter.fuser_blocks.*", "x"),)))
# no Head: the frame rate decides which of two heads runs
DANCER = Plan(Region(_BLOCKS, whole=(Whole("music_injector", "x"),)))
