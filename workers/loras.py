"""LoRAs of the Ray nodes: values in a chain, applied to a clone of the MODEL, read by the workers from their files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch

from ..loaders.source import Source
from ..raylight.errors import LoadError
from .remote import FILE_ATTRIBUTE, RemotePatcher, on_pool

log = logging.getLogger(__name__)

APPLIED = "raylight_loras"
"""Key of the patcher's attachment that holds the LoRAs it has, in order."""


@dataclass(frozen=True, eq=False)
class Lora:
    """One use of a LoRA file in a workflow.

    Two uses of the same file at the same strength are two: they are told apart by identity, so that a chain
    that reaches a model on two ways is applied to it once.
    """

    path: str
    strength: float


Chain = tuple[Lora, ...]
"""What a RAY_LORA wire carries."""


def with_loras(model: Any, chain: Chain) -> RemotePatcher:
    """A clone of a MODEL on the pool with the LoRAs of a chain that it does not have yet, in their order.

    Raises:
        ConfigError: the model is not on the pool.
        LoadError: a file is damaged, or nothing in it fits the model.
    """
    patcher = on_pool(model)
    for lora in chain:
        applied: Chain = patcher.get_attachment(APPLIED) or ()
        if any(lora is other for other in applied):
            continue
        patcher = _with_lora(patcher, lora)
        patcher.set_attachments(APPLIED, (*applied, lora))
    return patcher


def _with_lora(patcher: RemotePatcher, lora: Lora) -> RemotePatcher:
    clone: RemotePatcher = patcher.clone()
    if lora.strength == 0:
        return clone
    tensors = comfy.lora_convert.convert_lora(_tensors(lora.path))
    keys = comfy.lora.model_lora_keys_unet(clone.model, {})
    loaded = comfy.lora.load_lora(tensors, keys, log_missing=False)
    matched = clone.add_patches(loaded, lora.strength)
    name = os.path.basename(lora.path)
    if not matched:
        raise LoadError(
            f"The LoRA {name} does not fit this model",
            f"none of its {len(tensors)} tensors belongs to a weight of {type(clone.model).__name__}",
            "Choose a LoRA that was made for this family of models",
        )
    unused = len(tensors) - len(_used(tensors, loaded))
    if unused:
        log.warning(
            "LoRA %s fits in part: %d weights of the model are patched, %d of its %d tensors are not used",
            name,
            len(matched),
            unused,
            len(tensors),
        )
    return clone


def _tensors(path: str) -> dict[str, torch.Tensor]:
    """A file's tensors, mapped, each with the name workers find it under."""
    source = Source(path)
    for name, tensor in source.tensors.items():
        setattr(tensor, FILE_ATTRIBUTE, source.ref(name))
    return dict(source.tensors)


def _used(tensors: Mapping[str, torch.Tensor], loaded: Mapping[str, Any]) -> set[str]:
    """The names of a file's tensors that some patch was made of."""
    names: set[str] = set()
    identities = {id(tensor): name for name, tensor in tensors.items()}
    for patch in loaded.values():
        names |= set(getattr(patch, "loaded_keys", ()))
        values: Sequence[Any] = patch[1] if isinstance(patch, tuple) else ()
        names |= {identities[id(value)] for value in values if id(value) in identities}
    return names & set(tensors)
