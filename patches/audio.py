"""Stable Audio (comfy/ldm/audio/dit.py), ACE-Step 1.5 (ace/ace_step15.py), MiniMax Music 3 (minimax_music/dit.py)."""

from ..raylight.cuts import Rope, Split
from ..raylight.plan import Blocks, Head, Plan, Region, Whole

STABLE_AUDIO = Plan(
    Region(
        Blocks(
            at="transformer.layers.*",
            streams={"x": Split(1)},
            # the table [L, D] and its scale; one too long would be cut at the front, silently
            shared={"rotary_pos_emb": Rope(dim=0)},
            outputs=(Split(1),),
            attention=("self_attn",),
        ),
        exit=Head("transformer.project_out"),
    )
)

ACE_STEP15 = Plan(
    Region(
        Blocks(at="decoder.layers.*", streams={"hidden_states": Split(1)}, outputs=(Split(1),), attention=()),
        # called without transformer_options, so that only whole tokens are right; the rest of a block is shared
        whole=(Whole("decoder.layers.*.self_attn", "hidden_states"),),
    )
)

# the same; a long song runs in windows, each from the first block to the last
MUSIC3 = Plan(
    Region(
        # no Head: the next line drops the timestep's token
        Blocks(
            at="diffusion_transformer.transformer.layers.*",
            streams={"x": Split(1)},
            outputs=(Split(1),),
            attention=(),
        ),
        whole=(Whole("diffusion_transformer.transformer.layers.*.self_attn", "x"),),
    )
)
