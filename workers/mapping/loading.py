"""How ComfyUI's loader is called, the same way in the driver and in a worker."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import comfy.sd
import torch

from ...raylight.config import ModelSpec

WEIGHT_DTYPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "default": ("", ()),
    "fp8_e4m3fn": ("float8_e4m3fn", ()),
    "fp8_e4m3fn_fast": ("float8_e4m3fn", ("fp8_optimizations",)),
    "fp8_e5m2": ("float8_e5m2", ()),
    "bf16": ("bfloat16", ()),
    "fp16": ("float16", ()),
}
"""Widget value -> (dtype, options) of a ModelSpec; the first four mean what ComfyUI's UNETLoader means."""


def load_options(spec: ModelSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_options` and keyword arguments for `comfy.sd.load_diffusion_model_state_dict`."""
    options: dict[str, Any] = {name: True for name in spec.options}
    if spec.dtype:
        options["dtype"] = getattr(torch, spec.dtype)
    keywords: dict[str, Any] = {}
    # newer ComfyUI may build a patcher that streams weights itself; that one cannot take hooks or patches of ours
    if "disable_dynamic" in inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters:
        keywords["disable_dynamic"] = True
    return options, keywords


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Outside of inference mode, without gradients.

    Parameters are made and moved here: one that mixes normal and inference tensors fails at its first use
    ("Inference tensors do not track version counter").
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
