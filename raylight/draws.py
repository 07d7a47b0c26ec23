"""The states of what draws random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def generators(device: torch.device) -> list[Any]:
    """The modules that keep the states of what is drawn for tensors of a device."""
    return [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]


def states(device: torch.device) -> list[torch.Tensor]:
    """Their states now."""
    return [module.get_rng_state() for module in generators(device)]


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """What is drawn inside does not count."""
    before = states(device)
    try:
        yield
    finally:
        for module, state in zip(generators(device), before, strict=True):
            module.set_rng_state(state)
