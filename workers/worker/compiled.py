"""Blocks of a diffusion model under torch.compile, as object patches of ComfyUI's patcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...raylight.blocks import blocks
from ..wire.messages import PREFIX


def compiled_blocks(diffusion: nn.Module, backend: str) -> dict[str, Callable[..., Any]]:
    """Object patches that have each block's forward compiled when it first runs.

    Only the forwards: hooks around them, which cut and join sequences and ask whether to go on, run as Python. Blocks
    of one class share what was compiled for the first of them.

    Args:
        backend: of torch.compile.
    """
    names = {module: name for name, module in diffusion.named_modules()}
    found = dict.fromkeys(blocks(diffusion))
    return {f"{PREFIX}{names[block]}.forward": torch.compile(block.forward, backend=backend) for block in found}


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run as Python wherever compiled code calls it: it talks to other ranks."""
    kept: Callable[..., Any] = torch.compiler.disable(function)
    return kept
