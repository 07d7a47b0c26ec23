"""Cosmos Predict2, Anima and Cosmos 1."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch

from ..case import EVERY, Case, Inputs, build, override, patched, random
from .changes import as_first_rank, sharpened, with_sites

SIZES: dict[str, Any] = dict(
    max_img_h=32,
    max_img_w=32,
    max_frames=16,
    in_channels=4,
    out_channels=4,
    patch_spatial=2,
    patch_temporal=1,
    model_channels=60,
    num_blocks=3,
    num_heads=5,
    mlp_ratio=2.0,
    crossattn_emb_channels=16,
    pos_emb_cls="rope3d",
    use_adaln_lora=True,
    adaln_lora_dim=8,
)


def predict2(**more: Any) -> torch.nn.Module:
    return build("comfy.ldm.cosmos.predict2.MiniTrainDIT", **{**SIZES, **more})


def anima(**more: Any) -> torch.nn.Module:
    import comfy.ldm.anima.model as space

    # 500 MB of text adapter, which runs before the blocks
    with mock.patch.object(space, "LLMAdapter", lambda **place: torch.nn.Identity()):
        return build("comfy.ldm.anima.model.Anima", **{**SIZES, **more})


def cosmos1(**more: Any) -> torch.nn.Module:
    rest = dict(pos_emb_learnable=True, block_x_format="THWBD", affline_emb_norm=True)
    extra = dict(extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable")
    model = build("comfy.ldm.cosmos.model.GeneralDIT", **{**SIZES, **rest, **extra, **more})
    return sharpened(model, "to_q.1.weight", "to_k.1.weight")


def video(batch: int = 1, frames: int = 3, height: int = 6, timed: bool = False, **more: Any) -> Inputs:
    t = torch.linspace(0.3, 0.6, batch)
    if timed:
        t = t[:, None] * torch.arange(frames)
    return (random(batch, 4, frames, height, 10), t, random(batch, 7, 16)), more


learned = partial(predict2, extra_per_block_abs_pos_emb=True)
timed = partial(video, timed=True)
fps = torch.tensor([12.0])
anima_needs = ("comfy.ldm.anima.model", "")
predict2_case = partial(Case, family="MiniTrainDIT", model=predict2)
anima_case = partial(Case, family="Anima", model=anima, needs=anima_needs)
cosmos1_case = partial(Case, family="GeneralDIT", model=cosmos1)
wrong = partial(Case, wrong=True, meshes=("u2",))

CASES = (
    predict2_case(name="predict2", make=video, modes=EVERY),
    predict2_case(name="predict2_batch", make=partial(video, batch=2)),
    predict2_case(name="predict2_image", make=partial(video, frames=1)),
    predict2_case(name="predict2_tiny", make=partial(video, frames=1, height=2)),
    predict2_case(name="predict2_frames", make=timed),
    predict2_case(name="predict2_frames_batch", make=partial(timed, batch=2, frames=5, fps=fps)),
    predict2_case(name="predict2_no_lora", model=partial(predict2, use_adaln_lora=False), make=timed),
    predict2_case(name="predict2_learned", model=learned, make=partial(video, batch=2)),
    predict2_case(
        name="predict2_override", make=partial(patched, video, override), base=video, ring_raises="UnsupportedError"
    ),
    wrong(name="no_predict2_attention", family="MiniTrainDIT", model=predict2, make=video, change=with_sites),
    *(
        wrong(
            name=f"no_predict2_{name}",
            family="MiniTrainDIT",
            model=predict2,
            make=partial(timed, frames=4),
            change=partial(as_first_rank, name=name),
        )
        for name in ("rope_emb_L_1_1_D", "emb_B_T_D", "adaln_lora_B_T_3D")
    ),
    wrong(
        name="no_predict2_learned",
        family="MiniTrainDIT",
        model=learned,
        make=partial(video, frames=4),
        change=partial(as_first_rank, name="extra_per_block_pos_emb"),
    ),
    anima_case(name="anima", make=partial(video, frames=1), modes=EVERY),
    anima_case(name="anima_batch", make=partial(video, batch=2, frames=1)),
    wrong(
        name="no_anima_attention",
        family="Anima",
        model=anima,
        make=partial(video, frames=1),
        change=with_sites,
        needs=anima_needs,
    ),
    cosmos1_case(name="cosmos1", make=video, modes=EVERY),
    cosmos1_case(name="cosmos1_batch", make=partial(video, batch=2, fps=fps)),
    cosmos1_case(name="cosmos1_ca_first", model=partial(cosmos1, block_config="CA-FA-MLP"), make=video),
    wrong(
        name="no_cosmos1_attention",
        family="GeneralDIT",
        model=cosmos1,
        make=video,
        change=with_sites,
    ),
    wrong(
        name="no_cosmos1_rope",
        family="GeneralDIT",
        model=cosmos1,
        make=partial(video, frames=4),
        change=partial(as_first_rank, name="rope_emb_L_1_1_D"),
    ),
)
