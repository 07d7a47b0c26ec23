"""The functions that users' nodes put into a model's options, and what users know them by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def is_patch(value: object) -> bool:
    """Whether a value inside transformer_options is a function that runs inside the model."""
    return callable(value) and not isinstance(value, type)


def is_options(value: Any) -> bool:
    """Whether an argument is transformer_options: ComfyUI's sampling always puts these in."""
    return isinstance(value, dict) and ("cond_or_uncond" in value or "sigmas" in value)


def on_options(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model call with `change` applied to transformer_options, wherever the family passes them."""
    changed = {key: change(value) if key == "transformer_options" else value for key, value in kwargs.items()}
    return tuple(change(value) if is_options(value) else value for value in args), changed


def functions(value: Any) -> Iterator[Callable[..., Any]]:
    """The callables in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        for item in value.values():
            yield from functions(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from functions(item)
    elif is_patch(value):
        yield value


def name_of(function: object) -> str:
    """The node a patch comes from, as far as its code tells."""
    target = function if hasattr(function, "__qualname__") else type(function)
    outer = str(getattr(target, "__qualname__", target)).split(".")[0]
    module = str(getattr(target, "__module__", "")).replace("\\", "/").rsplit("/", 1)[-1]
    return f"{outer} ({module})" if module else outer
