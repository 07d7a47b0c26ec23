"""What a pool may ask for, by what there is: checked in constant time, before anything starts or ends for it."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import psutil

from ...raylight.config import PoolConfig
from ...raylight.errors import ConfigError
from ..wire.messages import HostEnvironment
from . import devices, processes, speeds

VARIABLE = "RAYLIGHT_MAX_CPU_WORKERS"
"""Environment variable: how many CPU workers a pool may have, in place of what follows from the cores."""
ALWAYS = 8
PER_CORE = 4
"""CPU workers that may share a core: they are for trying a pool out, and each has a gigabyte of its own."""
MANY = 4
"""CPU workers that are enough to see a pool at work, where nobody asks for more."""
WORKER_BYTES = 2 << 30
"""Host memory that a CPU worker is counted with: torch and ComfyUI's code, and what it computes."""
STORE_LEAST = 75 << 20
"""Bytes of the smallest object store that Ray starts."""
STORE_ON_DISK = 10**10
"""Bytes up to which Ray puts a store that does not fit into shared memory into its folder."""
SHARED_MEMORY = Path("/dev/shm")
CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check(config: PoolConfig, environment: HostEnvironment, *, local: bool) -> None:
    """Whether this machine has what the pool asks for.

    Args:
        local: whether the pool is to run on a Ray of our own; what a cluster has is known when it is joined.

    Raises:
        ConfigError: it has not.
    """
    if platform.system() == "Windows":
        raise ConfigError(
            "Workers do not run on Windows",
            "Ray is started with locks, signals and descriptors that Windows does not have",
            "Run ComfyUI on Linux, or in WSL2, where nobody has tried it yet (docs/systems.md)",
        )
    speeds.asked(config.parallel.world)
    if environment.device_type != "cpu":
        if local or config.devices:
            devices.chosen(config, environment.device_type)
    elif local:
        check_cpu_workers(config.parallel.world, processes.usable_cores())
    if local and config.object_store_gb:
        _check_store(config.object_store_gb)


def check_cpu_workers(world: int, cores: int) -> None:
    """Whether so many CPU workers may share so many cores.

    Raises:
        ConfigError: they may not.
    """
    most = max(ALWAYS, PER_CORE * cores)
    override = os.environ.get(VARIABLE, "")
    if override:
        if not override.isdecimal() or len(override) > 9:
            raise ConfigError(
                f"{VARIABLE} is not a number of workers", repr(override), "Set it to a number, or unset it"
            )
        most = int(override)
    if world > most:
        raise ConfigError(
            "There are more CPU workers than the cores can carry",
            f"GPU is {world}, and {cores} cores carry {most}",
            f"Lower GPU, or set the environment variable {VARIABLE} to what the pool may have",
        )


def cpu_workers(cores: int) -> int:
    """How many workers all of the cores are, for who names no number: one on each, as far as that makes sense."""
    override = os.environ.get(VARIABLE, "")
    most = int(override) if override.isdecimal() and len(override) <= 9 else MANY
    return max(1, min(cores, most, MANY))


def with_memory(workers: int) -> int:
    """How many of so many CPU workers there is memory for; one there always is."""
    return max(1, min(workers, int(psutil.virtual_memory().available) // WORKER_BYTES))


def _check_store(size: float) -> None:
    wanted = size * (1 << 30)
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    most = min(_memory(), max(shared, STORE_ON_DISK))
    if not STORE_LEAST <= wanted <= most:
        raise ConfigError(
            "ray_object_store_gb is a size that Ray cannot have here",
            f"{size:g}; it may be {STORE_LEAST / (1 << 30):.3f} to {most / (1 << 30):.1f} on this machine, or 0",
            "Use 0 for a small one: latents do not go through it",
        )


def _memory() -> int:
    """Bytes of memory that processes of this machine, or of this container, may have."""
    limits = [path.read_text().strip() for path in CGROUP if path.is_file()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdecimal())])
