"""A ComfyUI model without weights: detected and built by ComfyUI from a file's header, on meta tensors."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.sd
import comfy.utils
import safetensors
import torch

from ..raylight.config import ModelSpec
from ..raylight.errors import LoadError
from .loading import load_options

REAL_BYTES = 4 << 10
REAL_VECTOR_BYTES = 64 << 10
"""Tensors up to these sizes are read: detection looks at some values (norm scales, quantisation markers)."""


NUMBERS = (torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.logspace)
"""What makes tensors of known numbers, which some models (PixArt) read back while they are built."""


class _StayOnMeta(torch.overrides.TorchFunctionMode):
    """Ignores `Tensor.to` on meta tensors, since ComfyUI's loader ends with a move to the offload device; keeps
    tensors of known numbers real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].is_meta:
            return args[0]
        if func in NUMBERS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def build(spec: ModelSpec) -> tuple[Any, Any]:
    """Build the model of a file without its weights.

    Returns:
        `(ghost, config)`: ComfyUI's BaseModel on meta tensors, whose `diffusion_model` answers for keys,
        shapes and config, and a fresh model config of the same detection with real tensors in it, from
        which `without_weights` makes the BaseModel that samples.

    Raises:
        LoadError: the file is missing, damaged or not a diffusion model ComfyUI knows.
    """
    state, metadata = header(spec.path)
    options, keywords = load_options(spec)
    with torch.device("meta"), _StayOnMeta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading values into meta parameters is a no-op, and torch says so
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(state), options, metadata=metadata, **keywords)
    if patcher is None:
        hint = comfy.sd.model_detection_error_hint(spec.path, state)
        raise LoadError(
            f"ComfyUI does not recognise a diffusion model in {os.path.basename(spec.path)}",
            hint.strip() or "its tensor names and shapes fit no family",
            "Choose a diffusion model file (not a LoRA, VAE or text encoder)",
        )
    return patcher.model, state


def without_weights(ghost: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, cast: torch.dtype | None) -> Any:
    """The BaseModel of the ghost's family, everything but its `diffusion_model` real.

    `dtype` and `cast` are the workers' weight dtype and manual cast dtype: theirs count, wherever the
    driver itself runs.
    """
    found = ghost.model_config
    # a new config, since the ghost's was made on meta: its latent format holds tensors
    config = type(found)(dict(found.unet_config))
    config.set_inference_dtype(dtype, cast)
    for name in ("custom_operations", "scaled_fp8", "quant_config", "layer_quant_config"):
        if getattr(found, name, None) is not None:
            setattr(config, name, getattr(found, name))
    config.optimizations = dict(found.optimizations)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    stripped = comfy.utils.state_dict_prefix_replace(dict(state), {prefix: ""}, filter_keys=True)
    config.unet_config["disable_unet_model_creation"] = True
    model = config.get_model(stripped or state, "")
    del config.unet_config["disable_unet_model_creation"]
    return model


def header(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """A file's tensors as meta tensors of their shape and dtype (small ones real), and its metadata.

    Raises:
        LoadError: the file is not what its name says.
    """
    if path.lower().endswith((".safetensors", ".sft")):
        return _read(path, _safetensors_header)
    return _read(path, _whole_file)


def _read(
    path: str, reader: Callable[[str], tuple[dict[str, torch.Tensor], dict[str, str] | None]]
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    try:
        return reader(path)
    except Exception as error:  # every reader has its own exception types; all mean the same to the user
        raise LoadError(
            f"{os.path.basename(path)} cannot be read as a model file",
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            "The file is damaged, incomplete or of another kind: download it again or choose another one",
        ) from error


def _safetensors_header(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    state = {}
    with safetensors.safe_open(path, framework="pt") as file:
        for key in file.keys():
            part = file.get_slice(key)
            shape, dtype = part.get_shape(), DTYPES[part.get_dtype()]
            state[key] = _real_or_meta(shape, dtype, functools.partial(file.get_tensor, key))
        return state, file.metadata()


def _whole_file(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """Formats without a header to read on their own: the tensors exist for the length of this call."""
    loaded, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    state = {key: _real_or_meta(value.shape, value.dtype, value.clone) for key, value in loaded.items()}
    return state, metadata


def _real_or_meta(shape: Any, dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> torch.Tensor:
    size = dtype.itemsize * torch.Size(shape).numel()
    if size <= REAL_BYTES or (len(shape) == 1 and size <= REAL_VECTOR_BYTES):
        return read()
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes (the format's README, "Format")."""
