"""CogVideoX (comfy/ldm/cogvideo/model.py): text beside video."""

from ..raylight.cuts import Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region

COGVIDEOX = Plan(
    Region(
        Blocks(
            at="blocks.*",
            order=("txt", "img"),
            streams={"hidden_states": Split(1, "img"), "encoder_hidden_states": Split(1, "txt")},
            # a pair of [L, D], of the video alone; 2B has none
            shared={"image_rotary_emb": Rope("img", dim=0)},
            outputs=(Split(1, "img"), Split(1, "txt")),
            attention=("",),
        ),
        # the norms before it treat every token by itself
        exit=Head("proj_out", outputs=(Split(1, "img"),)),
    )
)
