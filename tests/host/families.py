"""One member of every model family: its checkpoint, and what it is sampled with so that every input counts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoints import Job
from .prompts import Case, Inputs


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family with a checkpoint as small as ComfyUI's detection allows.

    Attributes:
        model: class of the diffusion model, by which plans are found.
        inputs: latent and conditioning.
        recipe: key of `checkpoints.recipes.RECIPES`, "" for the family's own name.
        since: the first ComfyUI version that has it in this size, as numbers.
        cfg: 1.0 where the model cannot take two conditionings in one batch.
        batch: of the latent; videos of UNets are a batch of frames.
        steps: fewer where each takes seconds.
        denoise: less than 1.0 for a model whose first input would be so large that nothing else counts.
        dtype: of the file, "" for the recipe's.
        weight_dtype: of the loader; fp8 keeps a wide model small in memory, the computation is fp32 all the same.
        large: the file has more than 400 MB.
        ignores: arguments that ComfyUI gives to the model's forward, which has no use for them.
        size: overrides of the recipe's sizes.
    """

    model: str
    inputs: Inputs
    recipe: str = ""
    since: tuple[int, ...] = (0, 3, 75)
    cfg: float = 3.0
    batch: int = 1
    steps: int = 2
    denoise: float = 1.0
    dtype: str = ""
    weight_dtype: str = "default"
    large: bool = False
    ignores: tuple[str, ...] = ()
    size: Mapping[str, int] = field(default_factory=dict)


def job(name: str, folder: Path) -> Job:
    """The family's checkpoint in `folder`, whose file name is the recipe's."""
    family = FAMILIES[name]
    recipe = family.recipe or name
    return Job(family=recipe, path=folder / f"{recipe}.safetensors", dtype=family.dtype, size=family.size)


def case(name: str, *, folder: str = "", **more: Any) -> Case:
    """A few steps of the family, on ComfyUI's own KSampler.

    Args:
        folder: of the checkpoint, below that of the diffusion models.
        more: other attributes of the case.
    """
    family = FAMILIES[name]
    given = {"sampling": "KSampler", "random_latent": bool(family.inputs.kept) or family.denoise < 1.0, **more}
    return Case(
        file=os.path.join(folder, f"{family.recipe or name}.safetensors"),
        inputs=family.inputs,
        cfg=family.cfg,
        batch=family.batch,
        steps=family.steps,
        denoise=family.denoise,
        weight_dtype=family.weight_dtype,
        **given,
    )


def of_version(version: str, *, large: bool = False) -> dict[str, Family]:
    """The families that this ComfyUI has, with or without the large ones."""
    numbers = tuple(int(part) for part in version.split("."))
    return {name: each for name, each in FAMILIES.items() if each.since <= numbers and (large or not each.large)}


def _clip_vision(tokens: int = 257, width: int = 1280, *, part: str = "penultimate_hidden_states") -> dict[str, Any]:
    return {"object": {part: {"randn": [1, tokens, width]}}}


def _latent(*shape: int) -> dict[str, Any]:
    return {"randn": [1, *shape]}


def _wan(**extras: Any) -> Inputs:
    return Inputs(channels=16, frames=3, height=14, width=18, tokens=12, context=4096, extras=extras)


V20 = (0, 20, 1)
V33 = (0, 33, 0)
H3 = Inputs(shape="24,3,6,10;32,2,7", tokens=9, context=40)
H3_REFERENCES = [
    {"kind": "image", "latent_h": 4, "latent_w": 6, "latent": {"randn": [1, 24, 1, 4, 6]}},
    {
        "kind": "video_audio",
        "latent_t": 2,
        "latent_h": 4,
        "latent_w": 4,
        "ref_audio_t": 5,
        "latent": {"randn": [1, 24, 2, 4, 4]},
        "audio_latent": {"randn": [1, 32, 2, 5]},
    },
]
H3_KEYFRAMES = [
    {"resolved_frame_index": 0, "latent": {"randn": [1, 24, 1, 6, 10]}, "audio_latent": {"randn": [1, 32, 2, 2]}},
    {"resolved_frame_index": 8, "latent": {"randn": [1, 24, 1, 6, 10]}},
]
GRID = (3, 14, 18)
FP8 = "fp8_e4m3fn"
IMAGE = Inputs(channels=16, height=26, width=30, tokens=19, context=64)
VIDEO = Inputs(channels=16, frames=3, height=14, width=18, tokens=19, context=64)
UNET = Inputs(channels=4, height=17, width=14, tokens=77, context=768)
QWEN = Inputs(
    channels=16, frames=1, height=14, width=18, tokens=9, context=3584, extras={"attention_mask": {"mask": [9, 7]}}
)

FAMILIES: Mapping[str, Family] = {
    "wan": Family(model="WanModel", inputs=_wan()),
    "wan_i2v": Family(
        model="WanModel", inputs=_wan(concat_latent_image=_latent(16, *GRID), clip_vision_output=_clip_vision())
    ),
    "wan_ti2v": Family(
        model="WanModel",
        ignores=("denoise_mask",),
        inputs=Inputs(channels=48, frames=3, height=14, width=18, kept=1, tokens=12, context=4096),
    ),
    "wan_causal": Family(model="CausalWanModel", since=V20, inputs=_wan()),
    "wan_vace": Family(
        model="VaceWanModel",
        inputs=_wan(vace_frames=[_latent(32, *GRID)], vace_mask=[_latent(64, *GRID)], vace_strength=[0.7]),
    ),
    "wan_camera": Family(
        model="CameraWanModel",
        inputs=_wan(
            concat_latent_image=_latent(16, *GRID),
            clip_vision_output=_clip_vision(),
            camera_conditions=_latent(24, 3, 8 * 14, 8 * 18),
        ),
    ),
    "wan_s2v": Family(
        model="WanModel_S2V",
        inputs=_wan(
            audio_embed=_latent(25, 1024, 12),
            reference_latents=[_latent(16, 1, 14, 18)],
            control_video=_latent(16, *GRID),
        ),
    ),
    "wan_humo": Family(
        model="HumoWanModel",
        inputs=_wan(audio_embed=_latent(3, 8, 5, 1280), reference_latents=[_latent(16, 1, 14, 18)]),
    ),
    "wan_animate": Family(
        model="AnimateWanModel",
        cfg=1.0,
        steps=1,
        inputs=_wan(
            concat_latent_image=_latent(16, *GRID),
            clip_vision_output=_clip_vision(),
            pose_video_latent=_latent(16, 2, 14, 18),
            face_video_pixels=_latent(3, 1, 512, 512),
        ),
    ),
    "wan_scail": Family(
        model="SCAILWanModel",
        since=V20,
        inputs=_wan(
            clip_vision_output=_clip_vision(),
            pose_video_latent=_latent(16, 3, 8, 10),
            reference_latents=[_latent(16, 1, 14, 18)],
        ),
    ),
    "wan_scail2": Family(
        model="SCAIL2WanModel",
        since=V33,
        inputs=_wan(
            clip_vision_output=_clip_vision(),
            pose_video_latent=_latent(16, 3, 8, 10),
            reference_latents=[_latent(16, 1, 14, 18)],
        ),
    ),
    "wan_animate2": Family(
        model="WanAnimate2Model",
        since=V33,
        inputs=_wan(
            concat_latent_image=_latent(16, *GRID),
            clip_vision_output=_clip_vision(),
            pose_video_latent=_latent(16, 2, 14, 18),
        ),
    ),
    "wan_dancer": Family(
        model="WanDancerModel",
        since=V20,
        cfg=1.0,
        inputs=Inputs(
            channels=16,
            frames=3,
            height=16,
            width=18,
            tokens=12,
            context=4096,
            extras={
                "concat_latent_image": _latent(16, 3, 16, 18),
                "clip_vision_output": _clip_vision(),
                "clip_vision_output_ref": _clip_vision(),
                "audio_embed": _latent(20, 35),
                "fps": 24.0,
                "audio_inject_scale": 0.8,
            },
        ),
    ),
    "flux": Family(
        model="Flux",
        since=V20,
        size={"context": 64},
        inputs=dataclasses.replace(IMAGE, pooled=768, guidance=3.5),
    ),
    "longcat": Family(model="Flux", since=V20, inputs=dataclasses.replace(IMAGE, context=3584)),
    "flux2": Family(
        model="Flux",
        since=V20,
        ignores=("guidance",),
        inputs=Inputs(
            channels=128,
            height=13,
            width=15,
            tokens=19,
            context=64,
            extras={"reference_latents": [_latent(128, 6, 7)]},
        ),
    ),
    "chroma": Family(
        model="Chroma", large=True, ignores=("y",), inputs=dataclasses.replace(IMAGE, pooled=768, guidance=1.0)
    ),
    "radiance": Family(
        model="ChromaRadiance",
        large=True,
        weight_dtype=FP8,
        ignores=("y",),
        inputs=Inputs(channels=3, height=16 * 9, width=16 * 11, tokens=19, context=64, pooled=768, guidance=1.0),
    ),
    "qwen": Family(model="QwenImageTransformer2DModel", inputs=QWEN),
    "qwen_edit": Family(
        model="QwenImageTransformer2DModel",
        recipe="qwen",
        inputs=dataclasses.replace(QWEN, extras={**QWEN.extras, "reference_latents": [_latent(16, 1, 8, 10)]}),
    ),
    "hunyuan": Family(
        model="HunyuanVideo",
        cfg=1.0,
        inputs=dataclasses.replace(VIDEO, pooled=768, guidance=6.0, extras={"attention_mask": {"mask": [19, 13]}}),
    ),
    "hunyuan15": Family(
        model="HunyuanVideo",
        ignores=("y", "guidance"),
        inputs=Inputs(
            channels=32,
            frames=3,
            height=7,
            width=9,
            tokens=19,
            context=64,
            pooled=768,
            extras={
                "concat_latent_image": _latent(32, 3, 7, 9),
                "conditioning_byt5small": _latent(5, 1472),
                "clip_vision_output": _clip_vision(9, 1152, part="last_hidden_state"),
            },
        ),
    ),
    "hunyuan_image": Family(
        model="HunyuanVideo",
        ignores=("guidance",),
        inputs=Inputs(
            channels=64,
            height=13,
            width=15,
            tokens=19,
            context=64,
            extras={"conditioning_byt5small": _latent(5, 1472)},
        ),
    ),
    "lumina2": Family(model="NextDiT", large=True, dtype="float8_e4m3fn", inputs=IMAGE),
    "newbie": Family(model="NextDiT", since=V20, large=True, inputs=dataclasses.replace(IMAGE, pooled=64)),
    "zimage": Family(model="NextDiT", large=True, dtype="float8_e4m3fn", weight_dtype=FP8, inputs=IMAGE),
    "zimage_pixel": Family(
        model="NextDiTPixelSpace",
        since=V20,
        large=True,
        inputs=Inputs(channels=3, height=16 * 9, width=16 * 11, tokens=13, context=64),
    ),
    "sd3": Family(model="OpenAISignatureMMDITWrapper", inputs=dataclasses.replace(IMAGE, pooled=32)),
    "auraflow": Family(
        model="MMDiT",
        large=True,
        inputs=Inputs(channels=4, height=26, width=30, tokens=19, context=2048),
    ),
    "ltxv": Family(
        model="LTXVModel",
        ignores=("denoise_mask",),
        inputs=Inputs(
            channels=128,
            frames=3,
            height=7,
            width=9,
            kept=1,
            tokens=19,
            context=4096,
            extras={"attention_mask": {"mask": [19, 13]}, "frame_rate": 24.0},
        ),
    ),
    "ltxav": Family(
        model="LTXAVModel",
        since=V20,
        inputs=Inputs(
            shape="128,3,7,9;8,11,16",
            tokens=19,
            context=64,
            extras={"frame_rate": 24.0, "unprocessed_ltxav_embeds": True},
        ),
    ),
    "h3": Family(model="MiniMaxH3Model", since=V33, inputs=H3),
    "h3_curves": Family(model="MiniMaxH3Model", since=V33, inputs=H3),
    "h3_masks": Family(model="MiniMaxH3Model", recipe="h3", since=V33, inputs=dataclasses.replace(H3, kept=1), cfg=1.0),
    "h3_references": Family(
        model="MiniMaxH3Model",
        recipe="h3",
        since=V33,
        # it reads them where they are conditions
        ignores=tuple(f"minimax_payload.refs.{end}" for end in ("0.latent", "1.latent", "1.audio_latent")),
        inputs=dataclasses.replace(H3, extras={"minimax_refs": H3_REFERENCES}),
    ),
    "h3_keyframes": Family(
        model="MiniMaxH3Model",
        recipe="h3",
        since=V33,
        ignores=tuple(f"minimax_payload.keyframes.{end}" for end in ("0.latent", "0.audio_latent", "1.latent")),
        inputs=dataclasses.replace(H3, extras={"minimax_keyframes": H3_KEYFRAMES}),
    ),
    "krea2": Family(
        model="SingleStreamDiT",
        since=V33,
        inputs=Inputs(
            channels=16, height=14, width=18, tokens=9, context=80, extras={"reference_latents": [_latent(16, 6, 10)]}
        ),
    ),
    "lens": Family(
        model="LensTransformer2DModel",
        since=V33,
        inputs=Inputs(
            channels=128, height=14, width=10, tokens=9, context=40, extras={"attention_mask": {"mask": [9, 7]}}
        ),
    ),
    "joyimage": Family(
        model="JoyImageTransformer3DModel",
        since=V33,
        inputs=Inputs(
            channels=16,
            frames=1,
            height=14,
            width=18,
            tokens=9,
            context=4096,
            extras={"reference_latents": [_latent(16, 1, 6, 10)]},
        ),
    ),
    "ideogram4": Family(
        model="Ideogram4Transformer2DModel",
        since=V33,
        large=True,
        weight_dtype=FP8,
        inputs=Inputs(
            channels=128, height=7, width=9, tokens=9, context=53248, extras={"attention_mask": {"mask": [9, 7]}}
        ),
    ),
    "cosmos": Family(
        model="GeneralDIT",
        inputs=Inputs(channels=16, frames=3, height=6, width=10, tokens=7, context=1024, extras={"frame_rate": 24}),
    ),
    "cosmos2": Family(
        model="MiniTrainDIT",
        large=True,
        weight_dtype=FP8,
        ignores=("denoise_mask",),
        inputs=dataclasses.replace(VIDEO, kept=1, context=1024),
    ),
    "anima": Family(
        model="Anima",
        since=V20,
        large=True,
        weight_dtype=FP8,
        inputs=dataclasses.replace(
            VIDEO,
            frames=1,
            context=1024,
            extras={"t5xxl_ids": {"ints": [32000, 7]}, "t5xxl_weights": {"randn": [7]}},
        ),
    ),
    "kandinsky5": Family(model="Kandinsky5", since=V20, inputs=dataclasses.replace(VIDEO, context=3584, pooled=768)),
    "hunyuan3d": Family(
        model="Hunyuan3Dv2", ignores=("guidance",), inputs=Inputs(shape="64,195", tokens=19, context=64)
    ),
    "hunyuan3d_21": Family(
        model="HunYuanDiTPlain", ignores=("guidance",), inputs=Inputs(shape="64,195", tokens=19, context=1024)
    ),
    "hunyuan_dit": Family(
        model="HunYuanDiT",
        ignores=("image_meta_size",),
        inputs=Inputs(
            channels=4,
            height=26,
            width=30,
            tokens=77,
            context=1024,
            extras={
                "attention_mask": {"mask": [77, 20]},
                "conditioning_mt5xl": _latent(256, 2048),
                "attention_mask_mt5xl": {"mask": [256, 30]},
            },
        ),
    ),
    "pixart": Family(
        model="PixArtMS",
        ignores=("c_size", "c_ar"),
        inputs=Inputs(channels=4, height=34, width=36, tokens=16, context=4096),
    ),
    "ace15": Family(
        model="AceStepConditionGenerationModel",
        since=V20,
        inputs=Inputs(shape="64,51", tokens=19, context=1024, extras={"conditioning_lyrics": _latent(7, 1024)}),
    ),
    "music3": Family(
        model="MiniMaxMusic3DiT",
        since=V33,
        large=True,
        steps=1,
        weight_dtype=FP8,
        inputs=Inputs(shape="128,41", tokens=12, context=32768, extras={"conditioning_scale": {"randn": [1, 1, 1]}}),
    ),
    "seedvr2": Family(
        model="NaDiT",
        since=V33,
        large=True,
        steps=1,
        weight_dtype=FP8,
        inputs=Inputs(
            channels=16,
            frames=3,
            height=10,
            width=14,
            tokens=7,
            context=5120,
            extras={"condition": _latent(17, 3, 10, 14)},
        ),
    ),
    "cogvideox": Family(model="CogVideoXTransformer3DModel", since=V20, denoise=0.5, inputs=VIDEO),
    "unet": Family(model="UNetModel", inputs=UNET),
    "sd15_inpaint": Family(
        model="UNetModel",
        inputs=dataclasses.replace(
            UNET, extras={"concat_latent_image": _latent(4, 17, 14), "concat_mask": _latent(1, 17, 14)}
        ),
    ),
    "sd2": Family(model="UNetModel", inputs=dataclasses.replace(UNET, context=1024)),
    "sdxl_refiner": Family(model="UNetModel", inputs=dataclasses.replace(UNET, context=1280, pooled=1280)),
    "svd": Family(
        model="UNetModel",
        batch=3,
        denoise=0.5,
        inputs=dataclasses.replace(
            UNET,
            tokens=1,
            context=1024,
            extras={"concat_latent_image": _latent(4, 17, 14), "fps": 6, "motion_bucket_id": 127},
        ),
    ),
    "sdxl": Family(
        model="UNetModel", inputs=Inputs(channels=4, height=27, width=22, tokens=77, context=2048, pooled=1280)
    ),
}
"""By name, which is also the recipe's. Not here, since ComfyUI fixes their sizes at billions of weights: Mochi (10),
HiDream (17), ErnieImage (8), Omnigen2 (4), ACE-Step 1 (3.5) and StableAudio (1)."""
