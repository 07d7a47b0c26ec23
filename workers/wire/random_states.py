"""The states of torch's random generators in this process, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy import model_management

from ...raylight.draws import generators


def take() -> tuple[Any, Any]:
    """States of the CPU's generator and of the device's, None without one."""
    states = [module.get_rng_state().numpy() for module in _generators()]
    return states[0], states[1] if len(states) > 1 else None


def put(states: tuple[Any, Any]) -> None:
    """Go on drawing from these states; one that is None stays."""
    for module, state in zip(_generators(), states, strict=False):
        if state is not None:
            module.set_rng_state(torch.from_numpy(state.copy()))


def keep() -> Callable[[], None]:
    """Remember the states, and whether gradients are computed; the function that was returned puts them back."""
    states, gradients = take(), torch.is_grad_enabled()

    def restore() -> None:
        put(states)
        torch.set_grad_enabled(gradients)

    return restore


def _generators() -> list[Any]:
    return generators(model_management.get_torch_device())
