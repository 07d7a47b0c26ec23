"""Wan with something beside its tokens: VACE, Camera, HuMo, S2V, Animate, SCAIL, WanDancer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_raylight.raylight.cuts import Split
from comfy_raylight.raylight.plan import Plan

from ..case import CHOOSES_BLOCK, EVERY, TRUNK, Case, Inputs, build, patched, random, run_original, skip, without
from .changes import without_whole
from .wan import changed, guided, looks_across, video

MODULE = "comfy.ldm.wan.model"
SIZES = dict(dim=60, ffn_dim=64, freq_dim=32, text_dim=16, in_dim=4, out_dim=4, num_heads=5, num_layers=4)


def variant(name: str, **more: Any) -> torch.nn.Module:
    return build(f"{MODULE}{name}", **{**SIZES, **more})


class Audio(torch.nn.Module):
    """In place of what projects audio before the blocks with 40 million fixed weights."""

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return audio.flatten(2)[..., : 16 * 1536].unflatten(-1, (16, 1536))


class Motion(torch.nn.Module):
    """In place of what looks at faces of 512 x 512 before the blocks."""

    def get_motion(self, faces: torch.Tensor) -> torch.Tensor:
        return faces.flatten(1)[:, :512]


def humo() -> torch.nn.Module:
    model = variant(".HumoWanModel")
    model.audio_proj = Audio()
    return model


def animate() -> torch.nn.Module:
    model = variant("_animate.AnimateWanModel", num_layers=5)
    model.motion_encoder = Motion()
    return model


vace = partial(variant, ".VaceWanModel", vace_layers=2, vace_in_dim=6)
camera = partial(variant, ".CameraWanModel")
s2v = partial(variant, ".WanModel_S2V", audio_dim=8, num_audio_token=2, cond_dim=4, audio_inject_layers=[0, 2, 3])
scail = partial(variant, ".SCAILWanModel")
dancer = partial(
    variant,
    "_wandancer.WanDancerModel",
    music_dim=32,
    music_heads=2,
    music_latent_dim=32,
    audio_inject_layers=[0, 3],
)


def controlled(contexts: int = 2, batch: int = 1) -> Inputs:
    context, strength = random(batch, contexts, 6, 3, 6, 10), [0.7, 1.3][:contexts]
    return video(batch=batch, vace_context=context, vace_strength=strength)


def clip(**more: Any) -> Inputs:
    return video(**{"clip_fea": random(more.get("batch", 1), 257, 1280), **more})


def filmed(batch: int = 1, **more: Any) -> Inputs:
    return video(batch=batch, camera_conditions=random(batch, 24, 3, 48, 80) * 0.001, **more)


def spoken(frames: int = 4, batch: int = 1, refs: int = 0, **more: Any) -> Inputs:
    """For HuMo; a reference has the size of the video."""
    if refs:
        more["reference_latent"] = random(batch, 4, refs, 6, 10)
    return video(batch=batch, frames=frames, audio_embed=random(batch, frames, 8, 5, 1280), **more)


def sung(batch: int = 1, **more: Any) -> Inputs:
    return video(batch=batch, audio_embed=random(batch, 25, 8, 12), **more)


def sung_full() -> Inputs:
    """Reference and motion tokens behind the video's, 108 for 11 rows of timesteps."""
    size = (10, 8)
    more: dict[str, Any] = {"reference_latent": random(1, 4, 1, *size), "reference_motion": random(1, 16, 5, *size)}
    return sung(height=10, width=8, control_video=random(1, 4, 3, *size), **more)


def posed(batch: int = 1, **more: Any) -> Inputs:
    size = (more.get("height", 6), more.get("width", 10))
    faces = random(batch, 3, 8, 16, 16)
    return clip(batch=batch, face_pixel_values=faces, pose_latents=random(batch, 16, 2, *size), **more)


def danced(batch: int = 1, fps: float = 30.0, width: int = 12, **more: Any) -> Inputs:
    """24 tokens a frame, each 3 for one of 8 notes."""
    music = {
        "audio_embed": random(batch, 10, 35),
        "fps": torch.tensor([fps]),
        "audio_inject_scale": torch.tensor([0.8]),
    }
    return clip(batch=batch, height=8, width=width, **music, **more)


def poses(half: bool = False, batch: int = 1, **more: Any) -> Inputs:
    size = (4, 6) if half else (8, 12)
    return clip(batch=batch, height=8, width=12, pose_latents=random(batch, 4, 3, *size), **more)


def cut_once(plan: Plan) -> Plan:
    """VACE's plan where what all contexts start from is shared, so that it is cut for the first of them only."""
    (hints,) = (blocks for blocks in plan.regions[0].blocks if "c" in blocks.streams)
    return changed(plan, at=hints.at, streams={"c": Split(1)}, shared={**hints.shared, "x": Split(1)})


SCAIL = (MODULE, "class SCAILWanModel")
DANCER = ("comfy.ldm.wan.model_wandancer", "")
WAN_ATTN = (MODULE, "attn1_patch")
FEW = ("u2", "u3", "r2")
square = {"height": 8, "width": 8}

CASES = (
    Case(name="wan_vace", family="VaceWanModel", model=vace, make=partial(controlled, 1), modes=EVERY),
    Case(name="wan_vace_two", family="VaceWanModel", model=vace, make=controlled),
    Case(
        name="wan_vace_each",
        family="VaceWanModel",
        model=partial(vace, vace_layers=4),
        make=partial(controlled, batch=2),
    ),
    Case(
        name="wan_vace_patches",
        family="VaceWanModel",
        model=vace,
        make=partial(patched, controlled, looks_across),
        needs=WAN_ATTN,
    ),
    Case(
        name="wan_vace_guided",
        family="VaceWanModel",
        model=vace,
        make=partial(patched, partial(controlled, batch=2), guided),
        needs=WAN_ATTN,
    ),
    # ComfyUI adds the first context's hint to what the second context starts from
    Case(
        name="wan_vace_skip",
        family="VaceWanModel",
        model=vace,
        make=partial(patched, controlled, partial(skip, ("double_block", 0), ("double_block", 3))),
        modes=CHOOSES_BLOCK,
    ),
    Case(
        name="no_vace_second_cut",
        family="VaceWanModel",
        model=vace,
        make=partial(patched, controlled, partial(skip, ("double_block", 0))),
        change=cut_once,
        modes=("block",),
        wrong=True,
        meshes=("u2",),
    ),
    Case(
        name="no_vace_attention",
        family="VaceWanModel",
        model=vace,
        make=controlled,
        change=partial(changed, at="vace_blocks.*", attention=()),
        wrong=True,
        meshes=("u2",),
    ),
    Case(name="wan_camera", family="CameraWanModel", model=camera, make=partial(filmed, clip_fea=random(1, 257, 1280))),
    Case(
        name="wan_camera_t2v",
        family="CameraWanModel",
        model=partial(camera, model_type="camera_2.2"),
        make=partial(filmed, batch=2),
    ),
    Case(
        name="wan_camera_skip",
        family="CameraWanModel",
        model=camera,
        make=partial(patched, filmed, partial(skip, ("double_block", 1))),
        modes=CHOOSES_BLOCK,
    ),
    Case(
        name="no_camera_attention",
        family="CameraWanModel",
        model=camera,
        make=filmed,
        change=partial(without, attention=False),
        wrong=True,
        meshes=("u2",),
    ),
    Case(name="wan_humo", family="HumoWanModel", model=humo, make=spoken, modes=EVERY),
    Case(name="wan_humo_ref", family="HumoWanModel", model=humo, make=partial(spoken, batch=2, refs=1)),
    Case(name="wan_humo_silent", family="HumoWanModel", model=humo, make=video, meshes=FEW),
    Case(
        name="wan_humo_replace",
        family="HumoWanModel",
        model=humo,
        make=partial(patched, spoken, partial(run_original, ("double_block", 0), ("double_block", 3))),
        modes=CHOOSES_BLOCK,
    ),
    Case(
        name="wan_humo_guided",
        family="HumoWanModel",
        model=humo,
        make=partial(patched, partial(spoken, batch=2), guided),
        needs=WAN_ATTN,
    ),
    Case(
        name="no_humo_whole",
        family="HumoWanModel",
        model=humo,
        make=partial(spoken, **square),
        change=without_whole,
        wrong=True,
        meshes=("u2",),
    ),
    Case(name="wan_s2v", family="WanModel_S2V", model=s2v, make=sung, modes=EVERY),
    Case(name="wan_s2v_batch", family="WanModel_S2V", model=s2v, make=partial(sung, batch=2)),
    Case(name="wan_s2v_full", family="WanModel_S2V", model=s2v, make=sung_full),
    # fewer tokens than some meshes have ranks
    Case(name="wan_s2v_tiny", family="WanModel_S2V", model=s2v, make=partial(sung, height=2, width=2)),
    Case(name="wan_s2v_silent", family="WanModel_S2V", model=s2v, make=video, meshes=FEW),
    Case(
        name="wan_s2v_skip",
        family="WanModel_S2V",
        model=s2v,
        make=partial(patched, sung, partial(skip, ("double_block", 0), ("double_block", 3))),
        modes=CHOOSES_BLOCK,
    ),
    Case(
        name="no_s2v_whole",
        family="WanModel_S2V",
        model=s2v,
        make=partial(sung, **square),
        change=without_whole,
        wrong=True,
        meshes=("u2",),
        modes=TRUNK,
    ),
    Case(
        name="no_s2v_e",
        family="WanModel_S2V",
        model=s2v,
        make=sung_full,
        change=partial(without, shared="e"),
        wrong=True,
        meshes=("u2",),
    ),
    Case(name="wan_animate", family="AnimateWanModel", model=animate, make=posed, modes=EVERY),
    Case(name="wan_animate_batch", family="AnimateWanModel", model=animate, make=partial(posed, batch=2)),
    Case(name="wan_animate_plain", family="AnimateWanModel", model=animate, make=clip, meshes=FEW),
    Case(
        name="wan_animate_skip",
        family="AnimateWanModel",
        model=animate,
        make=partial(patched, posed, partial(skip, ("double_block", 0))),
        modes=CHOOSES_BLOCK,
    ),
    Case(
        name="no_animate_whole",
        family="AnimateWanModel",
        model=animate,
        make=partial(posed, **square),
        change=without_whole,
        wrong=True,
        meshes=("u2",),
        modes=TRUNK,
    ),
    Case(name="wan_scail", family="SCAILWanModel", model=scail, make=poses, needs=SCAIL),
    Case(
        name="wan_scail_ref",
        family="SCAILWanModel",
        model=scail,
        make=partial(poses, half=True, batch=2, reference_latent=random(2, 4, 1, 8, 12)),
        needs=SCAIL,
    ),
    Case(
        name="wan_scail_skip",
        family="SCAILWanModel",
        model=scail,
        make=partial(patched, poses, partial(skip, ("double_block", 2))),
        modes=CHOOSES_BLOCK,
        needs=SCAIL,
    ),
    Case(
        name="no_scail_attention",
        family="SCAILWanModel",
        model=scail,
        make=poses,
        change=partial(without, attention=False),
        needs=SCAIL,
        wrong=True,
        meshes=("u2",),
    ),
    Case(name="wan_dancer", family="WanDancerModel", model=dancer, make=danced, modes=EVERY, needs=DANCER),
    # another patch embedding, rope and head
    Case(
        name="wan_dancer_fps",
        family="WanDancerModel",
        model=dancer,
        make=partial(danced, batch=2, fps=24.0, clip_fea_ref=random(2, 257, 1280)),
        needs=DANCER,
    ),
    Case(name="wan_dancer_silent", family="WanDancerModel", model=dancer, make=clip, needs=DANCER, meshes=FEW),
    Case(
        name="wan_dancer_skip",
        family="WanDancerModel",
        model=dancer,
        make=partial(patched, danced, partial(skip, ("double_block", 0), ("double_block", 3))),
        modes=CHOOSES_BLOCK,
        needs=DANCER,
    ),
    Case(
        name="no_dancer_whole",
        family="WanDancerModel",
        model=dancer,
        make=partial(danced, width=8),
        change=without_whole,
        needs=DANCER,
        wrong=True,
        meshes=("u2",),
        modes=TRUNK,
    ),
)
