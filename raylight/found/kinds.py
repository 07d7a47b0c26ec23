"""What tells kinds of calls apart: a plan that was proved for one kind may be wrong for another.

A kind is all of a call but its sizes and values: which arguments there are, how they are nested, their dims and dtypes,
which dims are one, and what is said by plain values. Nothing here looks at what a tensor holds, so it costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from ..sequence.slots import Slot
from .values import OPTIONS, Inputs

CONDITIONS = "cond_or_uncond"
PER_CALL = ("sigmas", "sample_sigmas", "uuids", CONDITIONS)
"""Entries of transformer_options that ComfyUI's sampling puts into every call."""
Form = tuple[Any, ...]
"""What a block is given, but for its sizes: by argument."""


def kind_of(inputs: Inputs) -> Hashable:
    """The kind of a call; equal on all ranks that are given the same."""
    args, kwargs = inputs
    return _kind(args), _kind(kwargs)


def sizes_of(inputs: Inputs) -> Hashable:
    """All sizes and whole numbers of a call, and for which conditions it is; not what counts steps."""
    found: list[Hashable] = []

    def add(value: Any, options: bool = False) -> None:
        if isinstance(value, torch.Tensor):
            found.append(tuple(value.shape))
        elif isinstance(value, (tuple, list)):
            for item in value:
                add(item, options)
        elif isinstance(value, dict):
            inside = options or _is_options(value)
            for key, item in value.items():
                if key == CONDITIONS:
                    found.append(tuple(item))
                elif key not in PER_CALL:
                    add(item, inside or key == OPTIONS)
        elif isinstance(value, int) and not options:
            found.append(value)

    add(inputs)
    return tuple(found)


def _is_options(value: dict[Any, Any]) -> bool:
    return any(key in value for key in PER_CALL)


def _kind(value: Any, options: bool = False) -> Hashable:
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), tuple(size == 1 for size in value.shape)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(_kind(item, options) for item in value)
    if isinstance(value, dict):
        inside = options or _is_options(value)
        items = [
            (str(key), _kind(item, inside or key == OPTIONS)) for key, item in value.items() if key not in PER_CALL
        ]
        return "dict", tuple(sorted(items, key=lambda item: item[0]))
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        # code asks whether something is there at all, or counts for nothing; in options nodes count steps
        return type(value).__name__, value if value in (0, 1) and not options else "other"
    return type(value).__module__, type(value).__qualname__


class Forms:
    """The form of what one block is given.

    Args:
        streams: its arguments that are cut. Their sizes differ from rank to rank, and a form must not.
    """

    def __init__(self, module: nn.Module, streams: tuple[str | int, ...]) -> None:
        self._names: list[str] = []
        for parameter in inspect.signature(module.forward).parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                break
            self._names.append(parameter.name)
        self._streams = set(map(str, streams))

    def __call__(self, args: Any, kwargs: dict[str, Any]) -> Form:
        named = {self._names[at] if at < len(self._names) else str(at): value for at, value in enumerate(args)}
        named.update(kwargs)
        return tuple(
            (name, self._form(value, name))
            for name, value in sorted(named.items())
            if value is not None and name != OPTIONS
        )

    def _form(self, value: Any, path: str) -> Hashable:
        if isinstance(value, torch.Tensor):
            kind = "float" if value.is_floating_point() or value.is_complex() else str(value.dtype)
            if path in self._streams:
                return kind, value.ndim
            return kind, tuple(size == 1 for size in value.shape)
        if isinstance(value, (tuple, list)):
            return type(value).__name__, tuple(self._form(item, f"{path}.{at}") for at, item in enumerate(value))
        if isinstance(value, dict):
            return tuple(sorted((str(key), self._form(item, f"{path}.{key}")) for key, item in value.items()))
        return value if value is None or isinstance(value, (bool, str)) else type(value).__name__


def normal(function: Any, inputs: Inputs) -> Inputs:
    """The same call with all but the first argument by name, where the function has names for them.

    transformer_options are then told from what is cut by their name.
    """
    args, kwargs = inputs
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            break
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            names.append(parameter.name)
    if len(names) < len(args) or Slot.find(function, OPTIONS) is None:
        return inputs
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
