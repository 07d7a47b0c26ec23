"""The example workflows of MiniMax-H3: see example_prompts.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from example_nodes import SCENE, Prompt

H3_SIZE: Mapping[str, Any] = {"width": 1344, "height": 768, "length": 124}
H3_VIDEO, H3_SOUND = "minimax_h3_video_vae_fp16.safetensors", "minimax_h3_audio_vae_fp32.safetensors"


def _h3(p: Prompt, task: str, *, small: bool, node: str, text: str, **given: Any) -> None:
    """MiniMax-H3: conditioning and latent by one of its nodes, sampling, a video with its sound."""
    pool = p.pool(sharded=small)
    model = p.model(pool, f"minimax_h3_{task}{'_pruned' if small else ''}_int8_convrot.safetensors")
    encoder = "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors"
    sound = p.add("VAELoader", vae_name=H3_SOUND)
    if node == "MiniMaxH3ReferenceToVideo":
        given["audio_vae"] = sound
    positive = p.add(
        node,
        "Prompt",
        clip=p.add("CLIPLoader", clip_name=encoder, type="minimax", device="default"),
        vae=p.add("VAELoader", vae_name=H3_VIDEO),
        prompt=text,
        **H3_SIZE,
        **given,
    )
    negative = p.add("ConditioningZeroOut", conditioning=positive)
    sampled = p.sampled(model, positive, negative, [positive[0], 1], sampler_name="res_multistep")
    parts = p.add("LTXVSeparateAVLatent", av_latent=sampled)
    images = p.decoded(model, parts, H3_VIDEO)
    p.video(images, 24.0, audio=p.add("VAEDecodeAudio", samples=[parts[0], 1], vae=sound))


def _h3_text(p: Prompt, small: bool) -> None:
    _h3(p, "fl2va", small=small, node="MiniMaxH3ImageToVideo", text=f"{SCENE}; its paws crunch in the snow")


def _h3_image(p: Prompt, small: bool) -> None:
    first = p.add("LoadImage", image="example.png")
    _h3(p, "fl2va", small=small, node="MiniMaxH3ImageToVideo", text="The camera moves closer", first_frame=first)


def _h3_references(p: Prompt, small: bool) -> None:
    given = {"ref_image_size": "match", "ref_images.ref_image_0": p.add("LoadImage", image="example.png")}
    text = "The subject of <Picture 1> walks through fresh snow at sunrise"
    _h3(p, "ref2va", small=small, node="MiniMaxH3ReferenceToVideo", text=text, **given)


def h3_t2v(p: Prompt) -> None:
    """MiniMax-H3, text to video with sound, on two GPUs that each hold the model (34 GB).

    - `models/diffusion_models/minimax_h3_fl2va_int8_convrot.safetensors`
    - `models/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors`
    - `models/vae/minimax_h3_video_vae_fp16.safetensors` and `minimax_h3_audio_vae_fp32.safetensors`

    Needs ComfyUI 0.33.0 or newer.
    """
    _h3_text(p, small=False)


def h3_t2v_24gb(p: Prompt) -> None:
    """MiniMax-H3, text to video with sound, on two cards of 24 GB: each has half of the weights (FSDP).

    - `models/diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors`
    - `models/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors`
    - `models/vae/minimax_h3_video_vae_fp16.safetensors` and `minimax_h3_audio_vae_fp32.safetensors`

    Needs ComfyUI 0.33.0 or newer. Where that is too much, FSDP_CPU_OFFLOAD streams the weights from host memory.
    """
    _h3_text(p, small=True)


def h3_i2v(p: Prompt) -> None:
    """MiniMax-H3, image to video with sound, on two GPUs that each hold the model (34 GB).

    - `models/diffusion_models/minimax_h3_fl2va_int8_convrot.safetensors`
    - `models/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors`
    - `models/vae/minimax_h3_video_vae_fp16.safetensors` and `minimax_h3_audio_vae_fp32.safetensors`
    - a picture `input/example.png`

    Needs ComfyUI 0.33.0 or newer.
    """
    _h3_image(p, small=False)


def h3_i2v_24gb(p: Prompt) -> None:
    """MiniMax-H3, image to video with sound, on two cards of 24 GB: each has half of the weights (FSDP).

    - `models/diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors`
    - `models/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors`
    - `models/vae/minimax_h3_video_vae_fp16.safetensors` and `minimax_h3_audio_vae_fp32.safetensors`
    - a picture `input/example.png`

    Needs ComfyUI 0.33.0 or newer. Where that is too much, FSDP_CPU_OFFLOAD streams the weights from host memory.
    """
    _h3_image(p, small=True)


def h3_references(p: Prompt) -> None:
    """MiniMax-H3, a video with sound of what a picture shows, on two GPUs that each hold the model (34 GB).

    - `models/diffusion_models/minimax_h3_ref2va_int8_convrot.safetensors`
    - `models/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors`
    - `models/vae/minimax_h3_video_vae_fp16.safetensors` and `minimax_h3_audio_vae_fp32.safetensors`
    - a picture `input/example.png`

    Needs ComfyUI 0.33.0 or newer.
    """
    _h3_references(p, small=False)


def h3_references_24gb(p: Prompt) -> None:
    """MiniMax-H3, a video with sound of what a picture shows, on two cards of 24 GB: each has half of the weights.

    - `models/diffusion_models/minimax_h3_ref2va_pruned_int8_convrot.safetensors`
    - `models/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors`
    - `models/vae/minimax_h3_video_vae_fp16.safetensors` and `minimax_h3_audio_vae_fp32.safetensors`
    - a picture `input/example.png`

    Needs ComfyUI 0.33.0 or newer. Where that is too much, FSDP_CPU_OFFLOAD streams the weights from host memory.
    """
    _h3_references(p, small=True)


OF_H3 = (h3_t2v, h3_t2v_24gb, h3_i2v, h3_i2v_24gb, h3_references, h3_references_24gb)
