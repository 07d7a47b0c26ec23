"""What modules are given and give: walked, copied, changed in one place and compared, for plans that are found."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..sequence.replaced import limit

OPTIONS = "transformer_options"
Path = tuple[Any, ...]
"""Keys and indices that lead to a leaf; ".name" is an attribute of an object."""
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments and those by name."""
LARGE = 1e9
"""What an infinity counts as in a comparison."""


def never() -> None:
    """Ends nothing."""


class Refused(Exception):
    """There is no plan: the message names the module and says why."""


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Tensors and ints in nested tuples, lists and dicts, and in the attributes of other objects.

    transformer_options are left out: what blocks take from there is compared, not cut.
    """
    if isinstance(value, torch.Tensor) or _is_int(value):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != OPTIONS:
                yield from leaves(item, (*path, key))
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
        for key, item in vars(value).items():
            if isinstance(item, torch.Tensor) or _is_int(item):
                yield (*path, "." + key), item


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def narrow(x: torch.Tensor) -> bool:
    """Whether it was rounded to fewer than 32 bits, which hides small differences."""
    return x.is_floating_point() and x.dtype not in (torch.float32, torch.float64)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def copied(value: Any, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Any:
    """The same with tensors of its own, since models write into theirs; other objects stay.

    Args:
        copy: what becomes of each tensor.
    """
    if isinstance(value, torch.Tensor):
        return copy(value)
    if type(value) in (tuple, list):
        return type(value)(copied(item, copy) for item in value)
    if type(value) is dict:
        return {key: copied(item, copy) for key, item in value.items()}
    return value


def changed(value: Any, at: Path, change: Callable[[Any], Any]) -> Any:
    """The same with one leaf changed; the value itself stays.

    Raises:
        TypeError: the leaf is an attribute of an object, which has no copy.
    """
    if not at:
        return change(value)
    if isinstance(value, dict):
        return {key: changed(item, at[1:], change) if key == at[0] else item for key, item in value.items()}
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{type(value).__name__} cannot be given with another {at[0]}")
    return type(value)([changed(item, at[1:], change) if i == at[0] else item for i, item in enumerate(value)])


def by_name(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> dict[str | int, Any]:
    """The arguments of a call by name, those of *args by position; without transformer_options."""
    names: list[str | int] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            break
        names.append(parameter.name)
    names += list(range(len(names), len(args)))
    found: dict[str | int, Any] = dict(zip(names, args, strict=False))
    found.update(kwargs)
    found.pop(OPTIONS, None)
    return found


def apart(part: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference to that of the wanted values; infinity for another shape."""
    if part.shape != wanted.shape:
        return math.inf
    if not part.numel():
        return 0.0
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    a, b = part.to(wide), wanted.to(wide)
    if not bool(b.isfinite().all()):
        # masks hold infinities
        a, b = (x.nan_to_num(nan=2 * LARGE, posinf=LARGE, neginf=-LARGE) for x in (a, b))
    difference = float((a - b).abs().square().mean().sqrt() / b.abs().square().mean().sqrt().clamp_min(1e-20))
    return math.inf if math.isnan(difference) else difference


def close(part: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether only rounding is between them; what is not floating must be equal."""
    if wanted.is_floating_point() or wanted.is_complex():
        return part.dtype == wanted.dtype and apart(part, wanted) <= limit(wanted.real)
    return torch.equal(part, wanted)
