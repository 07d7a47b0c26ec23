"""Has ranks cut time at the same frames where a VAE cuts it by the bytes of its own activation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from ..raylight.rows.strips import Strips

NAME = "get_max_chunk_size"
"""A function of the VAE's Python module that says how many bytes of activation it may make at once."""


def budget(model: torch.nn.Module, device: torch.device) -> int:
    """Bytes that `model` would make at once on this device; 0 where it does not cut time by size."""
    return min((getattr(module, NAME)(device) for module in _modules(model)), default=0)


@contextmanager
def agreed(model: torch.nn.Module, strips: Strips, size: int) -> Iterator[None]:
    """While it is entered, `model` takes its strip's share of `size` bytes for its limit.

    Shares are whole multiples of the same number of bytes per row, so the number of chunks, which is a quotient
    of bytes made and bytes allowed, is the same on all ranks. What is replaced comes back, also on error.

    Args:
        size: bytes for the whole picture: the least of what the ranks would allow themselves, times the ranks.
    """
    own = [(module, getattr(module, NAME)) for module in _modules(model)]
    share = max(1, size // strips.total) * strips.height

    def limit(*args: Any, **kwargs: Any) -> int:
        return share

    try:
        for module, _ in own:
            setattr(module, NAME, limit)
        yield
    finally:
        for module, function in own:
            setattr(module, NAME, function)


def _modules(model: torch.nn.Module) -> list[ModuleType]:
    names = dict.fromkeys(type(part).__module__ for part in model.modules())
    found = [sys.modules[name] for name in names if name in sys.modules]
    return [module for module in found if callable(getattr(module, NAME, None))]
