"""The names and shapes of diffusers for a model of ComfyUI's: its own table of them, read the other way round."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OTHERS = re.compile(r"\.linear_(in|out)\.|to_qkv_mlp_proj|^single_.*attn\.to_out\.")
"""Flux.2's names, which ComfyUI has in Flux's table as well."""
State = Mapping[str, "torch.Tensor"]


def diffusers(family: str, model: State) -> dict[str, torch.Tensor]:
    """The tensors of a model as diffusers has them: queries, keys and values apart, some halves in another order.

    Raises:
        RuntimeError: diffusers would have no name for one of them.
    """
    out: dict[str, torch.Tensor] = {}
    left = set(model)
    for name, place in TABLES[family](model).items():
        target, span, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        if target not in model or OTHERS.search(name):
            continue
        left.discard(target)
        value = model[target] if span is None else model[target].narrow(*span)
        # each of ComfyUI's changes is its own inverse: it swaps two halves
        out[name] = (value if change is None else change(value)).contiguous()
    if left:
        raise RuntimeError(f"no name for {', '.join(sorted(left))}")
    return out


def _count(model: State, pattern: str) -> int:
    return len({found[1] for found in (re.match(pattern, key) for key in model) if found})


def _flux(model: State) -> dict[str, Any]:
    import comfy.utils

    counts = {"depth": _count(model, r"double_blocks\.(\d+)\."), "hidden_size": model["img_in.weight"].shape[0]}
    return _table(
        comfy.utils.flux_to_diffusers, {**counts, "depth_single_blocks": _count(model, r"single_blocks\.(\d+)\.")}
    )


def _sd3(model: State) -> dict[str, Any]:
    import comfy.utils

    depth = model["x_embedder.proj.weight"].shape[0] // 64
    counts = {"depth": depth, "num_blocks": _count(model, r"joint_blocks\.(\d+)\.")}
    return _table(comfy.utils.mmdit_to_diffusers, counts)


def _auraflow(model: State) -> dict[str, Any]:
    import comfy.utils

    double, single = _count(model, r"double_layers\.(\d+)\."), _count(model, r"single_layers\.(\d+)\.")
    return _table(comfy.utils.auraflow_to_diffusers, {"n_double_layers": double, "n_layers": double + single})


def _table(made: Callable[..., dict[str, Any]], counts: Mapping[str, int]) -> dict[str, Any]:
    return made(dict(counts), output_prefix="")


TABLES: Mapping[str, Callable[[State], dict[str, Any]]] = {"flux": _flux, "sd3": _sd3, "auraflow": _auraflow}
"""By recipe: where ComfyUI puts each of diffusers' tensors (a name, a part along a dim, a change)."""
