"""What ranks that share a picture send each other, next to its closed form (docs/scaling.md)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_raylight.patches.registry import plan_for
from comfy_raylight.raylight import cost
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.cost import Work
from comfy_raylight.raylight.install import install

from .case import Inputs
from .families import unet

SIZES = (2, 4)
MODELS = {
    "unet": (partial(unet.unet, unet.EVEN), partial(unet.picture, 16, 12)),
    "sdxl": (partial(unet.unet, unet.SDXL), partial(unet.picture, 32, 24, label=20)),
}
"""Tokens and heads that 4 ranks divide."""


def closed_form(model: torch.nn.Module, inputs: Inputs, *, rank: int, size: int) -> dict[str, float]:
    """Bytes that a rank of `size` sends in one forward, from what its layers are given in one process."""
    (x, *_), _ = inputs
    neighbours = (rank > 0) + (rank < size - 1)
    sent = {"halo": 0.0, "all_gather": x.nbytes / size * (size - 1), "all_to_all": 0.0}

    def convolution(module: Any, args: Any, out: torch.Tensor) -> None:
        row = args[0][..., :1, :].nbytes
        if module.kernel_size[0] > 1:
            sent["halo"] += row * (neighbours if module.stride[0] == 1 else rank < size - 1)

    def norm(module: Any, args: Any, out: torch.Tensor) -> None:
        # mean and variance
        sent["all_gather"] += 2 * args[0].shape[0] * module.num_groups * 4 * (size - 1)

    def attention(module: Any, args: Any, out: torch.Tensor) -> None:
        batch, tokens, width = args[0].shape
        work = Work(tokens=tokens, width=width, blocks=1, weights=0, batch=batch, itemsize=args[0].element_size())
        sent["all_to_all"] += cost.attention_bytes(work, ulysses=size, ring=1)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            handles.append(module.register_forward_hook(convolution))
        elif isinstance(module, torch.nn.GroupNorm):
            handles.append(module.register_forward_hook(norm))
        elif name.endswith("attn1"):
            handles.append(module.register_forward_hook(attention))
    args, kwargs = inputs
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return sent


def job(rank: int, size: int, path: str, model: Any, make: Any) -> dict[str, Any]:
    """Bytes by kind of a model's second forward, which tests nothing any more, and their closed form."""
    from .ranks import mesh_of

    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    with torch.inference_mode():
        wanted = closed_form(model, make(), rank=rank, size=size)
        installation = install(model, plan_for(model), mesh)
        for _ in range(2):
            before = mesh.bytes
            args, kwargs = make()
            installation.wrapper(model._forward, *args, **kwargs)
        installation.remove()
    sent = {kind: float(count - before.get(kind, 0)) for kind, count in mesh.bytes.items()}
    mesh.control.all_reduce(torch.zeros(1))
    mesh.close()
    return {"sent": {kind: count for kind, count in sent.items() if count}, "closed form": wanted}
