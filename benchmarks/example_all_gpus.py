"""The smallest example workflows, with Load Model (all GPUs) and no number to set: see example_prompts.py."""

from __future__ import annotations

from typing import Any

from example_h3 import H3_SIZE, H3_SOUND, H3_VIDEO
from example_nodes import SCENE, Prompt


def all_gpus_sdxl(p: Prompt) -> None:
    """SDXL on all GPUs, the smallest workflow: it is chosen by itself how they share.

    - `models/checkpoints/sd_xl_base_1.0.safetensors`

    ComfyUI's log says what was chosen, and why.
    """
    model, clip, vae = p.everything("sd_xl_base_1.0.safetensors")
    positive, negative = p.texts(clip)
    latent = p.add("EmptyLatentImage", width=1024, height=1024, batch_size=1)
    p.picture(p.add("VAEDecode", samples=p.plainly(model, positive, negative, latent), vae=vae))


def all_gpus_wan22(p: Prompt) -> None:
    """Wan 2.2 5B on all GPUs, the smallest workflow: it is chosen by itself how they share.

    - `models/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors`
    - `models/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors`
    - `models/vae/wan2.2_vae.safetensors`

    ComfyUI's log says what was chosen, and why.
    """
    model, _, _ = p.everything("wan2.2_ti2v_5B_fp16.safetensors")
    name = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    positive, negative = p.texts(p.add("CLIPLoader", clip_name=name, type="wan", device="default"))
    shifted = p.add("ModelSamplingSD3", model=model, shift=8.0)
    vae = p.add("VAELoader", vae_name="wan2.2_vae.safetensors")
    latent = p.add("Wan22ImageToVideoLatent", vae=vae, width=1280, height=704, length=49, batch_size=1)
    sampled = p.plainly(shifted, positive, negative, latent, cfg=5.0, sampler_name="uni_pc", scheduler="simple")
    p.video(p.add("VAEDecode", samples=sampled, vae=vae), 24.0)


def all_gpus_h3(p: Prompt) -> None:
    """MiniMax-H3 on all GPUs, a video with sound: the smallest workflow. It is chosen by itself how they share.

    - `models/diffusion_models/minimax_h3_fl2va_int8_convrot.safetensors`
    - `models/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors`
    - `models/vae/minimax_h3_video_vae_fp16.safetensors` and `minimax_h3_audio_vae_fp32.safetensors`

    The model has 34 GB. Where that is too much for a GPU, each keeps a part of the weights. ComfyUI's log says what was
    chosen, and why. Needs ComfyUI 0.33.0 or newer.
    """
    model, _, _ = p.everything("minimax_h3_fl2va_int8_convrot.safetensors")
    name = "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors"
    clip = p.add("CLIPLoader", clip_name=name, type="minimax", device="default")
    vae, sound = p.add("VAELoader", vae_name=H3_VIDEO), p.add("VAELoader", vae_name=H3_SOUND)
    text = f"{SCENE}; its paws crunch in the snow"
    positive = p.add("MiniMaxH3ImageToVideo", "Prompt", clip=clip, vae=vae, prompt=text, **H3_SIZE)
    negative = p.add("ConditioningZeroOut", conditioning=positive)
    changes: dict[str, Any] = {"cfg": 1.0, "sampler_name": "res_multistep", "scheduler": "simple"}
    sampled = p.plainly(model, positive, negative, [positive[0], 1], **changes)
    parts = p.add("LTXVSeparateAVLatent", av_latent=sampled)
    images = p.add("VAEDecode", samples=parts, vae=vae)
    p.video(images, 24.0, audio=p.add("VAEDecodeAudio", samples=[parts[0], 1], vae=sound))


def all_gpus_flux2(p: Prompt) -> None:
    """Flux.2 dev on all GPUs, the smallest workflow: it is chosen by itself how they share.

    - `models/diffusion_models/flux2_dev_fp8mixed.safetensors`
    - `models/text_encoders/mistral_3_small_flux2_fp8.safetensors`
    - `models/vae/flux2-vae.safetensors`

    ComfyUI's log says what was chosen, and why.
    """
    model, _, _ = p.everything("flux2_dev_fp8mixed.safetensors")
    clip = p.add("CLIPLoader", clip_name="mistral_3_small_flux2_fp8.safetensors", type="flux2", device="default")
    text = p.add("CLIPTextEncode", "Prompt", text=SCENE, clip=clip)
    positive = p.add("FluxGuidance", conditioning=text, guidance=4.0)
    negative = p.add("ConditioningZeroOut", conditioning=text)
    size: dict[str, Any] = {"width": 1024, "height": 1024}
    sigmas = p.add("Flux2Scheduler", steps=20, **size)
    latent = p.add("EmptyFlux2LatentImage", **size, batch_size=1)
    sampled = p.plainly_custom(model, positive, negative, latent, sigmas=sigmas, cfg=1.0)
    p.picture(p.add("VAEDecode", samples=sampled, vae=p.add("VAELoader", vae_name="flux2-vae.safetensors")))


def all_gpus_qwen_image(p: Prompt) -> None:
    """Qwen-Image on all GPUs, the smallest workflow: it is chosen by itself how they share.

    - `models/diffusion_models/qwen_image_fp8_e4m3fn.safetensors`
    - `models/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors`
    - `models/vae/qwen_image_vae.safetensors`

    ComfyUI's log says what was chosen, and why.
    """
    model, _, _ = p.everything("qwen_image_fp8_e4m3fn.safetensors")
    name = "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    positive, negative = p.texts(p.add("CLIPLoader", clip_name=name, type="qwen_image", device="default"))
    shifted = p.add("ModelSamplingAuraFlow", model=model, shift=3.1)
    latent = p.add("EmptySD3LatentImage", width=1328, height=1328, batch_size=1)
    sampled = p.plainly(shifted, positive, negative, latent, cfg=4.0, scheduler="simple")
    p.picture(p.add("VAEDecode", samples=sampled, vae=p.add("VAELoader", vae_name="qwen_image_vae.safetensors")))


def all_gpus_ltx2(p: Prompt) -> None:
    """LTX-2 on all GPUs, a video with sound: the smallest workflow. It is chosen by itself how they share.

    - `models/checkpoints/ltx-2-19b-dev-fp8.safetensors`, which has the VAEs too
    - `models/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors`

    ComfyUI's log says what was chosen, and why. Needs ComfyUI 0.8.0 or newer, which has LTX-2's nodes.
    """
    file, rate, length = "ltx-2-19b-dev-fp8.safetensors", 25, 121
    model, _, vae = p.everything(file)
    encoder = "gemma_3_12B_it_fp4_mixed.safetensors"
    positive, negative = p.texts(
        p.add("LTXAVTextEncoderLoader", text_encoder=encoder, ckpt_name=file, device="default")
    )
    given = p.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=float(rate))
    sound = p.add("LTXVAudioVAELoader", ckpt_name=file)
    video = p.add("EmptyLTXVLatentVideo", width=768, height=512, length=length, batch_size=1)
    audio = p.add("LTXVEmptyLatentAudio", frames_number=length, frame_rate=rate, batch_size=1, audio_vae=sound)
    latent = p.add("LTXVConcatAVLatent", video_latent=video, audio_latent=audio)
    shape: dict[str, Any] = {"max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1}
    sigmas = p.add("LTXVScheduler", steps=20, **shape, latent=latent)
    sampled = p.plainly_custom(model, given, [given[0], 1], latent, sigmas=sigmas, cfg=4.0)
    parts = p.add("LTXVSeparateAVLatent", av_latent=sampled)
    images = p.add("VAEDecode", samples=parts, vae=vae)
    p.video(images, float(rate), audio=p.add("LTXVAudioVAEDecode", samples=[parts[0], 1], audio_vae=sound))


OF_ALL_GPUS = (all_gpus_sdxl, all_gpus_wan22, all_gpus_h3, all_gpus_flux2, all_gpus_qwen_image, all_gpus_ltx2)
