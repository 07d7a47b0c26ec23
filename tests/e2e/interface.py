"""The interface that users' files depend on, node by node: ids, sockets, widget order, defaults, ranges, names.

A node that changes on purpose changes here as well: new widgets come last and are optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEED_MAX = 0xFFFFFFFFFFFFFFFF
SIDE_MAX = 16384
"""Of a picture, in ComfyUI."""
OPTIONS = ("default", "min", "max", "step", "round", "control_after_generate")
"""What the table holds of an input's options; how a widget is shown is not in it."""


@dataclass(frozen=True)
class Input:
    """A socket or widget.

    Attributes:
        kind: its type; "" for a list of values.
        values: some that a list must have, in this order among others.
        options: those of `OPTIONS`.
    """

    kind: str = ""
    values: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


Inputs = Mapping[str, Input]


@dataclass(frozen=True)
class Node:
    """What ComfyUI publishes of a node.

    Attributes:
        display: name on the canvas; "" where the id is shown.
        outputs: "TYPE:name" of each.
        lists: which outputs are lists, where any is.
        needs: a node of ComfyUI without which this one does not exist.
    """

    display: str
    category: str
    outputs: str
    required: Inputs = field(default_factory=dict)
    optional: Inputs = field(default_factory=dict)
    lists: tuple[bool, ...] = ()
    input_is_list: bool = False
    output_node: bool = False
    needs: str = ""


def sockets(**kinds: str) -> dict[str, Input]:
    """Inputs that are connected, by name."""
    return {name: Input(kind) for name, kind in kinds.items()}


def choice(*values: str, **options: Any) -> Input:
    return Input("", values, options)


def integer(default: int, low: int | None = None, high: int | None = None, **options: Any) -> Input:
    return Input("INT", options={"default": default, **_range(low, high), **options})


def number(default: float, low: float | None = None, high: float | None = None, **options: Any) -> Input:
    return Input("FLOAT", options={"default": default, **_range(low, high), **options})


def text(default: str) -> Input:
    return Input("STRING", options={"default": default})


def flag(default: bool | None = None) -> Input:
    return Input("BOOLEAN", options={} if default is None else {"default": default})


def _range(low: float | None, high: float | None) -> dict[str, float]:
    return {} if low is None or high is None else {"min": low, "max": high}


TOP = "Raylight"
EXTRA = "Raylight/extra"
SAMPLERS = "Raylight/extra/custom_sampling/samplers"
SCHEDULERS = "Raylight/extra/custom_sampling/schedulers"
GUIDERS = "Raylight/extra/custom_sampling/guiders"
ON_ACTORS = "RAY_ACTORS:ray_actors"

ACTORS = sockets(ray_actors="RAY_ACTORS")
INIT = sockets(ray_actors_init="RAY_ACTORS_INIT")
PROMPTS = sockets(positive="CONDITIONING", negative="CONDITIONING")
CUSTOM = sockets(sampler="SAMPLER", sigmas="SIGMAS", latent_image="LATENT")
SEED = integer(0, 0, SEED_MAX, control_after_generate=True)
CFG = number(8.0, 0.0, 100.0, step=0.1, round=0.01)
STEPS = integer(20, 1, 10000)
ENABLE, DISABLE = choice("enable", "disable"), choice("disable", "enable")
SHIFT = {"step": 0.01}
SIGMA = {"step": 0.001, "round": False}
BETA = {"step": 0.01, "round": False}

CLUSTER = {"ray_cluster_address": text("local"), "ray_cluster_namespace": text("default")}
STORE = {"ray_object_store_gb": number(0.0)}
ADDRESSES = {"ray_dashboard_address": text("None"), "torch_dist_address": text("127.0.0.1:29500")}
KERNELS = ("TORCH", "FA", "TORCH_FLASH", "SAGE_FP16_TRITON", "SAGE_FP8_SM90", "FLASH_ATTN", "FLASH_ATTN_3")
MORE_KERNELS = ("SAGE_AUTO_DETECT", "SAGE_FP16_CUDA", "SAGE_FP8_CUDA", "AITER_ROCM")
DEGREES = {
    "GPU": integer(2),
    "ulysses_degree": integer(2),
    "ring_degree": integer(1),
    "cfg_degree": integer(1),
    "sync_ulysses": flag(False),
    "FSDP": flag(False),
    "FSDP_CPU_OFFLOAD": flag(False),
    "XFuser_attention": choice(*KERNELS, *MORE_KERNELS, default="TORCH"),
}
OPTIONAL = {
    "gpu_indices": text(""),
    "skip_comm_test": flag(True),
    "pack_qkv": flag(False),
    "use_mmap": flag(True),
    "mmap_cache_size": integer(2, 1, 10),
    "use_fastsafe": flag(False),
    "FSDP_prefetch": choice("auto", "on", "off", default="auto"),
}
VAE_FILE = {"vae_name": choice(), "vae_dtype": choice("auto", "bf16", "fp16", "fp32", default="auto")}
FLOATS = ("default", "target", "float32", "float16", "bfloat16")

KSAMPLER = {
    "steps": STEPS,
    "cfg": CFG,
    "sampler_name": choice("euler", "dpmpp_2m"),
    "scheduler": choice("simple", "normal"),
    **ACTORS,
}
KSAMPLER_END = {
    **PROMPTS,
    **sockets(latent_image="LATENT"),
    "start_at_step": integer(0, 0, 10000),
    "end_at_step": integer(10000, 0, 10000),
    "return_with_leftover_noise": DISABLE,
}
SEEDS = sockets(noise_list="NOISE")
JOBS = {"jobs": integer(0, 0, 4096)}
PAIRS = {f"{kind}_{n}": Input("CONDITIONING") for n in range(8) for kind in ("positive", "negative")}

NODES: Mapping[str, Node] = {
    "RayInitializer": Node(
        "Ray Init Actor", TOP, "RAY_ACTORS_INIT:ray_actors_init", {**CLUSTER, **DEGREES, **STORE}, OPTIONAL
    ),
    "RayInitializerAdvanced": Node(
        "Ray Init Actor (Advanced)",
        TOP,
        "RAY_ACTORS_INIT:ray_actors_init",
        {**CLUSTER, **STORE, **ADDRESSES, **DEGREES},
        OPTIONAL,
    ),
    "RayUNETLoader": Node(
        "Load Diffusion Model (Ray)",
        TOP,
        "RAY_ACTORS:ray_actors MODEL:model",
        {
            "unet_name": choice(),
            "weight_dtype": choice("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", "bf16", "fp16"),
            **INIT,
        },
        sockets(lora="RAY_LORA"),
    ),
    "RayGGUFLoader": Node(
        "Load Diffusion GGUF Model (Ray)",
        TOP,
        "RAY_ACTORS:ray_actors MODEL:model",
        {"unet_name": choice(), "dequant_dtype": choice(*FLOATS), "patch_dtype": choice(*FLOATS), **INIT},
        sockets(lora="RAY_LORA"),
    ),
    "RayLoraLoaderModelOnly": Node(
        "Ray LoRA Loader",
        TOP,
        "RAY_ACTORS:ray_actors RAY_LORA:ray_lora",
        {**ACTORS, "lora_name": choice(), "strength_model": number(1.0, -20.0, 20.0, step=0.01)},
        sockets(prev_ray_lora="RAY_LORA"),
    ),
    "RayLoraLoader": Node(
        "Ray LoRA Loader (chain)",
        TOP,
        "RAY_LORA:ray_lora",
        {"lora_name": choice(), "strength_model": number(1.0, -100.0, 100.0, step=0.01)},
        sockets(prev_ray_lora="RAY_LORA"),
    ),
    "RayModel": Node(
        "Load Model (all GPUs)",
        TOP,
        "MODEL:model CLIP:clip VAE:vae RAY_ACTORS:ray_actors",
        {"model_name": choice()},
        {"gpus": text("all"), "goal": choice("auto", "speed", "memory", default="auto")},
    ),
    "RayOffloadModel": Node(
        "Offload Model (Ray)", TOP, "LATENT:latent", ACTORS, sockets(latent="LATENT"), output_node=True
    ),
    "RayReport": Node(
        "Ray Report", TOP, "STRING:report IMAGE:chart", ACTORS, sockets(latent="LATENT"), output_node=True
    ),
    "RayKill": Node(
        "Kill Ray Workers",
        TOP,
        "",
        {
            **sockets(ray_actors="RAY_ACTORS,RAY_ACTORS_INIT"),
            "kill_mode": choice("Kill Workers Only", "Kill Entire Cluster"),
        },
        output_node=True,
    ),
    "RayVAEDecodeDistributed": Node(
        "Distributed VAE (Ray)",
        TOP,
        "IMAGE:IMAGE",
        {
            **ACTORS,
            **sockets(samples="LATENT"),
            **VAE_FILE,
            "tile_size": integer(512, 64, 4096, step=32),
            "overlap": integer(64, 0, 4096, step=32),
            "temporal_size": integer(64, 8, 4096, step=4),
            "temporal_overlap": integer(8, 4, 4096, step=4),
            "release_vae": flag(True),
        },
        {"mode": choice("auto", "seamless", "tiles", default="auto")},
    ),
    "RayVAEEncodeDistributed": Node(
        "Distributed VAE Encode (Ray)",
        TOP,
        "LATENT:LATENT",
        {**ACTORS, **sockets(pixels="IMAGE"), **VAE_FILE, "release_vae": flag(True)},
    ),
    "RayCLIPLoader": Node(
        "Load CLIP (Ray)",
        TOP,
        "CLIP:clip",
        {**ACTORS, "clip_name1": choice(), "type": choice(default="stable_diffusion")},
        {f"clip_name{number}": choice(default="none") for number in (2, 3, 4)},
    ),
    "RayControlNetLoader": Node(
        "Load ControlNet (Ray)",
        TOP,
        "RAY_CONTROL_NET:ray_control_net CONTROL_NET:control_net",
        {**ACTORS, "control_net_name": choice()},
    ),
    "RayControlNetApply": Node(
        "Apply ControlNet (Ray)",
        TOP,
        "CONDITIONING:positive CONDITIONING:negative",
        {
            **PROMPTS,
            **sockets(ray_control_net="RAY_CONTROL_NET,CONTROL_NET", image="IMAGE"),
            "strength": number(1.0, 0.0, 10.0, step=0.01),
            "start_percent": number(0.0, 0.0, 1.0, step=0.001),
            "end_percent": number(1.0, 0.0, 1.0, step=0.001),
        },
        sockets(ray_vae="RAY_VAE,VAE"),
    ),
    "RayVAELoader": Node("Load VAE (Ray)", TOP, "RAY_VAE:ray_vae VAE:vae", {**ACTORS, "vae_name": choice()}),
    "XFuserKSamplerAdvanced": Node(
        "XFuser KSampler (Advanced)",
        TOP,
        "LATENT:LATENT RAY_ACTORS:ray_actors",
        {
            "add_noise": ENABLE,
            "noise_seed": SEED,
            **KSAMPLER,
            **KSAMPLER_END,
        },
        sockets(sigmas="SIGMAS"),
    ),
    "DPKSamplerAdvanced": Node(
        "Data Parallel KSampler (Advanced)",
        TOP,
        "LATENT:LATENT",
        {"add_noise": ENABLE, **KSAMPLER, **SEEDS, **KSAMPLER_END},
        JOBS,
        lists=(True,),
        input_is_list=True,
    ),
    "DPSamplerCustom": Node(
        "Data Parallel SamplerCustom",
        SAMPLERS,
        "LATENT:output",
        {**ACTORS, "add_noise": flag(True), **SEEDS, "cfg": CFG, **PROMPTS, **CUSTOM},
        JOBS,
        lists=(True,),
        input_is_list=True,
    ),
    "DPNoiseList": Node(
        "Data Parallel Noise List", TOP, "NOISE:NOISE", {f"noise_seed_{n}": SEED for n in range(8)}, lists=(True,)
    ),
    "DPConditioningList": Node(
        "Data Parallel Conditioning List",
        TOP,
        "CONDITIONING:positive CONDITIONING:negative",
        {name: PAIRS[name] for name in ("positive_0", "negative_0")},
        {name: pair for name, pair in PAIRS.items() if not name.endswith("_0")},
        lists=(True, True),
    ),
    "UnifiedParallelSampler": Node(
        "Unified Parallel Sampler (Advanced)",
        TOP,
        "LATENT:latent RAY_ACTORS:ray_actors",
        {
            "add_noise": ENABLE,
            **KSAMPLER,
            **SEEDS,
            **KSAMPLER_END,
            "denoise": number(1.0, 0.0, 1.0, step=0.01),
        },
        JOBS,
        lists=(True, False),
        input_is_list=True,
    ),
    "XFuserSamplerCustom": Node(
        "XFuser SamplerCustom",
        SAMPLERS,
        "LATENT:output RAY_ACTORS:ray_actors",
        {**ACTORS, "add_noise": flag(True), "noise_seed": SEED, "cfg": CFG, **PROMPTS, **CUSTOM},
    ),
    "XFuserSamplerCustomAdvanced": Node(
        "XFuser SamplerCustom Advanced",
        SAMPLERS,
        "LATENT:output LATENT:denoised_output RAY_ACTORS:ray_actors",
        {"add_noise": flag(True), "noise_seed": SEED, **sockets(guider="RAY_GUIDER,GUIDER"), **CUSTOM},
    ),
    "RayBasicGuider": Node(
        "Basic Guider (Ray)",
        GUIDERS,
        "RAY_GUIDER:guider GUIDER:GUIDER",
        {**ACTORS, **sockets(conditioning="CONDITIONING")},
    ),
    "RayCFGGuider": Node(
        "CFG Guider (Ray)", GUIDERS, "RAY_GUIDER:guider GUIDER:GUIDER", {**ACTORS, **PROMPTS, "cfg": CFG}
    ),
    "RayDualCFGGuider": Node(
        "Dual CFG Guider (Ray)",
        GUIDERS,
        "RAY_GUIDER:guider GUIDER:GUIDER",
        {
            **ACTORS,
            **sockets(cond1="CONDITIONING", cond2="CONDITIONING", negative="CONDITIONING"),
            "cfg_conds": CFG,
            "cfg_cond2_negative": CFG,
            "style": choice("regular", "nested"),
        },
    ),
    "RayBasicScheduler": Node(
        "",
        SCHEDULERS,
        "SIGMAS:SIGMAS",
        {
            **ACTORS,
            "scheduler": choice("simple", "normal"),
            "steps": STEPS,
            "denoise": number(1.0, 0.0, 1.0, step=0.01),
        },
    ),
    "RayBetaSamplingScheduler": Node(
        "",
        SCHEDULERS,
        "SIGMAS:SIGMAS",
        {**ACTORS, "steps": STEPS, "alpha": number(0.6, 0.0, 50.0, **BETA), "beta": number(0.6, 0.0, 50.0, **BETA)},
    ),
    "RaySamplingPercentToSigma": Node(
        "",
        SCHEDULERS,
        "FLOAT:sigma_value",
        {**ACTORS, "sampling_percent": number(0.0, 0.0, 1.0, step=0.0001), "return_actual_sigma": flag(False)},
    ),
    "RaySamplerSASolver": Node(
        "",
        SAMPLERS,
        "SAMPLER:SAMPLER",
        {
            **ACTORS,
            "eta": number(1.0, 0.0, 10.0, **BETA),
            "sde_start_percent": number(0.2, 0.0, 1.0, step=0.001),
            "sde_end_percent": number(0.8, 0.0, 1.0, step=0.001),
            "s_noise": number(1.0, 0.0, 100.0, **BETA),
            "predictor_order": integer(3, 1, 6),
            "corrector_order": integer(4, 0, 6),
            "use_pece": flag(),
            "simple_order_2": flag(),
        },
    ),
    "RayAddNoise": Node(
        "",
        SAMPLERS,
        "LATENT:LATENT",
        {
            "noise_seed": SEED,
            "force_empty_noise": flag(),
            **ACTORS,
            **sockets(sigmas="SIGMAS", latent_image="LATENT"),
        },
    ),
    "RayModelSamplingDiscrete": Node(
        "",
        EXTRA,
        ON_ACTORS,
        {**ACTORS, "sampling": choice("eps", "v_prediction", "lcm", "x0", "img_to_img"), "zsnr": flag(False)},
    ),
    "RayModelSamplingContinuousEDM": Node(
        "",
        EXTRA,
        ON_ACTORS,
        {
            **ACTORS,
            "sampling": choice("v_prediction", "edm", "edm_playground_v2.5", "eps", "cosmos_rflow"),
            "sigma_max": number(120.0, 0.0, 1000.0, **SIGMA),
            "sigma_min": number(0.002, 0.0, 1000.0, **SIGMA),
        },
    ),
    "RayModelSamplingContinuousV": Node(
        "",
        EXTRA,
        ON_ACTORS,
        {
            **ACTORS,
            "sampling": choice("v_prediction"),
            "sigma_max": number(500.0, 0.0, 1000.0, **SIGMA),
            "sigma_min": number(0.03, 0.0, 1000.0, **SIGMA),
        },
    ),
    "RayModelSamplingStableCascade": Node("", EXTRA, ON_ACTORS, {**ACTORS, "shift": number(2.0, 0.0, 100.0, **SHIFT)}),
    "RayModelSamplingSD3": Node("", EXTRA, ON_ACTORS, {**ACTORS, "shift": number(3.0, 0.0, 100.0, **SHIFT)}),
    "RayModelSamplingAuraFlow": Node("", EXTRA, ON_ACTORS, {**ACTORS, "shift": number(1.73, 0.0, 100.0, **SHIFT)}),
    "RayModelSamplingFlux": Node(
        "",
        EXTRA,
        ON_ACTORS,
        {
            **ACTORS,
            "max_shift": number(1.15, 0.0, 100.0, **SHIFT),
            "base_shift": number(0.5, 0.0, 100.0, **SHIFT),
            "width": integer(1024, 16, SIDE_MAX, step=8),
            "height": integer(1024, 16, SIDE_MAX, step=8),
        },
    ),
    "RayModelSamplingLTXV": Node(
        "Model Sampling LTXV (Ray)",
        EXTRA,
        ON_ACTORS,
        {
            **ACTORS,
            "max_shift": number(2.05, 0.0, 100.0, **SHIFT),
            "base_shift": number(0.95, 0.0, 100.0, **SHIFT),
        },
        sockets(latent="LATENT"),
    ),
    "RayRescaleCFG": Node("", EXTRA, ON_ACTORS, {**ACTORS, "multiplier": number(0.7, 0.0, 1.0, step=0.01)}),
    "RayModelComputeDtype": Node("", EXTRA, ON_ACTORS, {**ACTORS, "dtype": choice("default", "fp32", "fp16", "bf16")}),
    "RayEasyCache": Node(
        "EasyCache (Ray)",
        EXTRA,
        ON_ACTORS,
        {
            **ACTORS,
            "reuse_threshold": number(0.2, 0.0, 3.0, step=0.01),
            "start_percent": number(0.15, 0.0, 1.0, step=0.01),
            "end_percent": number(0.95, 0.0, 1.0, step=0.01),
        },
        {"subsample_factor": integer(8, 1, 16), "verbose": flag(False), "distributed_sync": flag(True)},
    ),
    "RayLTXFFNChunker": Node(
        "Ray LTX FFN Chunker (VRAM Saver)", EXTRA, ON_ACTORS, {**ACTORS, "ffn_chunks": integer(8, 1, 64)}
    ),
    "RayTeaCache": Node(
        "TeaCache (Ray)",
        EXTRA,
        ON_ACTORS,
        {
            **ACTORS,
            "threshold": number(0.25, 0.0, 5.0, step=0.01),
            "warmup_percent": number(0.1, 0.0, 0.5, step=0.01),
            "retention_interval": integer(8, 1, 64),
            "start_percent": number(0.15, 0.0, 1.0, step=0.01),
            "end_percent": number(0.95, 0.0, 1.0, step=0.01),
        },
        {"subsample_factor": integer(8, 1, 16), "verbose": flag(False), "distributed_sync": flag(True)},
    ),
    "RayTorchCompileModel": Node(
        "Torch Compile Model (Ray)", EXTRA, ON_ACTORS, {**ACTORS, "backend": choice("inductor", "cudagraphs")}
    ),
    "RayLTXVReferenceAudio": Node(
        "LTXV Reference Audio (Ray)",
        EXTRA,
        "RAY_ACTORS:ray_actors CONDITIONING:positive CONDITIONING:negative",
        {
            **ACTORS,
            **PROMPTS,
            **sockets(reference_audio="AUDIO", audio_vae="VAE"),
            "identity_guidance_scale": number(3.0, 0.0, 100.0, step=0.01, round=0.01),
            "start_percent": number(0.0, 0.0, 1.0, step=0.001),
            "end_percent": number(1.0, 0.0, 1.0, step=0.001),
        },
        needs="LTXVReferenceAudio",
    ),
}
