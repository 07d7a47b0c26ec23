"""ComfyUI's text encoders over mapped files: on meta tensors in the driver, with the files' weights in a worker."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...loaders.files import opened, read_tensor
from ...loaders.header import Entry, Header, read_header
from ...loaders.source import Source
from ...raylight.config import ModelSpec
from ...raylight.errors import LoadError
from . import meta_model
from .adopt import Adopted, Adopting, homes_of, on_cpu

HOST = torch.device("cpu", 0)
"""The CPU under another name than its own: ComfyUI loads at once what begins on the device it will be used on."""
STOCK = "Choose a safetensors file of a text encoder, or use ComfyUI's Load CLIP"


@dataclass(frozen=True)
class _Encoder:
    """Tensors of one file by name, and its text fields."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def meta(spec: ModelSpec) -> Any:
    """ComfyUI's CLIP of these files without their weights; its tokenizers are real.

    Raises:
        LoadError: a file is missing, damaged, or none that ComfyUI finds a text encoder in.
    """
    files = [_header(path) for path in spec.paths]
    with meta_model.all_on_meta():
        try:
            states = _states(files)
            clip = _load(spec, states, initial_device=torch.device("meta"))
            if not spec.others and comfy.sd.detect_te_model(states[0]) is None:
                _check_fits(spec, clip, states[0])
        except LoadError:
            raise
        except Exception as error:  # detection trusts a file's shapes; which errors it meets is open
            raise LoadError(
                f"ComfyUI cannot build a text encoder of the type {spec.encoder} from {_names(spec)}",
                f"{type(error).__name__}: {error}",
                "Choose the type that the model needs, and the files that belong to it",
            ) from error
    return clip


def adopt_encoders(source: Source, spec: ModelSpec, dtype: torch.dtype) -> Adopted:
    """Build the text encoders of some files without copying their plain weights. Call it outside of inference mode.

    Args:
        dtype: what plain ComfyUI keeps most weights in, as the driver found it; files have a say as well.
    """
    files = [_Encoder(file.own(source.tensors), dict(file.header.metadata)) for file in source.files]
    mode = Adopting(source, convert=not on_cpu())
    with mode:
        patcher = _load(spec, _states(files), dtype=dtype, initial_device=HOST).patcher
    return Adopted(patcher, homes_of(patcher.model, mode.dtype_of))


def _load(spec: ModelSpec, states: list[dict[str, Any]], **options: Any) -> Any:
    load: Callable[..., Any] = comfy.sd.load_text_encoder_state_dicts
    kind = getattr(comfy.sd.CLIPType, spec.encoder.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    # newer ComfyUI may build a patcher that streams weights itself; that one cannot take hooks or patches of ours
    more = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(load).parameters else {}
    embeddings = folder_paths.get_folder_paths("embeddings")
    return load(states, embedding_directory=embeddings, clip_type=kind, model_options=options, **more)


def _states(files: Sequence[_Encoder]) -> list[dict[str, Any]]:
    """What ComfyUI's load_clip makes of files before it looks at them, in the way of its version."""
    convert = getattr(comfy.utils, "convert_old_quants", None)
    if convert is not None:
        return [convert(dict(file.tensors), model_prefix="", metadata=dict(file.metadata))[0] for file in files]
    states: list[dict[str, Any]] = []
    for file in files:
        quantised = {name: file.metadata[name] for name in [meta_model.QUANTISED_LAYERS] if name in file.metadata}
        states.append({**file.tensors, **quantised})
    return states


def _header(path: str) -> _Encoder:
    with opened(path) as fd:
        header = read_header(path, fd)
        if header.format == "gguf":
            raise LoadError(f"{os.path.basename(path)} is a GGUF file", "ComfyUI has no text encoders of that", STOCK)
        tensors = {name: _real_or_meta(header, fd, entry) for name, entry in header.entries.items()}
    metadata = dict(header.metadata)
    meta_model.check_formats(path, tensors, metadata)
    return _Encoder(tensors, metadata)


def _real_or_meta(header: Header, fd: int, entry: Entry) -> torch.Tensor:
    """Tokenizers come as a row of bytes; quantised weights have two dims."""
    if entry.dtype == torch.uint8 and len(entry.shape) == 1:
        return read_tensor(header, fd, entry)
    return meta_model.real_or_meta(header, fd, entry)


def _check_fits(spec: ModelSpec, clip: Any, state: dict[str, Any]) -> None:
    """ComfyUI takes a file that it does not know for CLIP-L, and leaves all of it empty.

    Raises:
        LoadError: no tensor of the file is one of the encoder's.
    """
    unknown = clip.load_sd(state)[1]
    if len(unknown) >= len(state):
        raise LoadError(
            f"ComfyUI does not recognise a text encoder in {_names(spec)}",
            "no tensor of it is one of a text encoder that ComfyUI knows",
            STOCK,
        )


def _names(spec: ModelSpec) -> str:
    return ", ".join(map(os.path.basename, spec.paths))
