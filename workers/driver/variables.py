"""Variables of node packs' modules, of which every process has its own: whether code that is sent can do with that."""

from __future__ import annotations

import dis
import logging
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch

SETS = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL"})
LOADS = SETS | {"LOAD_GLOBAL", "LOAD_NAME"}
LEAVES = (
    *(types.NoneType, bool, int, float, complex, str, bytes, type, types.ModuleType, types.FunctionType),
    *(types.BuiltinFunctionType, numpy.ndarray, torch.Tensor, torch.dtype, torch.device, logging.Logger),
)
TABLES = (dict, list, tuple, set, frozenset)


def apart(functions: Iterable[types.FunctionType]) -> Iterator[tuple[types.FunctionType, str]]:
    """Functions, and variables of their modules that they would not find as they are in ComfyUI's process.

    A function within another is sent with a copy of what it reads, so that it misses what others set; one of a module
    is the worker's own, and misses what nodes set here.
    """
    seen: set[types.CodeType] = set()
    left = [function for function in functions if _of_pack(function.__module__)]
    while left:
        function = left.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        module = function.__globals__
        used, names = _used(function.__code__)
        sent = "<locals>" in function.__qualname__
        by_nodes, by_any = set(_set(module, nodes=True)), set(_set(module, nodes=False))
        for name in sorted(used & module.keys()):
            value = module[name]
            if name in by_nodes or (sent and (name in by_any or not _constant(value))):
                yield function, name
            left += _functions(value, names)


def _functions(value: Any, names: set[str]) -> list[types.FunctionType]:
    """Those of a pack that code with these names in it may call by a variable."""
    found = (
        [vars(value)[name] for name in names & vars(value).keys()] if isinstance(value, types.ModuleType) else [value]
    )
    return [each for each in found if isinstance(each, types.FunctionType) and _of_pack(each.__module__)]


def _of_pack(module: str | None) -> bool:
    """ComfyUI names the modules of packs by their paths."""
    return module is not None and os.path.isabs(module) and module in sys.modules


def _used(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Variables of its module that code reads or sets, and all names in it."""
    used, names = set(), set()
    for each in codes(code):
        used |= {step.argval for step in dis.get_instructions(each) if step.opname in LOADS}
        names |= set(each.co_names)
    return used, names


def _set(module: Mapping[str, Any], *, nodes: bool) -> Iterator[str]:
    """Variables that code of a module sets: the methods of its nodes, or any."""
    for value in module.values():
        if getattr(value, "__module__", None) != module.get("__name__") or (nodes and not _is_node(value)):
            continue
        for member in vars(value).values() if isinstance(value, type) else (value,):
            function = getattr(member, "__func__", member)  # of a class method
            if isinstance(function, types.FunctionType):
                for code in codes(function.__code__):
                    yield from (step.argval for step in dis.get_instructions(code) if step.opname in SETS)


def _is_node(value: Any) -> bool:
    return hasattr(value, "INPUT_TYPES") or hasattr(value, "define_schema")


def _constant(value: Any) -> bool:
    """Whether it is nothing that collects things: empty tables do."""
    if isinstance(value, (dict, list, set)) and not value:
        return False
    if isinstance(value, TABLES):
        return all(map(_constant, value.values() if isinstance(value, dict) else value))
    return isinstance(value, LEAVES)


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)
