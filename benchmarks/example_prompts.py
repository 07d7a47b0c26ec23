"""The example workflows as API prompts: a function each, whose docstring is the note on the canvas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from example_all_gpus import OF_ALL_GPUS
from example_h3 import OF_H3
from example_nodes import SCENE, Link, Prompt

DEMO = "raylight_demo"


def _demo(p: Prompt, model: Link) -> None:
    """The rest of the demo: a prompt of three words, an empty negative one, a short animation."""
    clip = p.add("CLIPLoader", clip_name=f"{DEMO}_words.safetensors", type="sd3", device="default")
    positive, negative = p.texts(clip, "red circle right", "")
    shifted = p.add("RayModelSamplingSD3", ray_actors=model, shift=2.0)
    latent = p.add("EmptyHunyuanLatentVideo", width=64, height=64, length=17, batch_size=1)
    sampled = p.sampled(shifted, positive, negative, latent, cfg=2.0)
    images = p.decoded(shifted, sampled, f"{DEMO}_vae.safetensors")
    p.add(
        "SaveAnimatedWEBP",
        images=images,
        filename_prefix=DEMO,
        fps=8.0,
        lossless=True,
        quality=90,
        method="default",
    )
    p.add("RayReport", ray_actors=shifted, latent=sampled)


def demo(p: Prompt) -> None:
    """The demo: a small model that comes with the pack makes a coloured shape move.

    Its files: `python custom_nodes/raylight/examples/install_demo.py` puts them into `models`.

    Three words of the prompt choose what moves: **red, green, blue** or **yellow**; **circle, square** or **triangle**;
    **left, right, up** or **down**. The text encoder knows no other words. Pictures have 64 x 64 pixels and 17 frames,
    as the model has learned them.
    """
    _demo(p, p.model(p.pool(), f"{DEMO}.safetensors"))


def demo_lora(p: Prompt) -> None:
    """The demo with a LoRA, which moves it to a world of ink on paper.

    Its files: `python custom_nodes/raylight/examples/install_demo.py` puts them into `models`.
    """
    model = p.model(p.pool(), f"{DEMO}.safetensors")
    lora = f"{DEMO}_paper.safetensors"
    _demo(p, p.add("RayLoraLoaderModelOnly", ray_actors=model, lora_name=lora, strength_model=1.0))


def demo_gguf(p: Prompt) -> None:
    """The demo from a GGUF file: its weights stay in 8 bits on the workers.

    Its files: `python custom_nodes/raylight/examples/install_demo.py` puts them into `models`.
    """
    file = f"{DEMO}_Q8_0.gguf"
    pool = p.pool()
    _demo(
        p, p.add("RayGGUFLoader", unet_name=file, dequant_dtype="default", patch_dtype="default", ray_actors_init=pool)
    )


def wan21_t2v(p: Prompt) -> None:
    """Wan 2.1, text to video, on two GPUs.

    - `models/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors`
    - `models/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors`
    - `models/vae/wan_2.1_vae.safetensors`

    cfg is above 1: with four GPUs, cfg_degree 2 and ulysses_degree 2 are better than ulysses_degree 4.
    """
    model = p.add("RayModelSamplingSD3", ray_actors=p.model(p.pool(), "wan2.1_t2v_1.3B_fp16.safetensors"), shift=8.0)
    clip = p.add("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan", device="default")
    positive, negative = p.texts(clip)
    latent = p.add("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1)
    sampled = p.sampled(model, positive, negative, latent, steps=30, cfg=6.0, sampler_name="uni_pc")
    p.video(p.decoded(model, sampled, "wan_2.1_vae.safetensors"), 16.0)


def wan22_i2v(p: Prompt) -> None:
    """Wan 2.2, image to video: two experts on the same two GPUs.

    - `models/diffusion_models/wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors`, and `low_noise`
    - `models/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors`
    - `models/vae/wan_2.1_vae.safetensors`

    Both are loaded once; the workers make room for each other's by themselves.
    """
    pool = p.pool()
    high, low = (
        p.add(
            "RayModelSamplingSD3",
            ray_actors=p.model(pool, f"wan2.2_i2v_{name}_noise_14B_fp8_scaled.safetensors"),
            shift=8.0,
        )
        for name in ("high", "low")
    )
    clip = p.add("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan", device="default")
    positive, negative = p.texts(clip)
    given = p.add(
        "WanImageToVideo",
        positive=positive,
        negative=negative,
        vae=p.add("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        width=832,
        height=480,
        length=81,
        batch_size=1,
        start_image=p.add("LoadImage", image="example.png"),
    )
    positive, negative, latent = ([given[0], number] for number in range(3))
    first = p.sampled(high, positive, negative, latent, cfg=3.5, end_at_step=10, return_with_leftover_noise="enable")
    second = p.sampled(low, positive, negative, first, cfg=3.5, add_noise="disable", start_at_step=10)
    p.video(p.decoded(low, second, "wan_2.1_vae.safetensors"), 16.0)


def _flux(p: Prompt) -> tuple[Link, Link]:
    clip = p.add(
        "DualCLIPLoader",
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp8_e4m3fn_scaled.safetensors",
        type="flux",
        device="default",
    )
    text = p.add("CLIPTextEncode", "Prompt", text=SCENE, clip=clip)
    positive = p.add("FluxGuidance", conditioning=text, guidance=3.5)
    return positive, p.add("ConditioningZeroOut", conditioning=text)


def flux1_dev(p: Prompt) -> None:
    """Flux.1 dev on two GPUs: it needs no negative prompt, so all workers share the picture.

    - `models/diffusion_models/flux1-dev.safetensors`
    - `models/text_encoders/clip_l.safetensors` and `t5xxl_fp8_e4m3fn_scaled.safetensors`
    - `models/vae/ae.safetensors`
    """
    model = p.model(p.pool(), "flux1-dev.safetensors")
    positive, negative = _flux(p)
    latent = p.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    p.picture(p.decoded(model, p.sampled(model, positive, negative, latent), "ae.safetensors"))


def flux2_dev(p: Prompt) -> None:
    """Flux.2 dev on two GPUs.

    - `models/diffusion_models/flux2_dev_fp8mixed.safetensors`
    - `models/text_encoders/mistral_3_small_flux2_fp8.safetensors`
    - `models/vae/flux2-vae.safetensors`
    """
    model = p.model(p.pool(), "flux2_dev_fp8mixed.safetensors")
    clip = p.add("CLIPLoader", clip_name="mistral_3_small_flux2_fp8.safetensors", type="flux2", device="default")
    text = p.add("CLIPTextEncode", "Prompt", text=SCENE, clip=clip)
    positive = p.add("FluxGuidance", conditioning=text, guidance=4.0)
    negative = p.add("ConditioningZeroOut", conditioning=text)
    size: dict[str, Any] = {"width": 1024, "height": 1024}
    sigmas = p.add("Flux2Scheduler", steps=20, **size)
    latent = p.add("EmptyFlux2LatentImage", **size, batch_size=1)
    p.picture(
        p.decoded(model, p.custom(model, positive, negative, latent, sigmas=sigmas, cfg=1.0), "flux2-vae.safetensors")
    )


def qwen_image_lora(p: Prompt) -> None:
    """Qwen-Image with a LoRA for few steps, on two GPUs.

    - `models/diffusion_models/qwen_image_fp8_e4m3fn.safetensors`
    - `models/loras/Qwen-Image-Lightning-8steps-V1.0.safetensors`
    - `models/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors`
    - `models/vae/qwen_image_vae.safetensors`
    """
    model = p.model(p.pool(), "qwen_image_fp8_e4m3fn.safetensors")
    lora = "Qwen-Image-Lightning-8steps-V1.0.safetensors"
    model = p.add("RayLoraLoaderModelOnly", ray_actors=model, lora_name=lora, strength_model=1.0)
    model = p.add("RayModelSamplingAuraFlow", ray_actors=model, shift=3.1)
    clip = p.add("CLIPLoader", clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image", device="default")
    positive, negative = p.texts(clip)
    latent = p.add("EmptySD3LatentImage", width=1328, height=1328, batch_size=1)
    sampled = p.sampled(model, positive, negative, latent, steps=8)
    p.picture(p.decoded(model, sampled, "qwen_image_vae.safetensors"))


def z_image_turbo(p: Prompt) -> None:
    """Z-Image Turbo on two GPUs: eight steps, no negative prompt.

    - `models/diffusion_models/z_image_turbo_bf16.safetensors`
    - `models/text_encoders/qwen_3_4b.safetensors`
    - `models/vae/ae.safetensors`
    """
    model = p.model(p.pool(), "z_image_turbo_bf16.safetensors")
    model = p.add("RayModelSamplingAuraFlow", ray_actors=model, shift=3.0)
    clip = p.add("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2", device="default")
    positive = p.add("CLIPTextEncode", "Prompt", text=SCENE, clip=clip)
    negative = p.add("ConditioningZeroOut", conditioning=positive)
    latent = p.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    sampled = p.sampled(model, positive, negative, latent, steps=8, sampler_name="res_multistep")
    p.picture(p.decoded(model, sampled, "ae.safetensors"))


def ltx2_chunked(p: Prompt) -> None:
    """LTX-2, video with sound, on two GPUs; feed-forward layers in stretches, and empty GPUs for the decode.

    - `models/checkpoints/ltx-2-19b-dev-fp8.safetensors`
    - `models/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors`
    - `models/vae/LTX2_video_vae_bf16.safetensors`

    Needs ComfyUI 0.8.0 or newer, which has LTX-2's nodes.
    """
    file, rate, length = "ltx-2-19b-dev-fp8.safetensors", 25, 121
    model = p.add("RayLTXFFNChunker", ray_actors=p.model(p.pool(), file), ffn_chunks=8)
    encoder = "gemma_3_12B_it_fp4_mixed.safetensors"
    clip = p.add("LTXAVTextEncoderLoader", text_encoder=encoder, ckpt_name=file, device="default")
    positive, negative = p.texts(clip)
    given = p.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=float(rate))
    sound = p.add("LTXVAudioVAELoader", ckpt_name=file)
    latent = p.add(
        "LTXVConcatAVLatent",
        video_latent=p.add("EmptyLTXVLatentVideo", width=768, height=512, length=length, batch_size=1),
        audio_latent=p.add(
            "LTXVEmptyLatentAudio", frames_number=length, frame_rate=rate, batch_size=1, audio_vae=sound
        ),
    )
    sigmas = p.add(
        "LTXVScheduler", steps=20, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent=latent
    )
    sampled = p.custom(model, given, [given[0], 1], latent, sigmas=sigmas, cfg=4.0)
    parts = p.add("LTXVSeparateAVLatent", av_latent=p.add("RayOffloadModel", ray_actors=model, latent=sampled))
    images = p.decoded(model, parts, "LTX2_video_vae_bf16.safetensors")
    p.video(images, float(rate), audio=p.add("LTXVAudioVAEDecode", samples=[parts[0], 1], audio_vae=sound))


def krea2_turbo(p: Prompt) -> None:
    """Krea 2 Turbo on two GPUs: eight steps, no negative prompt.

    - `models/diffusion_models/krea2_turbo_fp8_scaled.safetensors`
    - `models/text_encoders/qwen3vl_4b_fp8_scaled.safetensors`
    - `models/vae/qwen_image_vae.safetensors`

    Needs ComfyUI 0.33.0 or newer.
    """
    model = p.model(p.pool(), "krea2_turbo_fp8_scaled.safetensors")
    clip = p.add("CLIPLoader", clip_name="qwen3vl_4b_fp8_scaled.safetensors", type="krea2", device="default")
    positive = p.add("CLIPTextEncode", "Prompt", text=SCENE, clip=clip)
    negative = p.add("ConditioningZeroOut", conditioning=positive)
    latent = p.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    sampled = p.sampled(model, positive, negative, latent, steps=8)
    p.picture(p.decoded(model, sampled, "qwen_image_vae.safetensors"))


def hunyuan_video15(p: Prompt) -> None:
    """HunyuanVideo 1.5, text to video, on two GPUs.

    - `models/diffusion_models/hunyuanvideo1.5_480p_t2v_fp16.safetensors`
    - `models/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors` and `byt5_small_glyphxl_fp16.safetensors`
    - `models/vae/hunyuanvideo15_vae_fp16.safetensors`
    """
    model = p.model(p.pool(), "hunyuanvideo1.5_480p_t2v_fp16.safetensors")
    model = p.add("RayModelSamplingSD3", ray_actors=model, shift=7.0)
    clip = p.add(
        "DualCLIPLoader",
        clip_name1="qwen_2.5_vl_7b_fp8_scaled.safetensors",
        clip_name2="byt5_small_glyphxl_fp16.safetensors",
        type="hunyuan_video_15",
        device="default",
    )
    positive, negative = p.texts(clip)
    latent = p.add("EmptyHunyuanVideo15Latent", width=848, height=480, length=49, batch_size=1)
    sigmas = p.add("RayBasicScheduler", ray_actors=model, scheduler="simple", steps=20, denoise=1.0)
    sampled = p.custom(model, positive, negative, latent, sigmas=sigmas, cfg=6.0)
    p.video(p.decoded(model, sampled, "hunyuanvideo15_vae_fp16.safetensors"), 24.0)


def sdxl_cfg(p: Prompt) -> None:
    """SDXL on two GPUs: one computes the prompt, the other the negative one, and they send each other nothing.

    - `models/checkpoints/sd_xl_base_1.0.safetensors`
    """
    file = "sd_xl_base_1.0.safetensors"
    model = p.model(p.pool(ulysses=1, cfg=2), file)
    checkpoint = p.add("CheckpointLoaderSimple", ckpt_name=file)
    positive, negative = p.texts([checkpoint[0], 1])
    latent = p.add("EmptyLatentImage", width=1024, height=1024, batch_size=1)
    sampled = p.sampled(model, positive, negative, latent, cfg=7.0, scheduler="normal")
    p.picture(p.add("VAEDecode", samples=sampled, vae=[checkpoint[0], 2]))


def data_parallel_seeds(p: Prompt) -> None:
    """Flux.1 dev: a picture of another seed on each of two GPUs, at the same time.

    - `models/diffusion_models/flux1-dev.safetensors`
    - `models/text_encoders/clip_l.safetensors` and `t5xxl_fp8_e4m3fn_scaled.safetensors`
    - `models/vae/ae.safetensors`

    All three degrees are 0: each worker is a replica by itself. jobs says how many pictures there are.
    """
    model = p.model(p.pool(ulysses=0, cfg=0), "flux1-dev.safetensors")
    positive, negative = _flux(p)
    seeds: dict[str, Any] = {f"noise_seed_{number}": number + 1 for number in range(8)}
    latents = p.add(
        "DPKSamplerAdvanced",
        add_noise="enable",
        steps=20,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        ray_actors=model,
        noise_list=p.add("DPNoiseList", **seeds),
        positive=positive,
        negative=negative,
        latent_image=p.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        start_at_step=0,
        end_at_step=10000,
        return_with_leftover_noise="disable",
        jobs=0,
    )
    p.picture(p.add("VAEDecode", samples=latents, vae=p.add("VAELoader", vae_name="ae.safetensors")))


def gguf(p: Prompt) -> None:
    """Flux.1 dev from a GGUF file, on two GPUs: weights stay quantised on the workers. No other pack is needed.

    - `models/diffusion_models/flux1-dev-Q4_K_S.gguf`
    - `models/text_encoders/clip_l.safetensors` and `t5xxl_fp8_e4m3fn_scaled.safetensors`
    - `models/vae/ae.safetensors`
    """
    model = p.add(
        "RayGGUFLoader",
        unet_name="flux1-dev-Q4_K_S.gguf",
        dequant_dtype="default",
        patch_dtype="default",
        ray_actors_init=p.pool(),
    )
    positive, negative = _flux(p)
    latent = p.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    p.picture(p.decoded(model, p.sampled(model, positive, negative, latent), "ae.safetensors"))


def vae_decode(p: Prompt) -> None:
    """The VAE on all workers: a picture is encoded and decoded again in strips of rows, without a seam.

    - `models/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors`, by which the pool is named
    - `models/vae/wan_2.1_vae.safetensors`
    - a picture `input/example.png`
    """
    model = p.model(p.pool(), "wan2.1_t2v_1.3B_fp16.safetensors")
    file = "wan_2.1_vae.safetensors"
    latent = p.add(
        "RayVAEEncodeDistributed",
        ray_actors=model,
        pixels=p.add("LoadImage", image="example.png"),
        vae_name=file,
        vae_dtype="auto",
        release_vae=False,
    )
    p.picture(p.decoded(model, latent, file, mode="seamless"))


EXAMPLES: Mapping[str, Callable[[Prompt], None]] = {
    example.__name__: example
    for example in (
        demo,
        demo_lora,
        demo_gguf,
        wan21_t2v,
        wan22_i2v,
        flux1_dev,
        flux2_dev,
        qwen_image_lora,
        z_image_turbo,
        ltx2_chunked,
        *OF_H3,
        krea2_turbo,
        hunyuan_video15,
        *OF_ALL_GPUS,
        sdxl_cfg,
        data_parallel_seeds,
        gguf,
        vae_decode,
    )
}

NEWER: Mapping[str, tuple[int, int]] = {
    "ltx2_chunked": (0, 8),
    "krea2_turbo": (0, 33),
    **{example.__name__: (0, 33) for example in OF_H3},
    "all_gpus_h3": (0, 33),
    "all_gpus_ltx2": (0, 8),
}
"""Examples that the oldest ComfyUI cannot run: the first version that does, which their notes name."""


def built(name: str) -> dict[str, dict[str, Any]]:
    """An example as an API prompt."""
    prompt = Prompt()
    EXAMPLES[name](prompt)
    return prompt.nodes
