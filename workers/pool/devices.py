"""Which accelerators this host has, and which of them each worker gets."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path

from ...raylight.config import PoolConfig
from ...raylight.errors import ConfigError

VARIABLES = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
"""Which variable hides accelerators of a torch device type. ROCm builds of torch obey CUDA's."""
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""Has one folder per card that NVIDIA's driver knows, hidden or not."""


def chosen(config: PoolConfig, device_type: str) -> list[str]:
    """The device of each rank, as its variable names it.

    gpu_indices count the host's devices, whichever of them ComfyUI may see; without it, workers get those that
    ComfyUI sees, in their order.

    Raises:
        ConfigError: there is no such device, or there are fewer than workers.
    """
    if device_type not in VARIABLES:
        raise ConfigError(
            f"Raylight cannot pin workers to {device_type} devices",
            f"known are {', '.join(VARIABLES)} and cpu",
            "Start ComfyUI with --cpu to try the pool on the CPU",
        )
    known = present(device_type)
    unknown = [index for index in config.devices if known and str(index) not in known]
    if unknown:
        raise ConfigError(
            "gpu_indices names devices that this machine does not have",
            f"{reprlib.repr(unknown)[1:-1]}; there are {', '.join(known)}",
            "Name others, or leave gpu_indices empty",
        )
    found = [str(index) for index in config.devices] or visible(device_type)
    world = config.parallel.world
    if len(found) < world:
        raise ConfigError(
            "There are fewer accelerators than workers",
            f"GPU is {world}, ComfyUI sees {len(found)}: {', '.join(found) or 'none'}",
            "Lower GPU, or name the devices in gpu_indices",
        )
    return found[:world]


def visible(device_type: str) -> list[str]:
    """The devices this process may use, in their order."""
    listed = os.environ.get(VARIABLES[device_type])
    if listed is not None:
        return [entry.strip() for entry in listed.split(",") if entry.strip()]
    return [str(index) for index in range(_count(device_type))]


def present(device_type: str) -> list[str]:
    """All devices of the host, also those that are hidden from this process; empty where nobody knows."""
    if device_type == "cuda" and NVIDIA.is_dir():
        return [str(index) for index, _ in enumerate(NVIDIA.iterdir())]
    return [] if VARIABLES[device_type] in os.environ else visible(device_type)


def topology(config: PoolConfig, device_type: str) -> str:
    """How the devices of a pool on this host reach each other, for the log."""
    if device_type == "cpu":
        return "workers share the host's memory"
    seen, names = visible(device_type), chosen(config, device_type)
    if device_type != "cuda" or not set(names) <= set(seen):
        return f"devices {', '.join(names)}"
    import torch

    pairs = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    apart = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(seen.index(a), seen.index(b))]
    if not apart:
        return f"devices {', '.join(names)} reach each other's memory directly"
    return f"no direct way between devices {', '.join(apart)}: what they send goes through the host's memory"


def _count(device_type: str) -> int:
    import torch

    return int(torch.get_device_module(device_type).device_count())
