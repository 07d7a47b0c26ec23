"""LTX-Video and LTX-2."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_raylight.raylight.layout import Layout
from comfy_raylight.raylight.plan import Plan
from comfy_raylight.raylight.sequence.masks import QueryMask, QueryMasks

from ..case import CHOOSES_BLOCK, EVERY, Case, Inputs, build, override, patched, random, run_original, skip
from .changes import as_first_rank, with_shared, with_sites

SIZES: dict[str, Any] = dict(
    in_channels=4, cross_attention_dim=60, attention_head_dim=12, num_attention_heads=5, caption_channels=16
)
SPLIT = {"rope_type": "split"}
LTX2 = ("comfy.ldm.lightricks.av_model", "")
GUIDES = ("comfy.ldm.lightricks.model", "grid_mask")
GUIDE_MASKS = ("comfy.ldm.lightricks.model", "class GuideAttentionMask")
BEFORE_GUIDES = ("comfy.ldm.lightricks.model", "pe = precompute_freqs_cis")


def ltxv(rest: dict[str, Any] | None = None, **more: Any) -> torch.nn.Module:
    return build("comfy.ldm.lightricks.model.LTXVModel", rest, **SIZES, num_layers=3, **more)


def ltxav(rope: str = "split", **more: Any) -> torch.nn.Module:
    rest = dict(connector_attention_head_dim=8, connector_num_attention_heads=2, connector_num_layers=1)
    sound = dict(audio_cross_attention_dim=40, audio_attention_head_dim=8, audio_num_attention_heads=5)
    known = {**SIZES, "num_layers": 2, "audio_in_channels": 128, **sound, **more}
    return build("comfy.ldm.lightricks.av_model.LTXAVModel", {"rope_type": rope, **rest}, **known)


def per_token(batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    """A timestep per token, one value per frame."""
    values = 0.9 - torch.arange(batch * frames).reshape(batch, frames, 1) / 10
    return values.expand(batch, frames, height * width).flatten(1)


def video(batch: int = 1, shape: tuple[int, int, int] = (3, 3, 5), timed: bool = False, **more: Any) -> Inputs:
    t = per_token(batch, *shape) if timed else torch.linspace(0.3, 0.6, batch)[:, None]
    return (random(batch, 4, *shape), t, random(batch, 7, 16), None), more


def masked_text() -> Inputs:
    (x, t, context, _), more = video(batch=2)
    return (x, t, context, torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])), more


def keyframes(
    batch: int = 1, strength: float | None = None, dropped: int = 1, pixels: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The last of three frames of 3 x 5 is a keyframe, of which some tokens are dropped.

    Args:
        pixels: rows and columns of latent that its mask of pixels is for.
    """
    mask = torch.ones(batch, 1, 3, 3, 5)
    mask[:, :, 2].view(batch, 15)[:, :dropped] = -1
    entry: dict[str, Any] = {"pre_filter_count": 15, "strength": strength, "pixel_mask": None, "latent_shape": None}
    if pixels is not None:
        entry |= {"pixel_mask": soft_mask(), "latent_shape": (1, *pixels)}
    guides = {} if strength is None else {"guide_attention_entries": [entry]}
    return {"keyframe_idxs": random(batch, 3, 15, 2).abs() * 9, "denoise_mask": mask, **guides}


def soft_mask() -> torch.Tensor:
    """A mask in pixels for one guide: some of it nothing, some of it all."""
    return random(1, 1, 1, 24, 40).add(0.5).clamp(0, 1)


def two_guides() -> dict[str, Any]:
    """Two of four frames of 3 x 5 are guides of their own strengths, one with a mask."""
    entry = {"pre_filter_count": 15, "strength": 0.3, "pixel_mask": None, "latent_shape": None}
    masked = {**entry, "strength": 1.5, "pixel_mask": soft_mask(), "latent_shape": (1, 3, 5)}
    guides = {"guide_attention_entries": [entry, masked]}
    return {"keyframe_idxs": random(1, 3, 30, 2).abs() * 9, "denoise_mask": torch.ones(1, 1, 4, 3, 5), **guides}


def as_noisy(plan: Plan) -> Plan:
    """Queries of guides get the masks of other queries."""

    def entry(value: Any, layout: Layout) -> Any:
        return QueryMasks((QueryMask(0, value.noisy_mask.shape[-1], value.noisy_mask, exact=True),))

    return with_shared(plan, "self_attention_mask", entry)


def dropped_frame() -> dict[str, Any]:
    """Two keyframes after two frames of 3 x 5; the last is dropped, so that every frame left is whole."""
    mask = torch.ones(1, 1, 4, 3, 5)
    mask[:, :, 3] = -1
    return {"keyframe_idxs": random(1, 3, 30, 2).abs() * 9, "denoise_mask": mask}


def sound_and_video(
    batch: int = 1, shape: tuple[int, int, int] = (4, 3, 5), timed: bool = False, sound: int = 6, **more: Any
) -> Inputs:
    vt = per_token(batch, *shape) if timed else torch.linspace(0.3, 0.6, batch)[:, None]
    at = torch.linspace(0.2, 0.7, batch * sound).reshape(batch, sound) if timed and sound else vt[:, :1]
    latents = [random(batch, 4, *shape), random(batch, 8, sound, 16)][: 2 if sound else 1]
    # as LTXAVModel.forward hands it on
    return (latents, vt, random(batch, 7, 32), None), {"a_timestep": at, **more}


def wide_context() -> Inputs:
    (latents, t, _, mask), more = sound_and_video(timed=True)
    return (latents, t, random(1, 7, 100), mask), more


def spatial_mask() -> torch.Tensor:
    mask = torch.ones(1, 1, 4, 3, 5)
    mask[:, :, 1:, 1:] = 0
    return mask


def switched_off(name: str) -> dict[str, Any]:
    return {name: False}


video_case = partial(Case, family="LTXVModel", model=ltxv)
av_case = partial(Case, family="LTXAVModel", model=ltxav, needs=LTX2)
# their ranks hold tokens of other kinds, as the meshes differ
guide_case = partial(video_case, meshes=("u2", "u3", "u5", "u2r2"), all_meshes=True)
av_guide_case = partial(av_case, meshes=("u2", "u3", "u5", "u2r2"), all_meshes=True)
wrong = partial(Case, wrong=True, meshes=("u2",))
even = partial(video, shape=(4, 3, 5), timed=True)
timed_av = partial(sound_and_video, timed=True)
ragged = partial(sound_and_video, shape=(3, 3, 5), timed=True)
newest: dict[str, Any] = dict(apply_gated_attention=True, cross_attention_adaln=True, use_middle_indices_grid=True)
split = partial(ltxv, SPLIT)

CASES = (
    video_case(name="ltxv", make=video, modes=EVERY),
    video_case(name="ltxv_batch", make=partial(video, batch=2)),
    video_case(name="ltxv_timed", make=partial(video, batch=2, timed=True)),
    video_case(name="ltxv_mask", make=masked_text),
    video_case(name="ltxv_split", model=split, make=partial(video, batch=2, timed=True), needs=GUIDES),
    # as many tokens as heads
    video_case(name="ltxv_heads", model=split, make=partial(video, shape=(1, 1, 5)), needs=GUIDES),
    video_case(name="ltxv_adaln", model=partial(ltxv, cross_attention_adaln=True), make=even, needs=GUIDES),
    video_case(name="ltxv_keyframes", make=partial(video, timed=True, **keyframes()), needs=GUIDES),
    video_case(
        name="ltxv_old_keyframes", make=partial(video, keyframe_idxs=random(1, 3, 15).abs() * 9), needs=BEFORE_GUIDES
    ),
    guide_case(name="ltxv_guide", make=partial(video, timed=True, **keyframes(strength=0.4)), needs=GUIDES),
    video_case(
        name="ltxv_guide_batch",
        model=split,
        make=partial(video, batch=2, timed=True, **keyframes(batch=2, strength=0.4, dropped=3)),
        needs=GUIDES,
    ),
    *(
        guide_case(name=f"ltxv_{name}", make=partial(video, shape=shape, timed=True, **guides), needs=GUIDES)
        for name, shape, guides in (
            ("guide_stronger", (3, 3, 5), keyframes(strength=1.7, dropped=0)),
            ("guide_pixels", (3, 3, 5), keyframes(strength=0.6, dropped=0, pixels=(3, 5))),
            # the last tokens of the guide have no weight of their own
            ("guide_rest", (3, 3, 5), keyframes(strength=0.6, dropped=0, pixels=(2, 5))),
            ("guides", (4, 3, 5), two_guides()),
        )
    ),
    guide_case(
        name="ltxv_guide_override",
        make=partial(patched, partial(video, timed=True, **keyframes(strength=0.4)), override),
        base=partial(video, timed=True),
        needs=GUIDES,
        ring_raises="UnsupportedError",
    ),
    guide_case(
        name="ltxv_guide_turns",
        make=partial(video, timed=True, **keyframes(strength=0.4)),
        modes=("trunk", "turns", "kernel"),
        needs=GUIDES,
    ),
    video_case(
        name="ltxv_replace",
        make=partial(patched, video, partial(run_original, ("double_block", 0), ("double_block", 2))),
        modes=CHOOSES_BLOCK,
    ),
    video_case(
        name="ltxv_skip",
        make=partial(patched, video, partial(skip, ("double_block", 0), ("double_block", 2))),
        modes=CHOOSES_BLOCK,
    ),
    video_case(
        name="ltxv_override", make=partial(patched, video, override), base=video, ring_raises="UnsupportedError"
    ),
    wrong(
        name="no_ltxv_attention",
        family="LTXVModel",
        model=ltxv,
        make=video,
        change=with_sites,
    ),
    wrong(
        name="no_ltxv_rope",
        family="LTXVModel",
        model=ltxv,
        make=even,
        change=partial(as_first_rank, name="pe"),
    ),
    wrong(
        name="no_ltxv_guide_masks",
        family="LTXVModel",
        model=ltxv,
        make=partial(video, timed=True, **keyframes(strength=0.1, dropped=0)),
        change=as_noisy,
        needs=GUIDE_MASKS,
    ),
    wrong(
        name="no_ltxv_timestep",
        family="LTXVModel",
        model=ltxv,
        make=even,
        change=partial(as_first_rank, name="timestep"),
    ),
    av_case(name="ltxav", make=sound_and_video, modes=EVERY),
    av_case(name="ltxav_batch", make=partial(sound_and_video, batch=2)),
    av_case(name="ltxav_timed", make=timed_av),
    av_case(name="ltxav_timed_batch", make=partial(sound_and_video, batch=2, shape=(3, 3, 5), timed=True)),
    av_case(name="ltxav_interleaved", model=partial(ltxav, "interleaved"), make=timed_av),
    av_case(name="ltxav_pixel_frames", make=partial(sound_and_video, shape=(47, 1, 1), timed=True)),
    av_case(name="ltxav_tiny", make=partial(sound_and_video, shape=(5, 1, 1), timed=True)),
    av_case(name="ltxav_spatial", make=partial(timed_av, denoise_mask=spatial_mask())),
    av_case(name="ltxav_keyframes", make=partial(ragged, **keyframes())),
    av_case(name="ltxav_dropped_frame", make=partial(timed_av, **dropped_frame())),
    av_guide_case(name="ltxav_guide", make=partial(ragged, **keyframes(strength=0.4))),
    av_guide_case(name="ltxav_guide_pixels", make=partial(ragged, **keyframes(strength=1.4, pixels=(3, 5)))),
    av_guide_case(name="ltxav_guides", make=partial(timed_av, **two_guides())),
    av_case(name="ltxav_silent", make=partial(sound_and_video, sound=0)),
    av_case(name="ltxav_silent_timed", make=partial(sound_and_video, sound=0, timed=True)),
    av_case(name="ltxav_ref_sound", make=partial(timed_av, ref_audio={"tokens": random(1, 2, 128)})),
    av_case(name="ltxav_2_3", model=partial(ltxav, **newest), make=timed_av),
    av_case(name="ltxav_connector", model=partial(ltxav, caption_proj_before_connector=True), make=wide_context),
    *(
        av_case(name=f"ltxav_no_{name}", make=partial(patched, timed_av, partial(switched_off, name)))
        for name in ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn")
    ),
    av_case(
        name="ltxav_replace",
        make=partial(patched, timed_av, partial(run_original, ("double_block", 0), ("double_block", 1))),
        modes=CHOOSES_BLOCK,
    ),
    av_case(
        name="ltxav_override", make=partial(patched, timed_av, override), base=timed_av, ring_raises="UnsupportedError"
    ),
    *(
        wrong(
            name=f"no_ltxav_{name}",
            family="LTXAVModel",
            model=ltxav,
            make=timed_av,
            change=partial(as_first_rank, name=name),
            needs=LTX2,
        )
        for name in ("v_pe", "v_cross_pe", "v_timestep")
    ),
    wrong(
        name="no_ltxav_video_to_audio",
        family="LTXAVModel",
        model=ltxav,
        make=sound_and_video,
        change=lambda plan: with_sites(plan, "attn1"),
        needs=LTX2,
    ),
    wrong(
        name="no_ltxav_replicated_query",
        loud=True,
        family="LTXAVModel",
        model=ltxav,
        make=sound_and_video,
        change=lambda plan: with_sites(plan, "attn1", "video_to_audio_attn"),
        needs=LTX2,
    ),
)
