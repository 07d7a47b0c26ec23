"""The nodes as ComfyUI publishes them: ids, sockets, widget order and defaults that saved files depend on."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_raylight.tests.host.client import ComfyClient

SEED_MAX = 0xFFFFFFFFFFFFFFFF
CLUSTER = {"ray_cluster_address": "local", "ray_cluster_namespace": "default"}
DEGREES = {
    "GPU": 2,
    "ulysses_degree": 2,
    "ring_degree": 1,
    "cfg_degree": 1,
    "sync_ulysses": False,
    "FSDP": False,
    "FSDP_CPU_OFFLOAD": False,
    "XFuser_attention": "TORCH",
}
STORE = {"ray_object_store_gb": 0.0}
ADDRESSES = {"ray_dashboard_address": "None", "torch_dist_address": "127.0.0.1:29500"}
OPTIONAL = {
    "gpu_indices": "",
    "skip_comm_test": True,
    "pack_qkv": False,
    "use_mmap": True,
    "mmap_cache_size": 2,
    "use_fastsafe": False,
}
REQUIRED: dict[str, dict[str, Any]] = {
    "DPConditioningList": {"positive_0": None, "negative_0": None},
    "DPKSamplerAdvanced": {
        "add_noise": None,
        "steps": 20,
        "cfg": 8.0,
        "sampler_name": None,
        "scheduler": None,
        "ray_actors": None,
        "noise_list": None,
        "positive": None,
        "negative": None,
        "latent_image": None,
        "start_at_step": 0,
        "end_at_step": 10000,
        "return_with_leftover_noise": None,
    },
    "DPNoiseList": {f"noise_seed_{number}": 0 for number in range(8)},
    "DPSamplerCustom": {
        "ray_actors": None,
        "add_noise": True,
        "noise_list": None,
        "cfg": 8.0,
        "positive": None,
        "negative": None,
        "sampler": None,
        "sigmas": None,
        "latent_image": None,
    },
    "RayInitializer": {**CLUSTER, **DEGREES, **STORE},
    "RayInitializerAdvanced": {**CLUSTER, **STORE, **ADDRESSES, **DEGREES},
    "RayGGUFLoader": {"unet_name": None, "dequant_dtype": None, "patch_dtype": None, "ray_actors_init": None},
    "RayKill": {"ray_actors": None, "kill_mode": None},
    "RayLTXFFNChunker": {"ray_actors": None, "ffn_chunks": 8},
    "RayLoraLoader": {"lora_name": None, "strength_model": 1.0},
    "RayLoraLoaderModelOnly": {"ray_actors": None, "lora_name": None, "strength_model": 1.0},
    "RayOffloadModel": {"ray_actors": None},
    "RayUNETLoader": {"unet_name": None, "weight_dtype": None, "ray_actors_init": None},
    "RayVAEDecodeDistributed": {
        "ray_actors": None,
        "samples": None,
        "vae_name": None,
        "vae_dtype": "auto",
        "tile_size": 512,
        "overlap": 64,
        "temporal_size": 64,
        "temporal_overlap": 8,
        "release_vae": True,
    },
    "RayVAEEncodeDistributed": {
        "ray_actors": None,
        "pixels": None,
        "vae_name": None,
        "vae_dtype": "auto",
        "release_vae": True,
    },
    "XFuserKSamplerAdvanced": {
        "add_noise": None,
        "noise_seed": 0,
        "steps": 20,
        "cfg": 8.0,
        "sampler_name": None,
        "scheduler": None,
        "ray_actors": None,
        "positive": None,
        "negative": None,
        "latent_image": None,
        "start_at_step": 0,
        "end_at_step": 10000,
        "return_with_leftover_noise": None,
    },
}
OUTPUTS = {
    "DPConditioningList": (["CONDITIONING", "CONDITIONING"], ["positive", "negative"]),
    "DPKSamplerAdvanced": (["LATENT"], ["LATENT"]),
    "DPNoiseList": (["NOISE"], ["NOISE"]),
    "DPSamplerCustom": (["LATENT"], ["output"]),
    "RayInitializer": (["RAY_ACTORS_INIT"], ["ray_actors_init"]),
    "RayInitializerAdvanced": (["RAY_ACTORS_INIT"], ["ray_actors_init"]),
    "RayGGUFLoader": (["RAY_ACTORS", "MODEL"], ["ray_actors", "model"]),
    "RayKill": ([], []),
    "RayLTXFFNChunker": (["RAY_ACTORS"], ["ray_actors"]),
    "RayLoraLoader": (["RAY_LORA"], ["ray_lora"]),
    "RayLoraLoaderModelOnly": (["RAY_ACTORS", "RAY_LORA"], ["ray_actors", "ray_lora"]),
    "RayOffloadModel": (["LATENT"], ["latent"]),
    "RayUNETLoader": (["RAY_ACTORS", "MODEL"], ["ray_actors", "model"]),
    "RayVAEDecodeDistributed": (["IMAGE"], ["IMAGE"]),
    "RayVAEEncodeDistributed": (["LATENT"], ["LATENT"]),
    "XFuserKSamplerAdvanced": (["LATENT"], ["LATENT"]),
}
DISPLAY = {
    "DPConditioningList": "Data Parallel Conditioning List",
    "DPKSamplerAdvanced": "Data Parallel KSampler (Advanced)",
    "DPNoiseList": "Data Parallel Noise List",
    "DPSamplerCustom": "Data Parallel SamplerCustom",
    "RayGGUFLoader": "Load Diffusion GGUF Model (Ray)",
    "RayLoraLoader": "Ray LoRA Loader (chain)",
    "RayLoraLoaderModelOnly": "Ray LoRA Loader",
    "RayOffloadModel": "Offload Model (Ray)",
    "RayInitializer": "Ray Init Actor",
    "RayInitializerAdvanced": "Ray Init Actor (Advanced)",
    "RayKill": "Kill Ray Workers",
    "RayLTXFFNChunker": "Ray LTX FFN Chunker (VRAM Saver)",
    "RayUNETLoader": "Load Diffusion Model (Ray)",
    "RayVAEDecodeDistributed": "Distributed VAE (Ray)",
    "RayVAEEncodeDistributed": "Distributed VAE Encode (Ray)",
    "XFuserKSamplerAdvanced": "XFuser KSampler (Advanced)",
}
CATEGORIES = {
    "DPSamplerCustom": "Raylight/extra/custom_sampling/samplers",
    "RayLTXFFNChunker": "Raylight/extra",
}


def options(entry: list[Any]) -> dict[str, Any]:
    return entry[1] if len(entry) > 1 else {}


@pytest.mark.parametrize("node", REQUIRED)
def test_node(client: ComfyClient, node: str) -> None:
    info = client.object_info(node)[node]
    assert info["display_name"] == DISPLAY[node] and info["category"] == CATEGORIES.get(node, "Raylight")
    assert (info["output"], info["output_name"]) == OUTPUTS[node]
    assert info["output_is_list"] == [node.startswith("DP")] * len(info["output"])
    required = info["input"]["required"]
    assert list(required) == info["input_order"]["required"] == list(REQUIRED[node])
    for name, default in REQUIRED[node].items():
        if default is not None:
            assert options(required[name])["default"] == default
    own: dict[str, dict[str, Any]] = {
        "DPConditioningList": {f"{kind}_{n}": None for n in range(1, 8) for kind in ("positive", "negative")},
        "DPKSamplerAdvanced": {"jobs": 0},
        "DPSamplerCustom": {"jobs": 0},
        "XFuserKSamplerAdvanced": {"sigmas": None},
        "RayUNETLoader": {"lora": None},
        "RayGGUFLoader": {"lora": None},
        "RayLoraLoaderModelOnly": {"prev_ray_lora": None},
        "RayLoraLoader": {"prev_ray_lora": None},
        "RayOffloadModel": {"latent": None},
        "RayVAEDecodeDistributed": {"mode": "auto"},
    }
    optional = OPTIONAL if node.startswith("RayInitializer") else own.get(node, {})
    assert list(info["input"].get("optional", {})) == list(optional)
    for name, default in optional.items():
        if default is not None:
            assert options(info["input"]["optional"][name])["default"] == default
    for kind in ("required", "optional"):
        for name, entry in info["input"].get(kind, {}).items():
            assert options(entry).get("tooltip"), f"{name} has no tooltip"


def test_choices(client: ComfyClient) -> None:
    loader = client.object_info("RayUNETLoader")["RayUNETLoader"]["input"]["required"]
    assert loader["weight_dtype"][0] == ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", "bf16", "fp16"]
    assert loader["ray_actors_init"][0] == "RAY_ACTORS_INIT"
    sampler = client.object_info("XFuserKSamplerAdvanced")["XFuserKSamplerAdvanced"]["input"]["required"]
    assert sampler["add_noise"][0] == ["enable", "disable"]
    assert sampler["return_with_leftover_noise"][0] == ["disable", "enable"]
    seed = options(sampler["noise_seed"])
    assert seed["max"] == SEED_MAX and seed["control_after_generate"]
    assert sampler["ray_actors"][0] == "RAY_ACTORS"
    names = client.object_info("RayInitializer")["RayInitializer"]["input"]["required"]["XFuser_attention"][0]
    old = {"TORCH", "FLASH_ATTN", "FLASH_ATTN_3", "SAGE_AUTO_DETECT", "SAGE_FP16_TRITON", "SAGE_FP16_CUDA"}
    assert old | {"SAGE_FP8_CUDA", "SAGE_FP8_SM90", "AITER_ROCM", "FA", "TORCH_FLASH"} <= set(names)
