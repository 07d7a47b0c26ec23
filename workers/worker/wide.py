"""A copy of a worker's model that computes in fp32, whatever its weights are, without a copy of these."""

from __future__ import annotations

import torch
from torch import nn

from ...raylight.found.proof import sharing
from ...raylight.found.values import Inputs, copied, narrow

CASTS = "comfy_cast_weights"
"""Attribute of ComfyUI's layers: whether they bring their weights to the dtype of what they are given."""
MOST_BYTES = 1 << 31
"""What weights outside of such layers may take in fp32: there are few."""


def wide(model: nn.Module) -> nn.Module:
    """The copy, on the same weights. Call it outside of inference mode.

    Raises:
        ValueError: too much of the weights is not in layers that cast.
    """
    twin, copied = sharing(model), 0
    for module in twin.modules():
        if vars(module).get("dtype") in (torch.bfloat16, torch.float16):
            vars(module)["dtype"] = torch.float32
        if hasattr(module, CASTS):
            setattr(module, CASTS, True)
        else:
            for name, value in module._parameters.items():
                if value is not None and narrow(value):
                    copied += 4 * value.numel()
                    if copied > MOST_BYTES:
                        raise ValueError("its weights cannot be cast to fp32 layer by layer")
                    module._parameters[name] = nn.Parameter(value.float(), requires_grad=False)
        # what a model keeps in buffers must not get into the one that samples
        for name, kept in module._buffers.items():
            if kept is not None:
                module._buffers[name] = kept.float() if narrow(kept) else kept.clone()
    return twin


def widened(inputs: Inputs) -> Inputs:
    """The inputs in fp32, of their own. Call it outside of inference mode."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if narrow(tensor) else tensor.clone()

    args, kwargs = copied(inputs, of)
    return args, kwargs
