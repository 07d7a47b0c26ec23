"""Functions of nodes around a model call that reach into the model: told by what they hold, and sent with the call."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import comfy.model_base
import comfy.model_patcher
import torch

from ...raylight.errors import UnsupportedError
from ...raylight.names import name_of
from .layers import place_of
from .variables import apart, codes

KEY = "raylight_reaching"
WRAPPER = "model_function_wrapper"
"""Key of model_options: a node's function that ComfyUI has call the model in its place."""
OWNERS = (comfy.model_patcher.ModelPatcher, comfy.model_base.BaseModel)
"""What has more than the model's layers: on the workers it is not what it is here."""
ASSIGNS = frozenset({"setattr", "delattr", "patch"})
"""Names in the code of functions that put something into an object for a time: "patch" is unittest.mock's."""
STORES = frozenset({"STORE_ATTR", "DELETE_ATTR"})


def calc_cond_batch(  # noqa: PLR0917, the signature is ComfyUI's
    executor: Any,
    model: Any,
    conds: list[Any],
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> Any:
    """CALC_COND_BATCH wrapper: a function that reaches into the model is not called here, but sent with the call."""
    function = model_options.get(WRAPPER)
    if function is None or not reaches(function):
        return executor(model, conds, x_in, timestep, model_options)
    rpc = model.diffusion_model.rpc
    if rpc.config.parallel.degrees["cfg"] > 1:
        raise UnsupportedError(
            f"{name_of(function)} cannot be used with cfg_degree above 1",
            "it keeps things of all conditions in the model, and each group of workers has a model of its own",
            "Set cfg_degree to 1 (ulysses_degree can have the workers), or use ComfyUI's EasyCache or TeaCache (Ray)",
        )

    def send(apply_model: Any, arguments: dict[str, Any]) -> Any:
        with rpc.wrapping(function, arguments):
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    return executor(model, conds, x_in, timestep, {**model_options, WRAPPER: send})


def reaches(function: Any) -> bool:
    """Whether a function holds a model on the pool, or layers of it, and has code that puts something there.

    One that holds the MODEL itself is none: what it may ask that for is only here.
    """
    held = list(_held(function, set()))
    if any(isinstance(value, OWNERS) for value in held):
        return False
    return any(map(_of_model, held)) and any(map(_assigns, held))


def check_variables(function: Any) -> None:
    """Refuse a function with variables of a module that are others on the workers."""
    held = (value for value in _held(function, set()) if isinstance(value, types.FunctionType))
    for code, name in apart(held):
        raise UnsupportedError(
            f"{name_of(function)} cannot be used with a model on the Raylight pool",
            f"{code.__qualname__} has {name!r} in its module, and each process has one of its own",
            "Remove the node; where it skips steps, ComfyUI's EasyCache and TeaCache (Ray) do that on the pool",
        )


def _of_model(value: Any) -> bool:
    return isinstance(value, torch.nn.Module) and ("_meta" in vars(value) or place_of(value) is not None)


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """A value, and what it holds: closures, defaults, arguments of partials, attributes, members."""
    if id(value) in seen or isinstance(value, (type, types.ModuleType, torch.Tensor)):
        return
    seen.add(id(value))
    yield value
    if isinstance(value, OWNERS) or _of_model(value):
        return
    parts: list[Any] = []
    if isinstance(value, types.MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        parts = [cell.cell_contents for cell in value.__closure__ or () if not _empty(cell)]
        parts += [value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif hasattr(value, "__dict__"):
        parts = [vars(value), *(part for part in vars(type(value)).values() if isinstance(part, types.FunctionType))]
    for part in parts:
        yield from _held(part, seen)


def _assigns(value: Any) -> bool:
    """Whether it puts something into objects, or holds what does."""
    if isinstance(value, mock._patch):
        return True
    return isinstance(value, types.FunctionType) and any(map(_stores, codes(value.__code__)))


def _stores(code: types.CodeType) -> bool:
    if ASSIGNS & set(code.co_names):
        return True
    # what a method does to its own object is no matter of the model
    own = code.co_argcount > 0 and code.co_varnames[0] == "self"
    return not own and any(step.opname in STORES for step in dis.get_instructions(code))


def _empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False
