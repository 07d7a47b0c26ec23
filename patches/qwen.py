"""Qwen-Image, Edit and Layered (comfy/ldm/qwen_image/model.py): text beside image in every block."""

from ..raylight.cuts import Index, Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region

QWEN = Plan(
    Region(
        Blocks(
            at="transformer_blocks.*",
            order=("txt", "img"),
            streams={"hidden_states": Split(1, "img"), "encoder_hidden_states": Split(1, "txt")},
            shared={
                "image_rotary_emb": Rope("txt", "img"),
                # the attention builds its mask from this and from the lengths of its tokens
                "encoder_hidden_states_mask": Split(1, "txt"),
                "timestep_zero_index": Index("img"),
            },
            # not in 0.3.75
            optional=("timestep_zero_index",),
            outputs=(Split(1, "txt"), Split(1, "img")),
            attention=("attn",),
            patches={"attn1_patch": 2},
            patch_mask=Split(1, "txt"),
        ),
        # references are dropped after it; the text ends at the last block
        exit=Head("proj_out", outputs=(Split(1, "img"),)),
    )
)
