"""Which cards a user means, by a text."""

from __future__ import annotations

import reprlib

from ...raylight.config import ParallelConfig, PoolConfig
from ...raylight.errors import ConfigError
from . import devices, limits, processes

ALL = ("all", "")
REMEDY = "Write all, or the numbers of the cards with commas, for example 0,2"


def pool_of(text: str, device_type: str) -> PoolConfig:
    """A pool of these cards, each of them by itself.

    Args:
        text: "all", or indices with commas. Without a GPU they are CPU workers.
        device_type: of the device that ComfyUI uses.

    Raises:
        ConfigError: it is no list of cards of this machine.
    """
    known = _known(device_type)
    if text.strip().lower() in ALL:
        chosen = known[: limits.with_memory(len(known))] if device_type == "cpu" else known
    else:
        parts = [part.strip() for part in text.replace(";", ",").split(",") if part.strip()]
        if not all(part.isascii() and part.isdecimal() and len(part) < 5 for part in parts):
            raise ConfigError("gpus is not a list of cards", reprlib.repr(text), REMEDY)
        chosen = [str(int(part)) for part in parts]
        there = _present(device_type)
        unknown = [name for name in chosen if there and name not in there]
        if unknown:
            raise ConfigError(
                "gpus names cards that this machine does not have",
                f"{', '.join(unknown)}; there are {', '.join(there)}",
                REMEDY,
            )
        if len(set(chosen)) != len(chosen):
            raise ConfigError("gpus names a card twice", reprlib.repr(text), REMEDY)
    if not chosen:
        raise ConfigError("ComfyUI sees no card", "", "Start ComfyUI with --cpu to use CPU workers")
    named = device_type != "cpu" and all(name.isdecimal() for name in chosen)
    return PoolConfig(
        parallel=ParallelConfig(world=len(chosen), ulysses=1, ring=1, cfg=1),
        devices=tuple(map(int, chosen)) if named else (),
    )


def _known(device_type: str) -> list[str]:
    """The names of all that ComfyUI may use."""
    if device_type == "cpu":
        return [str(number) for number in range(limits.cpu_workers(processes.usable_cores()))]
    if device_type not in devices.VARIABLES:
        raise ConfigError(
            f"Raylight cannot put workers on {device_type} devices",
            f"known are {', '.join(devices.VARIABLES)} and cpu",
            "Start ComfyUI with --cpu to try it on the CPU",
        )
    return devices.visible(device_type)


def _present(device_type: str) -> list[str]:
    """The names of all there are, also of those that are hidden from ComfyUI; none where nobody knows."""
    return _known(device_type) if device_type == "cpu" else devices.present(device_type)
