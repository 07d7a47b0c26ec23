"""LoRAs of the Ray nodes: values in a chain, applied to a clone of the MODEL, read by the workers from their files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch

from ...loaders.source import Source
from ...raylight.errors import LoadError
from ..wire.said import kept_back
from .remote import FILE_ATTRIBUTE, RemotePatcher, on_pool

log = logging.getLogger(__name__)

APPLIED = "raylight_loras"
"""Key of the patcher's attachment that holds the LoRAs it has, in order."""
WITHOUT_VALUES = re.compile(r"\bmeta\b", re.IGNORECASE)
"""In what torch says where a tensor has no values."""


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
    before = {key: len(patches) for key, patches in clone.patches.items()}
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
    misfits = list(_misfits(clone, before))
    if len(misfits) == len(matched):
        raise LoadError(
            f"The LoRA {name} does not fit this model",
            f"the {len(matched)} weights of {type(clone.model).__name__} that it names have other shapes: {misfits[0]}",
            "Choose a LoRA that was made for this model, and not for a larger or smaller one of its family",
        )
    unused = len(tensors) - len(_used(tensors, loaded))
    if unused or misfits:
        log.warning(
            "LoRA %s fits in part: %d weights of the model are patched, %d of its %d tensors are not used%s",
            name,
            len(matched) - len(misfits),
            unused,
            len(tensors),
            f", and {len(misfits)} patches do not fit their weights: {misfits[0]}" if misfits else "",
        )
    return clone


def _misfits(patcher: RemotePatcher, before: Mapping[str, int]) -> Iterator[str]:
    """What ComfyUI says of the patches that do not fit their weights, one for each.

    It applies them to tensors without values. Where it would need these, a worker is the first to know.

    Args:
        before: how many patches of each weight, by key, are not asked about.
    """
    for key, patches in patcher.patches.items():
        known = before.get(key, 0)
        if known == len(patches):
            continue
        weight = torch.empty(patcher.shape_of(key), device="meta")
        for number, patch in enumerate(patches):
            with kept_back() as lines:
                try:
                    weight = comfy.lora.calculate_weight([patch], weight, key)
                except RuntimeError as error:  # of a patch that sets the weight; sampling will end with it
                    lines.append((logging.ERROR, str(error)))
            if number >= known and lines and not WITHOUT_VALUES.search(lines[0][1].replace(key, "")):
                yield lines[0][1]


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
