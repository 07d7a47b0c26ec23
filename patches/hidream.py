"""HiDream I1 and E1 (comfy/ldm/hidream/model.py): blocks of image beside text, then of both in one."""

from ..raylight.cuts import Replicated, Rope, Split
from ..raylight.plan import Blocks, Plan, Region

HIDREAM = Plan(
    Region(
        Blocks(
            at="double_stream_blocks.*",
            order=("img", "txt"),
            # the model appends other text before each block and drops it after
            streams={"image_tokens": Split(1, "img"), "text_tokens": Replicated(1, "txt")},
            shared={"rope": Rope("img", "txt")},
            outputs=(Split(1, "img"), Replicated(1, "txt")),
            attention=("block.attn1",),
        )
    ),
    Region(
        Blocks(
            at="single_stream_blocks.*",
            streams={"image_tokens": Split(1)},
            shared={"rope": Rope()},
            outputs=(Split(1),),
            attention=("block.attn1",),
        ),
        # here it appends to the image's own tokens
        per_block=True,
    ),
)
