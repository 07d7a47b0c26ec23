"""Kandinsky 5, Mochi and CogVideoX."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..case import CHOOSES_BLOCK, EVERY, Case, Inputs, build, override, patched, random, run_original
from .changes import as_first_rank, sharpened, with_sites


def kandinsky5(**more: Any) -> torch.nn.Module:
    sizes = dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=60)
    rest = dict(ff_dim=64, visual_embed_dim=16, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 4, 4))
    return build("comfy.ldm.kandinsky5.model.Kandinsky5", **{**sizes, **rest, **more})


def kandinsky5_video(batch: int = 1, frames: int = 3, **more: Any) -> Inputs:
    t = torch.linspace(400, 600, batch)
    return (random(batch, 4, frames, 6, 10), t, random(batch, 7, 16), random(batch, 8)), more


def mochi(**more: Any) -> torch.nn.Module:
    sizes = dict(hidden_size_x=60, hidden_size_y=24, depth=3, num_heads=5, mlp_ratio_x=204.8, use_t5=True)
    text = dict(t5_feat_dim=16, t5_token_length=9, learn_sigma=False)
    rest = dict(qkv_bias=False, qk_norm=True)
    return build("comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint", rest, **{**sizes, **text, **more})


def mochi_video(batch: int = 1, text: int = 7, padded: int = 9, frames: int = 3, **more: Any) -> Inputs:
    mask = (torch.arange(padded) < text).expand(batch, padded)
    x, t = random(batch, 4, frames, 6, 10), torch.linspace(0.3, 0.6, batch)
    return (x, t, random(batch, padded, 16), mask, text), more


def cogvideox(**more: Any) -> torch.nn.Module:
    sizes = dict(num_attention_heads=3, attention_head_dim=48, in_channels=4, out_channels=4, time_embed_dim=16)
    rest = dict(text_embed_dim=16, num_layers=3, max_text_seq_length=7, use_rotary_positional_embeddings=True)
    shape = dict(sample_width=10, sample_height=6, sample_frames=9)
    path = "comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel"
    return sharpened(build(path, **{**sizes, **rest, **shape, **more}), "norm_q.weight", "norm_k.weight")


def cogvideox_video(batch: int = 1, frames: int = 3, text: int = 7, **more: Any) -> Inputs:
    return (random(batch, 4, frames, 6, 10), torch.linspace(400, 600, batch), random(batch, text, 16)), more


KANDINSKY5 = ("comfy.ldm.kandinsky5.model", "")
COGVIDEOX = ("comfy.ldm.cogvideo.model", "")
kandinsky5_case = partial(Case, family="Kandinsky5", model=kandinsky5, needs=KANDINSKY5)
mochi_case = partial(Case, family="AsymmDiTJoint", model=mochi)
cogvideox_case = partial(Case, family="CogVideoXTransformer3DModel", model=cogvideox, needs=COGVIDEOX)
unwrapped = tuple(mode for mode in EVERY if mode != "wrapped")
ends = (("double_block", 0), ("double_block", 2))
later = partial(cogvideox, patch_size_t=2, ofs_embed_dim=16)
learned = partial(
    cogvideox, use_rotary_positional_embeddings=False, use_learned_positional_embeddings=False, patch_bias=True
)

CASES = (
    kandinsky5_case(name="kandinsky5", make=kandinsky5_video, modes=EVERY),
    kandinsky5_case(name="kandinsky5_batch", make=partial(kandinsky5_video, batch=2)),
    kandinsky5_case(name="kandinsky5_image", make=partial(kandinsky5_video, frames=1)),
    kandinsky5_case(
        name="kandinsky5_first_frame",
        make=partial(kandinsky5_video, time_dim_replace=random(1, 4, 1, 6, 10, seed=2)),
    ),
    kandinsky5_case(
        name="kandinsky5_override",
        make=partial(patched, kandinsky5_video, override),
        base=kandinsky5_video,
        ring_raises="UnsupportedError",
    ),
    kandinsky5_case(
        name="no_kandinsky5_attention", make=kandinsky5_video, change=with_sites, wrong=True, meshes=("u2",)
    ),
    kandinsky5_case(
        name="no_kandinsky5_rope",
        make=partial(kandinsky5_video, frames=4),
        change=partial(as_first_rank, name="freqs"),
        wrong=True,
        meshes=("u2",),
    ),
    # its forward calls no wrappers
    mochi_case(name="mochi", make=mochi_video, modes=unwrapped),
    mochi_case(name="mochi_batch", make=partial(mochi_video, batch=2)),
    mochi_case(name="mochi_text1", make=partial(mochi_video, text=1)),
    mochi_case(name="mochi_full_text", make=partial(mochi_video, text=9)),
    mochi_case(
        name="mochi_replace", make=partial(patched, mochi_video, partial(run_original, *ends)), modes=CHOOSES_BLOCK
    ),
    mochi_case(name="no_mochi_attention", make=mochi_video, change=with_sites, wrong=True, meshes=("u2",)),
    mochi_case(
        name="no_mochi_rope",
        make=partial(mochi_video, frames=4),
        change=partial(as_first_rank, name="rope_cos"),
        wrong=True,
        meshes=("u2",),
    ),
    cogvideox_case(name="cogvideox", make=cogvideox_video, modes=EVERY),
    cogvideox_case(name="cogvideox_batch", make=partial(cogvideox_video, batch=2)),
    cogvideox_case(name="cogvideox_text1", make=partial(cogvideox_video, text=1)),
    cogvideox_case(name="cogvideox_no_rope", model=learned, make=cogvideox_video),
    cogvideox_case(name="cogvideox_1_5", model=later, make=partial(cogvideox_video, frames=4, ofs=torch.tensor([2.0]))),
    cogvideox_case(name="no_cogvideox_attention", make=cogvideox_video, change=with_sites, wrong=True, meshes=("u2",)),
    cogvideox_case(
        name="no_cogvideox_rope",
        make=partial(cogvideox_video, frames=4),
        change=partial(as_first_rank, name="image_rotary_emb"),
        wrong=True,
        meshes=("u2",),
    ),
)
