"""A plan that was found as plain data, as JSON has it, and back: only of what plans that are found consist of."""

from __future__ import annotations

from typing import Any

from ..cuts import Index, PerFrame, Replicated, Split
from ..plan import Blocks, Plan, Region, Site, Whole
from .cuts import Count, Counted, Nested, Same

VARIADIC = (Count, Index)
"""Entries that are made of names."""
FIELDS: dict[type, tuple[str, ...]] = {
    PerFrame: ("dim", "over", "ndim"),
    Replicated: ("dim", "name"),
    Counted: ("dim", "name"),
    Site: ("at", "order", "also", "replicated_query"),
    Whole: ("at", "arg", "stream"),
    Same: (),
}
KINDS = {kind.__name__: kind for kind in (Split, Nested, Blocks, Plan, Region, *VARIADIC, *FIELDS)}


def to_data(value: Any) -> Any:
    """Lists, dicts and plain values.

    Raises:
        TypeError: the plan has something that no plan has that was found.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [to_data(item) for item in value]
    name, kind = type(value).__name__, type(value)
    if kind in VARIADIC:
        return {name: list(value.over)}
    if kind in FIELDS:
        return {name: {field: to_data(getattr(value, field)) for field in FIELDS[kind]}}
    if kind is Split:
        return {name: {"dim": value.dim, "over": list(value.over), "grid": value.grid}}
    if kind is Nested:
        return {name: {"entries": to_data(value.entries), "form": to_data(value.form)}}
    if kind is Blocks:
        return {
            name: {
                "at": value.at,
                "streams": [[key, to_data(stream)] for key, stream in value.streams.items()],
                "shared": [[key, to_data(entry)] for key, entry in value.shared.items()],
                "outputs": to_data(value.outputs),
                "attention": to_data(value.attention),
                "order": list(value.order),
            }
        }
    if kind is Region:
        return {name: {"blocks": to_data(value.blocks), "whole": to_data(value.whole), "per_block": value.per_block}}
    if kind is Plan:
        return {name: to_data(value.regions)}
    raise TypeError(f"{name} is no part of a plan that was found")


def from_data(data: Any) -> Any:
    """What `to_data` was given.

    Raises:
        ValueError, TypeError, KeyError: the data is nothing that it makes.
    """
    if data is None or isinstance(data, (bool, int, str)):
        return data
    if isinstance(data, list):
        return tuple(map(from_data, data))
    ((name, held),) = data.items()
    kind: Any = KINDS[name]
    if kind in VARIADIC:
        return kind(*map(str, held))
    if kind is Split:
        return Split(int(held["dim"]), *map(str, held["over"]), grid=int(held["grid"]))
    if kind is Nested:
        return Nested({from_data(path): from_data(entry) for path, entry in held["entries"]}, *from_data(held["form"]))
    if kind is Blocks:
        pairs: dict[str, Any] = {
            part: {key: from_data(value) for key, value in held[part]} for part in ("streams", "shared")
        }
        rest: dict[str, Any] = {part: from_data(held[part]) for part in ("outputs", "attention", "order")}
        return Blocks(at=str(held["at"]), **pairs, **rest)
    if kind is Region:
        return Region(*from_data(held["blocks"]), whole=from_data(held["whole"]), per_block=bool(held["per_block"]))
    if kind is Plan:
        return Plan(*from_data(held))
    return kind(**{field: from_data(held[field]) for field in FIELDS[kind]})
