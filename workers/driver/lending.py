"""Weights of a model on the pool for ControlNets in ComfyUI's process that borrow some: mapped there, not copied."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import comfy.controlnet

from ...loaders.source import Source
from ...raylight.errors import UnsupportedError
from ..mapping.adopt import adopt
from ..mapping.loading import normal_tensors


def borrows(control: object) -> bool:
    """Whether a ControlNet takes over weights of the model it controls when sampling begins."""
    return isinstance(control, (comfy.controlnet.ControlLora, comfy.controlnet.ControlNetSD35))


def lend(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of ComfyUI's sampling: where a ControlNet borrows, the MODEL has weights to lend meanwhile.

    Raises:
        LoadError: another file is in the place of the model's.
        UnsupportedError: the model's file has none that ComfyUI's layers could use.
    """
    guider = executor.class_obj
    conditions = itertools.chain.from_iterable(guider.conds.values())
    if not any(borrows(control) for condition in conditions for control in _chain(condition.get("control"))):
        return executor(*args, **kwargs)
    with _weights(guider.model_patcher):
        return executor(*args, **kwargs)


def _chain(control: Any) -> Iterator[Any]:
    while control is not None:
        yield control
        control = control.previous_controlnet


@contextlib.contextmanager
def _weights(patcher: Any) -> Iterator[None]:
    """Have the model's stand-in answer from a model with weights: the file's memory, and copies of what is patched."""
    stand_in = patcher.model.diffusion_model
    spec = stand_in.rpc.spec
    source = Source.of(spec)
    if source.header.format == "gguf":
        _refuse(f"those of {os.path.basename(spec.path)} are quantised blocks")
    told = stand_in.rpc.told
    with normal_tensors(), told.here(loading=True):
        adopted = adopt(source, spec, stand_in.dtype)
    adopted.patcher.patches = patcher.patches
    with normal_tensors(), told.here(loading=False):
        for key in patcher.patches:
            home = adopted.homes.get(key)
            if home is None:
                continue
            if home.dtype is not None:
                home.put(home.tensor.to(home.dtype))
            try:
                adopted.patcher.patch_weight_to_device(key)
            except NotImplementedError:  # on meta
                _refuse("the model is merged with another one, whose weights are on the workers")
    with stand_in.answering_from(adopted.patcher.model.diffusion_model):
        yield


def _refuse(why: str) -> NoReturn:
    raise UnsupportedError(
        "A ControlNet that borrows weights (Control-LoRA, SD3.5) cannot be used with this model on the pool",
        why,
        "Use a safetensors file of the model as it is, another ControlNet, or ComfyUI's own loader for the model",
    )
