"""HunyuanVideo, 1.5 and HunyuanImage 2.1 (comfy/ldm/hunyuan_video/model.py), Hunyuan3D 2 and 2.1, HunyuanDiT."""

from typing import Any

import torch

from ..raylight.cuts import Rope, Split
from ..raylight.layout import Layout
from ..raylight.plan import Blocks, Head, Part, Plan, Region, Whole
from .flux import double_blocks, single_blocks


def hunyuan_video(model: Any) -> Plan:
    """The plan of a HunyuanVideo model: Flux's blocks, the image first where the blocks say so (until 0.3.75).

    References are dropped between the last block and the final layer, so there is no Head.
    """
    flipped = getattr(model.double_blocks[0], "flipped_img_txt", False)
    return Plan(Region(double_blocks(("img", "txt") if flipped else ("txt", "img"))), Region(single_blocks()))


def _skipped(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """An earlier block's output: whole where tokens are cut around every block, else a rank's part already."""
    return layout.split(value, dim=1, over=("x",)) if value.shape[1] == layout.length("x") else value


# attention is called without transformer_options, so no override reaches it: every rank computes all of it (a third
# of a step), and its own tokens' part of the rest
HUNYUAN3D_21 = Plan(
    Region(
        Blocks(
            at="blocks.*",
            streams={"hidden_states": Split(1)},
            shared={"skip_tensor": _skipped},
            outputs=(Split(1),),
            attention=(),
        ),
        # no Head: the final layer drops the time token
        whole=(Whole("blocks.*.attn1", "x"),),
    )
)

# the same; self-attention has the rope table of all tokens, cross-attention that of its own
HUNYUAN_DIT = Plan(
    Region(
        Blocks(
            at="blocks.*",
            streams={"x": Split(1)},
            shared={"skip": _skipped},
            outputs=(Split(1),),
            attention=(),
        ),
        exit=Head("final_layer"),
        whole=(Whole("blocks.*.attn1", "x"),),
        parts=(Part("blocks.*.attn2", {"freqs_cis_img": Rope(dim=0)}),),
    )
)
