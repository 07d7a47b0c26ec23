"""OmniGen2 (comfy/ldm/omnigen/omnigen2.py): refiners of image and references, then layers over all tokens."""

from ..raylight.cuts import Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region


def _blocks(at: str) -> Blocks:
    return Blocks(
        at=at,
        streams={"hidden_states": Split(1)},
        shared={"image_rotary_emb": Rope()},
        outputs=(Split(1),),
        attention=("attn",),
    )


OMNIGEN2 = Plan(
    Region(_blocks("noise_refiner.*")),
    Region(_blocks("ref_image_refiner.*")),
    Region(_blocks("layers.*"), exit=Head("norm_out")),
)
