"""What is on a worker's device, and what leaves it so that others have room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...raylight.config import ModelSpec


@dataclass(frozen=True)
class Ready:
    """How a model was brought onto the device.

    Attributes:
        state: of its patches.
        weights: bytes of it there; where there are others by now, something else took its place.
        room: bytes of activations that there was room for. A call that needs more has its place made anew.
    """

    state: str
    weights: int
    room: int


def least_recent(idle: Mapping[ModelSpec, int], missing: int) -> list[ModelSpec]:
    """Which models to take off the device so that `missing` more bytes are free.

    Args:
        idle: bytes on the device by model, the least recently used first.
    """
    chosen = []
    for spec, size in idle.items():
        if missing <= 0:
            break
        if size:
            chosen.append(spec)
            missing -= size
    return chosen
