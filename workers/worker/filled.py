"""Finds what a model call leaves in its options for the next one: that is on the worker, and gets lost."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import cloudpickle
import torch

from ...raylight.errors import UnsupportedError
from ...raylight.names import is_options, is_patch

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.device)
"""What a call cannot change, or, of tensors, what costs too much to compare."""
State = list[tuple[str, Any, bytes]]


def state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> State:
    """What transformer_options hold before a call: dicts, lists and objects, by key; functions live for a run."""
    return [
        (key, value, _digest(value))
        for options in _options(args, kwargs)
        for key, value in options.items()
        if not isinstance(value, PLAIN) and not is_patch(value)
    ]


def check(before: State) -> None:
    """Refuse a call that has changed something that its options held before.

    Raises:
        UnsupportedError: the next call would begin without it, where plain ComfyUI's has it.
    """
    for key, value, digest in before:
        if _digest(value) != digest:
            raise UnsupportedError(
                f"Something of the model, or of a node, changes transformer_options[{key!r}] inside of a model call",
                f"{type(value).__name__} was filled on the workers, and the next call would begin without that",
                "Remove the node, or use ComfyUI's own loader (Load Diffusion Model) in this workflow",
            )


def _options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    named = kwargs.get("transformer_options")
    yield from (value for value in args if is_options(value))
    if isinstance(named, dict):
        yield named


class _Outline(cloudpickle.Pickler):
    """Pickles what a value consists of; tensors, functions and modules are told apart by identity."""

    def persistent_id(self, obj: object) -> int | None:
        return id(obj) if is_patch(obj) or isinstance(obj, (torch.Tensor, torch.nn.Module)) else None


def _digest(value: Any) -> bytes:
    """Equal for a value that still holds the same."""
    file = io.BytesIO()
    try:
        _Outline(file, protocol=5).dump(value)
    except Exception:  # what objects of other packs raise is open; it came here pickled
        return b""
    return file.getvalue()
