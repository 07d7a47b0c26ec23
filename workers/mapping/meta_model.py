"""A ComfyUI model without weights: detected and built by ComfyUI from a file's header, on meta tensors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.quant_ops
import comfy.sd
import comfy.utils
import torch

from ...loaders.files import opened, read_tensor
from ...loaders.header import Entry, Header, read_header, reshaped
from ...loaders.parts import joined
from ...raylight.config import ModelSpec
from ...raylight.errors import LoadError
from .loading import load_options
from .shapes import Misfits, Shape, Shapes, fitting

REAL_BYTES = 4 << 10
REAL_VECTOR_BYTES = 64 << 10
"""Tensors up to these sizes are read: detection looks at some values (norm scales, quantisation markers)."""


AUDIO_AND_VIDEO = "audio_to_video_attn."
"""In the keys of LTX-2 only."""
NO_DIFFUSION = frozenset(
    {"llama", "t5", "t5encoder", "clip", "qwen2", "qwen2vl", "qwen3", "gemma2", "gemma3", "mistral3"}
)
"""GGUF architectures (its `general.architecture`) that are text encoders."""

QUANTISED_LAYERS, QUANTISED_KEY = "_quantization_metadata", ".comfy_quant"
"""Where files say how layers are quantised: a text field, or a small tensor beside each."""
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


class AllOnMeta(_StayOnMeta):
    """Has parameters on meta also where ComfyUI names the device they are to be made on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def all_on_meta() -> Iterator[None]:
    """What ComfyUI builds inside is on meta, wherever it would have it."""
    with torch.device("meta"), AllOnMeta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading values into meta parameters is a no-op, and torch says so
        yield


def build(spec: ModelSpec) -> tuple[Any, Any, ModelSpec]:
    """Build the model of a file without its weights.

    Returns:
        `(meta, config, spec)`: ComfyUI's BaseModel on meta tensors, whose `diffusion_model` answers for keys,
        shapes and config, a fresh model config of the same detection with real tensors in it, from which
        `without_weights` makes the BaseModel that samples, and the spec with the shapes that tensors of the file
        have in the model.

    Raises:
        LoadError: the file is missing, damaged or not a diffusion model ComfyUI knows.
    """
    state, found = _header(spec)
    metadata = dict(found.metadata) or None
    check_metadata(spec.path, state, metadata)
    check_formats(spec.path, state, metadata)
    name, failed = os.path.basename(spec.path), None
    try:
        patcher = _patcher(spec, state, metadata)
    except Exception as error:  # detection trusts a file's shapes and settings; which errors it meets is open
        patcher, failed = None, error
    if patcher is not None:
        return patcher.model, state, spec
    if found.format == "gguf" and not spec.shapes:
        shapes = _other_shapes(name, state, metadata)
        if shapes:
            return build(dataclasses.replace(spec, shapes=tuple(sorted(shapes.items()))))
    if failed is not None:
        raise LoadError(
            f"ComfyUI cannot build a model from {name}",
            f"{type(failed).__name__}: {failed}",
            "The file is of another kind, or was converted in another way: choose another one",
        ) from failed
    hint = comfy.sd.model_detection_error_hint(spec.path, state)
    raise LoadError(
        f"ComfyUI does not recognise a diffusion model in {name}",
        hint.strip() or "its tensor names and shapes fit no family",
        "Choose a diffusion model file (not a LoRA, VAE or text encoder)",
    )


def _patcher(spec: ModelSpec, state: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> Any:
    options, keywords = load_options(spec)
    with torch.device("meta"), _StayOnMeta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading values into meta parameters is a no-op, and torch says so
        return comfy.sd.load_diffusion_model_state_dict(dict(state), options, metadata=metadata, **keywords)


def _other_shapes(file: str, state: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> dict[str, Shape]:
    """The shapes of tensors that a GGUF file has in other dims than the model; {} where that is not what is wrong.

    Raises:
        LoadError: they do not follow from the model's.
    """

    def model_of(shapes: Shapes) -> dict[str, Shape]:
        changed = {
            name: value if value.shape == shapes[name] else value.reshape(shapes[name]) for name, value in state.items()
        }
        prefix = comfy.model_detection.unet_prefix_from_state_dict(changed)
        stripped = comfy.utils.state_dict_prefix_replace(changed, {prefix: ""}, filter_keys=True)
        prefix, stripped = (prefix, stripped) if stripped else ("", changed)
        with torch.device("meta"), _StayOnMeta():
            config = comfy.model_detection.model_config_from_unet(dict(stripped), "", metadata=metadata)
            model = config.get_model(dict(stripped), "").diffusion_model.state_dict()
        return {prefix + name: tuple(value.shape) for name, value in model.items() if name in stripped}

    try:
        return fitting({name: tuple(value.shape) for name, value in state.items()}, model_of)
    except Misfits as error:
        if not error.found:
            return {}
        name, stored, wanted = error.found[0]
        more = f" (and {len(error.found) - 1} more)" if error.found[1:] else ""
        raise LoadError(
            f"{file} has tensors in other shapes than the model that ComfyUI takes it for",
            f"{name} is {_dims(stored)} in the file and {_dims(wanted)} in the model{more}",
            "Choose a file that was converted in another way, or the safetensors file of the model",
        ) from error


def _dims(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a single value"


def check_metadata(path: str, state: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    """Refuse files that ComfyUI would take for something they are not.

    Raises:
        LoadError: an empty file, a GGUF file of another kind of model, or one of LTX-2 without its `config`,
            without which ComfyUI silently builds another model.
    """
    if not state:
        raise LoadError(f"{os.path.basename(path)} holds no tensors", "", "Choose a diffusion model file")
    architecture = (metadata or {}).get("general.architecture", "")
    if architecture in NO_DIFFUSION:
        raise LoadError(
            f"{os.path.basename(path)} is not a diffusion model",
            f"its architecture is {architecture!r}",
            "Choose the diffusion model's file; text encoders have loaders of their own",
        )
    if any(AUDIO_AND_VIDEO in key for key in state) and "config" not in (metadata or {}):
        raise LoadError(
            f"{os.path.basename(path)} does not hold the model's settings",
            "LTX-2 files need the text field 'config', which was lost when this one was converted",
            "Choose a file that was converted with its metadata",
        )


def check_formats(path: str, state: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    """Refuse layers quantised in a format that this ComfyUI does not know, of which it would only say a name.

    Raises:
        LoadError: the file needs a newer ComfyUI.
    """
    layers = _parsed((metadata or {}).get(QUANTISED_LAYERS, "")).get("layers", {})
    configs = list(layers.values()) if isinstance(layers, dict) else []
    small = (value for key, value in state.items() if key.endswith(QUANTISED_KEY) and not value.is_meta)
    configs += [_parsed(value.numpy().tobytes()) for value in small]
    formats = {config["format"] for config in configs if isinstance(config, dict) and "format" in config}
    unknown = {str(name) for name in formats} - set(comfy.quant_ops.QUANT_ALGOS)
    if unknown:
        raise LoadError(
            f"{os.path.basename(path)} is quantised as {', '.join(sorted(unknown))}, which this ComfyUI does not know",
            f"it knows {', '.join(comfy.quant_ops.QUANT_ALGOS)}",
            "Update ComfyUI, or choose a file of another kind",
        )


def _parsed(text: str | bytes) -> dict[str, Any]:
    """A JSON object, an empty one where it is none: that is for ComfyUI to say."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def without_weights(meta: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, cast: torch.dtype | None) -> Any:
    """The BaseModel of the meta model's family, everything but its `diffusion_model` real.

    `dtype` and `cast` are the workers' weight dtype and manual cast dtype: theirs count, wherever the
    driver itself runs.
    """
    found = meta.model_config
    # a new config, since that of the meta model was made on meta: its latent format holds tensors
    config = type(found)(dict(found.unet_config))
    config.set_inference_dtype(dtype, cast)
    for name in ("custom_operations", "scaled_fp8", "quant_config", "layer_quant_config"):
        if vars(found).get(name) is not None:  # ComfyUI warns of a setting that its version does not have
            setattr(config, name, vars(found)[name])
    config.optimizations = dict(found.optimizations)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    stripped = comfy.utils.state_dict_prefix_replace(dict(state), {prefix: ""}, filter_keys=True)
    config.unet_config["disable_unet_model_creation"] = True
    model = config.get_model(stripped or state, "")
    del config.unet_config["disable_unet_model_creation"]
    return model


def header(spec: ModelSpec) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """A model's tensors as meta tensors of their shape and dtype (small ones real), and its metadata.

    Quantised GGUF tensors appear with the shape and dtype they say they have in a worker (gguf_ops.Blocks).

    Raises:
        LoadError: a file is missing, or not what its name says.
    """
    state, found = _header(spec)
    return state, dict(found.metadata) or None


def _header(spec: ModelSpec) -> tuple[dict[str, torch.Tensor], Header]:
    state: dict[str, torch.Tensor] = {}
    found = []
    for path in spec.paths:
        with opened(path) as fd:
            found.append(reshaped(read_header(path, fd), dict(spec.shapes)))
            state |= {name: real_or_meta(found[-1], fd, entry) for name, entry in found[-1].entries.items()}
    return state, joined(found, [0] * len(found))


def real_or_meta(found: Header, fd: int, entry: Entry) -> torch.Tensor:
    """A tensor of a file as detection is to see it: small ones are read, others are on meta."""
    if entry.quant:
        return torch.empty(entry.shape, dtype=torch.float16, device="meta")
    if entry.nbytes <= REAL_BYTES or (len(entry.shape) == 1 and entry.nbytes <= REAL_VECTOR_BYTES):
        return read_tensor(found, fd, entry)
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def twin(base: Any) -> Any:
    """A BaseModel of its own for another replica: what patchers, hooks and samplers write there stays there."""
    twin = copy.copy(base)
    for name in ("_modules", "_buffers", "_parameters"):
        setattr(twin, name, dict(getattr(base, name)))
    return twin
