"""RayInitializer: which pool. Starts it, or finds the one that runs already."""

from __future__ import annotations

import reprlib
from typing import Any

from ..raylight.config import PREFETCHES, ParallelConfig, PoolConfig
from ..raylight.errors import ConfigError
from ..raylight.sequence.kernels import NAMES
from ..workers.driver import remote
from .numbers import check

OLD_RENDEZVOUS = "127.0.0.1:29500"
"""Default of the earlier pack's widget, saved in every file. A fixed port would make two ComfyUIs collide,
so it means what an empty value means: loopback, any free port."""

CLUSTER: dict[str, Any] = {
    "ray_cluster_address": (
        "STRING",
        {"default": "local", "tooltip": "'local' starts Ray on this machine. Or the address of a running Ray cluster."},
    ),
    "ray_cluster_namespace": (
        "STRING",
        {"default": "default", "tooltip": "Ray namespace, used when a running cluster is joined."},
    ),
}
OBJECT_STORE: dict[str, Any] = {
    "ray_object_store_gb": (
        "FLOAT",
        {
            "default": 0.0,
            "tooltip": "Size of Ray's object store in GB; 0 for a small one. Latents do not go through it.",
        },
    ),
}
ADDRESSES: dict[str, Any] = {
    "ray_dashboard_address": (
        "STRING",
        {"default": "None", "tooltip": "host:port of Ray's dashboard, or None to leave it off."},
    ),
    "torch_dist_address": (
        "STRING",
        {
            "default": OLD_RENDEZVOUS,
            "tooltip": "host:port where workers on several machines meet; those on one machine meet in a file. The "
            "default means any free port, as a port does that is taken.",
        },
    ),
}
DEGREES: dict[str, Any] = {
    "GPU": (
        "INT",
        {"default": 2, "tooltip": "Number of workers: one per GPU. Without a GPU it counts CPU workers."},
    ),
    "ulysses_degree": (
        "INT",
        {
            "default": 2,
            "tooltip": "Workers that share one picture by splitting its tokens and attention heads. "
            "0 here and in the other two degrees: data parallel, each worker a model of its own.",
        },
    ),
    "ring_degree": (
        "INT",
        {"default": 1, "tooltip": "Ring attention degree: for slow links between hosts, or more workers than heads."},
    ),
    "cfg_degree": (
        "INT",
        {"default": 1, "tooltip": "Groups that compute positive and negative prompt side by side; 1 at cfg 1.0."},
    ),
    "sync_ulysses": (
        "BOOLEAN",
        {"default": False, "tooltip": "Wait for the device after each exchange. Same result; for debugging links."},
    ),
    "FSDP": (
        "BOOLEAN",
        {
            "default": False,
            "tooltip": "Split the weights: each worker keeps a part of every block, which is gathered when it "
            "computes. For models that do not fit on one GPU. Same result.",
        },
    ),
    "FSDP_CPU_OFFLOAD": (
        "BOOLEAN",
        {
            "default": False,
            "tooltip": "Stream the weights from host memory, block by block, each worker a part: for models that do "
            "not fit with FSDP either. On, it takes FSDP's place. Same result.",
        },
    ),
    "XFuser_attention": (
        list(NAMES),
        {
            "default": "TORCH",
            "tooltip": "Attention kernel at the parallel attention sites. TORCH is the one ComfyUI itself uses; "
            "others need their package installed.",
        },
    ),
}
OPTIONAL: dict[str, Any] = {
    "gpu_indices": (
        "STRING",
        {"default": "", "tooltip": "Physical GPUs to use, comma separated (for example 0,2). Empty: the first ones."},
    ),
    "skip_comm_test": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": "Off: test every link once after the start, log its bandwidth, and predict by it whether "
            "sharing pays.",
        },
    ),
    "pack_qkv": (
        "BOOLEAN",
        {"default": False, "tooltip": "Kept for older workflows: query, key and value always travel together."},
    ),
    "use_mmap": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": "Map model files: all workers share one copy in host memory. Off: each worker reads a copy of "
            "its own, one after another, for network drives that map badly.",
        },
    ),
    "mmap_cache_size": (
        "INT",
        {
            "default": 2,
            "min": 1,
            "max": 10,
            "tooltip": "Models that stay mapped in the workers. More stay only while a workflow uses them.",
        },
    ),
    "use_fastsafe": (
        "BOOLEAN",
        {"default": False, "tooltip": "Kept for older workflows: it read files into memory, as use_mmap off does."},
    ),
    "FSDP_prefetch": (
        list(PREFETCHES),
        {
            "default": "auto",
            "tooltip": "With FSDP: gather the next block's weights while one computes, for one more block of memory. "
            "auto: on GPUs, and for small blocks on a CPU.",
        },
    ),
}


class RayInitializer:
    """Starts the workers, or returns the running ones where nothing changed."""

    CATEGORY = "Raylight"
    DESCRIPTION = "Starts one worker per GPU. Connect it to Load Diffusion Model (Ray)."
    SEARCH_ALIASES: tuple[str, ...] = ("multi gpu", "parallel", "usp", "ulysses", "start workers")
    FUNCTION = "start"
    RETURN_TYPES = ("RAY_ACTORS_INIT",)
    RETURN_NAMES = ("ray_actors_init",)
    OUTPUT_TOOLTIPS = ("The pool of workers, for Ray loaders.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**CLUSTER, **DEGREES, **OBJECT_STORE}, "optional": dict(OPTIONAL)}

    def start(self, **values: Any) -> tuple[PoolConfig]:
        config = pool_config(**values)
        remote.start_pool(config)
        return (config,)


class RayInitializerAdvanced(RayInitializer):
    """The same with addresses."""

    DESCRIPTION = "Starts one worker per GPU, with the addresses of dashboard and rendezvous as inputs."
    SEARCH_ALIASES = ("multi gpu", "parallel", "cluster")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**CLUSTER, **OBJECT_STORE, **ADDRESSES, **DEGREES}, "optional": dict(OPTIONAL)}


def pool_config(
    *,
    ray_cluster_address: str,
    ray_cluster_namespace: str,
    GPU: int,
    ulysses_degree: int,
    ring_degree: int,
    cfg_degree: int,
    sync_ulysses: bool,
    FSDP: bool,
    FSDP_CPU_OFFLOAD: bool,
    XFuser_attention: str,
    ray_object_store_gb: float = 0.0,
    ray_dashboard_address: str = "None",
    torch_dist_address: str = OLD_RENDEZVOUS,
    gpu_indices: str = "",
    skip_comm_test: bool = True,
    pack_qkv: bool = False,
    use_mmap: bool = True,
    mmap_cache_size: int = 2,
    use_fastsafe: bool = False,
    FSDP_prefetch: str = "auto",
) -> PoolConfig:
    """Widget values as a checked PoolConfig.

    Raises:
        ConfigError: values that do not fit together; the message says what to change.
    """
    check(OPTIONAL, {"mmap_cache_size": mmap_cache_size})
    residency = "streamed" if FSDP_CPU_OFFLOAD else "sharded" if FSDP else "resident"
    return PoolConfig(
        parallel=ParallelConfig(
            world=GPU,
            ulysses=ulysses_degree,
            ring=ring_degree,
            cfg=cfg_degree,
            sync_ulysses=sync_ulysses,
            attention=XFuser_attention,
            residency=residency,
            prefetch="auto" if residency == "resident" else FSDP_prefetch,
        ),
        address=ray_cluster_address.strip() or "local",
        namespace=ray_cluster_namespace.strip() or "default",
        devices=_indices(gpu_indices),
        object_store_gb=ray_object_store_gb,
        dashboard=_address(ray_dashboard_address, "ray_dashboard_address"),
        rendezvous=""
        if torch_dist_address.strip() == OLD_RENDEZVOUS
        else _address(torch_dist_address, "torch_dist_address"),
        check_links=not skip_comm_test,
        reader="map" if use_mmap else "private",
        models_kept=mmap_cache_size,
    )


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(";", ",").split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            "gpu_indices is not a list of numbers", reprlib.repr(text), "Write for example 0,1"
        ) from error


def _address(text: str, name: str) -> str:
    text = text.strip()
    if text in ("", "None"):
        return ""
    _, _, port = text.rpartition(":")
    if not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{name} is not host:port", reprlib.repr(text), "Write for example 127.0.0.1:8265, or None")
    return text
