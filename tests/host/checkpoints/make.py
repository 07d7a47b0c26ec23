"""Makes checkpoints inside a process of ComfyUI: `comfy` must be importable and its options parsed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import Job, controls, layouts
from .markers import Keys
from .recipes import RECIPES, Recipe

if TYPE_CHECKING:
    import torch

BLOCK = (1 << 20) + 7
"""Random values drawn per file. Large weights repeat them; the odd length keeps their rows different."""
GAIN = 0.8


def make(job: Job) -> str:
    """Write one checkpoint and describe it.

    Raises:
        RuntimeError: ComfyUI takes it for another family, or would not fill its model with exactly this file.
    """
    import torch
    from safetensors.torch import save_file

    if job.family in controls.SCHEMES:
        return _make_control(job)
    recipe = RECIPES[job.family]
    size = {**recipe.size, **job.size}
    dtype = getattr(torch, job.dtype or recipe.dtype)
    model = build(recipe, size)
    weights = fill(model, recipe, dtype=dtype, seed=job.seed)
    config = detect(weights, recipe)
    if type(config).__name__ != recipe.detected:
        raise RuntimeError(f"ComfyUI takes this {job.family} for {type(config).__name__}, not {recipe.detected}")
    _compare(job.family, model, weights)
    if job.layout:
        weights = layouts.diffusers(job.family, weights)
    metadata = {"config": json.dumps({"transformer": dict(recipe.config)})} if recipe.config else None
    partial = job.path.with_suffix(".partial")
    save_file(weights, partial, metadata=metadata)
    partial.replace(job.path)
    size_bytes = sum(weight.nbytes for weight in weights.values())
    name = type(model).__name__
    return f"{job.path}: {recipe.detected}, {name}, {dtype}, {len(weights)} tensors, {size_bytes >> 20} MiB"


def _make_control(job: Job) -> str:
    import torch
    from safetensors.torch import save_file

    model = controls.model_of(job.family, job.size)
    dtype = getattr(torch, job.dtype or "float32")
    weights = controls.keys_of(job.family, fill(model, None, dtype=dtype, seed=job.seed))
    partial = job.path.with_suffix(".partial")
    save_file({key: weight.contiguous() for key, weight in weights.items()}, partial)
    partial.replace(job.path)
    return f"{job.path}: {type(model).__name__}, {dtype}, {len(weights)} tensors"


def detect(state: Mapping[str, torch.Tensor], recipe: Recipe) -> Any:
    """ComfyUI's model config for these tensors."""
    import comfy.model_detection

    metadata = {"config": json.dumps({"transformer": dict(recipe.config)})} if recipe.config else None
    return comfy.model_detection.model_config_from_unet(dict(state), "", metadata=metadata)


def build(recipe: Recipe, size: Mapping[str, int]) -> torch.nn.Module:
    """ComfyUI's model for the keys of the recipe, without weights.

    Raises:
        RuntimeError: a key of the recipe is none of the model's, so detection goes by something else than intended.
    """
    import torch

    keys: Keys = recipe.keys(size)
    markers = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    config = detect(markers, recipe)
    if config is None:
        raise RuntimeError(f"ComfyUI detects no family by {', '.join(keys)}")
    model: torch.nn.Module = config.get_model(markers, "", device=recipe.device).diffusion_model
    state = model.state_dict()
    for key, shape in keys.items():
        if key not in state or (shape and tuple(state[key].shape) != shape):
            found = tuple(state[key].shape) if key in state else "nothing"
            raise RuntimeError(f"{type(model).__name__} has {found} for the recipe's {key} {shape}")
    return model


def fill(model: torch.nn.Module, recipe: Recipe | None, *, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near 1: matrices by their fan-in, norm weights about 1, small biases."""
    import torch

    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).repeat(2)
    result = {}
    for number, (key, weight) in enumerate(model.state_dict().items()):
        mean, scale = _spread(recipe, key, weight)
        count, start = weight.numel(), 7919 * number % BLOCK
        values = (mean + scale * noise[start : start + min(count, BLOCK)]).to(dtype)
        result[key] = values.repeat(-(-count // BLOCK))[:count].view(weight.shape).contiguous()
    return result


def _spread(recipe: Recipe | None, key: str, weight: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a weight."""
    for pattern, mean, scale in recipe.spread if recipe else ():
        if re.search(pattern, key):
            return mean, scale
    if weight.ndim > 1 and weight.shape[0] > 1:
        return 0.0, GAIN / math.sqrt(weight[0].numel())
    if weight.ndim > 1:  # modulation tables and padding tokens, one row for all
        return 0.0, 0.3
    if key.endswith(("weight", "scale")):
        return 1.0, 0.1
    return 0.0, 0.02


def _compare(family: str, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare the file's weights to those that the detected model has; only then nothing is left uninitialised."""
    recipe = RECIPES[family]
    again = detect(weights, recipe).get_model(dict(weights), "", device=recipe.device).diffusion_model
    wanted = {key: tuple(value.shape) for key, value in again.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    if type(again) is not type(model) or wanted != given:
        differing = [key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key)]
        raise RuntimeError(f"ComfyUI builds another {family} from its file: {differing[:10]}")
