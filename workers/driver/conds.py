"""Which conditions of a model call can go to different cfg groups: seen where ComfyUI evaluates a list of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.conds
import comfy.hooks
import comfy.patcher_extension
import torch

from ...raylight import cfg
from ...raylight.names import is_options

KEY = "raylight"
PER_ROW = "raylight_per_row"
"""Key of transformer_options: names of the model arguments that have a row per row of the batch."""
ALWAYS_PER_ROW = frozenset({"context", "control"})
"""Names that ComfyUI gives to the model without a condition of that name."""
LISTS = ("cond_or_uncond", "uuids")
"""Lists in transformer_options with an entry per condition of the batch."""
KINDS = comfy.patcher_extension.WrappersMP
CALLBACKS = comfy.patcher_extension.CallbacksMP


def calc_cond_batch(  # noqa: PLR0917, the signature is ComfyUI's
    executor: Any,
    model: Any,
    conds: list[Any],
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """CALC_COND_BATCH wrapper of a model whose pool has several cfg groups: each condition is evaluated by itself.

    ComfyUI's own code does so with the others left out, as it does at cfg 1, up to the model call; calls of
    different conditions go to different groups at the same time. Where foreign code around the model call would
    see other calls than in plain ComfyUI, ComfyUI batches as it likes, and the batch is divided at the cut.
    """
    rpc = model.diffusion_model.rpc
    if rpc.config.parallel.degrees["cfg"] == 1:  # a pool that is chosen for each run may have one group
        return executor(model, conds, x_in, timestep, model_options)
    together = rpc.together
    present = [index for index, cond in enumerate(conds) if cond is not None]
    if len(present) < 2 or together.inside():
        return executor(model, conds, x_in, timestep, model_options)
    if _is_watched(executor, model.current_patcher, conds, model_options):
        return executor(model, conds, x_in, timestep, _with_per_row(model_options, conds))

    def evaluate(index: int) -> list[torch.Tensor]:
        alone = [cond if at == index else None for at, cond in enumerate(conds)]
        return executor(model, alone, x_in, timestep, model_options)

    outputs = together.run([functools.partial(evaluate, index) for index in present], rpc.answer)
    # the first run's outputs have ComfyUI's answer for absent conditions
    results = list(outputs[0])
    for index, output in zip(present, outputs, strict=True):
        results[index] = output[index]
    return results


def rows_of(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str], groups: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]] | None:
    """The arguments of a batched model call for each group, whole conditions each; None where it runs undivided.

    Args:
        names: the positional parameters; the first two are the latent and the timestep.
        groups: how many groups there are.
    """
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    options: dict[str, Any] = next((value for value in values.values() if is_options(value)), {})
    conds = len(options.get("cond_or_uncond", ()))
    first = cfg.tensors(args[:1])
    rows = first[0].shape[0] if first else 0
    if PER_ROW not in options or conds < 2 or rows % conds or len(names) < len(args):
        return None
    per_row = options[PER_ROW] | ALWAYS_PER_ROW | set(names[:2])
    named = {name: value for name, value in values.items() if value is not options}
    spans = cfg.spans(conds, groups)
    each = rows // conds
    divided = cfg.divide(
        named, per_row=per_row, rows=rows, parts=[(start * each, stop * each) for start, stop in spans]
    )
    if divided is None:
        return None
    parts = []
    for span, part in zip(spans, divided, strict=True):
        own = {**options, **{name: options[name][slice(*span)] for name in LISTS if name in options}}
        part |= {name: own for name, value in values.items() if value is options}
        positional = tuple(part.pop(name) for name in names[: len(args)])
        parts.append((positional, part))
    return parts


def _is_watched(executor: Any, patcher: Any, conds: list[Any], model_options: dict[str, Any]) -> bool:
    """Whether code that is not ComfyUI's own runs between here and the model call, once per call."""
    options = model_options.get("transformer_options", {})
    inner = [wrapper for wrapper in executor.wrappers[executor.idx + 1 :] if wrapper is not calc_cond_batch]
    for kind in (KINDS.APPLY_MODEL, KINDS.DIFFUSION_MODEL):
        inner += comfy.patcher_extension.get_all_wrappers(kind, options)
    for kind in (CALLBACKS.ON_PREPARE_STATE, CALLBACKS.ON_APPLY_HOOKS):
        inner += patcher.get_all_callbacks(kind)
    hooked = (
        hook
        for entry in _entries(conds)
        if entry.get("hooks") is not None
        for hook in entry["hooks"].get_type(comfy.hooks.EnumHookType.TransformerOptions)
    )
    return bool(inner) or "model_function_wrapper" in model_options or any(True for _ in hooked)


def _with_per_row(model_options: dict[str, Any], conds: list[Any]) -> dict[str, Any]:
    """The options, with the names of what ComfyUI concatenates when it batches conditions."""
    found: dict[str, bool] = {}
    for entry in _entries(conds):
        for name, cond in entry["model_conds"].items():
            found[name] = found.get(name, True) and not isinstance(cond, comfy.conds.CONDConstant)
    names = frozenset(name for name, per_row in found.items() if per_row)
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), PER_ROW: names}}


def _entries(conds: list[Any]) -> list[dict[str, Any]]:
    return [entry for cond in conds if cond is not None for entry in cond]
