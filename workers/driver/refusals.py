"""What cannot cross to the workers correctly: found before sampling and refused by name, never ignored."""

from __future__ import annotations

import dis
import functools
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import comfy.model_base
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ...raylight.errors import UnsupportedError
from ...raylight.names import functions, name_of
from .reaching import WRAPPER, check_variables, reaches

COMPILE_KEY = "torch.compile"
"""Wrapper key of `comfy_api.torch_helpers.set_torch_compile_wrapper`."""
INSIDE = ("patches", "patches_replace", "optimized_attention_override")
"""Entries of transformer_options whose callables run inside the model."""
COMPILED = ("_orig_mod", "_torchdynamo_orig_callable")
"""Attributes of the modules and functions that torch.compile returns."""
WHOLE = ("diffusion_model", "diffusion_model.__class__", "diffusion_model.forward")
"""Object patches of the whole diffusion model: its forward pads, and calls wrappers, in the driver."""
OTHER_LOADER = "Remove the node, or use ComfyUI's own loader (Load Diffusion Model) in this workflow"
"""What can be done about most nodes."""
DRIVER_FUNCTIONS = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    WRAPPER,
    "denoise_mask_function",
)
"""Entries of model_options whose callables run around the model, in the driver."""
FILLED = {"animate2_cache": "WanAnimate2Cache", "ar_state": "The sampler ar_video"}
"""Entries of transformer_options that the model fills for its next calls, and who puts them there."""
HARMLESS = (
    types.NoneType,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    tuple,
    frozenset,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    logging.Logger,
    torch.dtype,
    torch.device,
    torch.Tensor,
    torch.nn.Module,
    comfy.model_patcher.ModelPatcher,
)
"""Contents of a shared closure cell that the model's side does not change for the driver's side to see."""

SETS = ("STORE_DEREF", "DELETE_DEREF")
"""Instructions that change a variable of a function around."""


def check(patcher: Any) -> None:
    """Refuse a patcher whose patches would come apart between driver and workers.

    Raises:
        UnsupportedError: injections, weight wrappers, compiled models, or a patch inside the model that
            writes what a function around it reads, or what it does not read itself.
    """
    if patcher.injections:
        _refuse(
            ", ".join(map(str, patcher.injections)),
            "it replaces modules of the model in this process, whose weights are on the workers",
        )
    if getattr(patcher, "weight_wrapper_patches", None):
        _refuse(
            ", ".join(patcher.weight_wrapper_patches), "it wraps weights in this process, and they are on the workers"
        )
    kinds = comfy.patcher_extension.WrappersMP
    options = patcher.model_options.get("transformer_options", {})
    for wrappers in (patcher.wrappers, options.get("wrappers", {})):
        if COMPILE_KEY in wrappers.get(kinds.APPLY_MODEL, {}):
            _refuse_compiled("TorchCompileModel")
    inside = list(functions({key: options[key] for key in INSIDE if key in options}))
    around = [key for key in DRIVER_FUNCTIONS if key in patcher.model_options]
    sent = [patcher.model_options[key] for key in around if key == WRAPPER and reaches(patcher.model_options[key])]
    outside = list(functions([patcher.model_options[key] for key in around if patcher.model_options[key] not in sent]))
    outside += list(functions(patcher.wrappers)) + list(functions(patcher.callbacks))
    check_shared_state(inside + sent, outside)
    for function in sent:
        check_variables(function)
    check_outlets(inside)


def check_objects(patches: Mapping[str, Any]) -> None:
    """Refuse object patches, by name, that compile something or take the place of the whole diffusion model."""
    if any(hasattr(value, mark) for value in patches.values() for mark in COMPILED):
        _refuse_compiled("torch.compile")
    for name in WHOLE:
        if name in patches:
            _refuse(name_of(patches[name]), f"it takes the place of {name}, half of which runs in this process")


def check_shared_state(inside: list[Callable[..., Any]], outside: list[Callable[..., Any]]) -> None:
    """Refuse functions inside the model that share changing state with functions around it.

    The first run in the workers, the second here: each side would see a copy of its own.
    """
    driver_cells = {id(cell) for function in outside for cell, _, _ in _cells(function, set())}
    driver_states = {id(state) for function in outside for state, _ in _states(function, "", set())}
    for function in inside:
        for state, name in _states(function, "", set()):
            if id(state) in driver_states:
                _refuse_shared(function, name)
        for cell, holder, name in _cells(function, set()):
            if id(cell) in driver_cells and (_writes(holder, name) or not _harmless(cell)):
                _refuse_shared(function, name)


def check_outlets(inside: list[Callable[..., Any]]) -> None:
    """Refuse functions inside the model that set variables and never look at them.

    They are for code of this process that is no part of the MODEL, and would stay as they are.
    """
    found = [(function, *reached) for function in inside for reached in _cells(function, set())]
    looked_at = {id(cell) for _, cell, holder, name in found if _reads(holder, name)}
    for function, cell, holder, name in found:
        if id(cell) not in looked_at and _writes(holder, name):
            _refuse(name_of(function), f"its patch inside the model sets {name!r} for code in another process")


def _refuse_compiled(name: str) -> NoReturn:
    _refuse(
        name,
        "it compiles the model in this process, and the model runs on the workers",
        "Use Torch Compile Model (Ray) in its place",
    )


def _refuse_shared(function: object, name: str) -> NoReturn:
    _refuse(
        name_of(function),
        f"its patch inside the model shares {name!r} with a function outside of it, in another process",
    )


def refuse_foreign_model(value: object) -> NoReturn:
    """A patch that holds a model of its own, such as a ControlNet-like MODEL_PATCH."""
    model = value.model if isinstance(value, comfy.model_patcher.ModelPatcher) else value
    _refuse(type(model).__name__, "a patch inside the model holds another model, whose weights would have to be sent")


def refuse_replacing(value: object, name: str) -> NoReturn:
    """Something that a node puts in the place of an attribute of the diffusion model, without a patch."""
    known = isinstance(value, (type, types.FunctionType, types.MethodType))
    _refuse(
        name_of(value) if known else f"A node that replaces {name}",
        f"it takes the place of {name} of the model in this process, and the model runs on the workers",
        "Remove the node and free ComfyUI's model and node cache, or use its own loader (Load Diffusion Model) in this "
        "workflow; where the node skips steps, ComfyUI's EasyCache and TeaCache (Ray) do that on the pool",
    )


def refuse_saving() -> NoReturn:
    raise UnsupportedError(
        "A model on the pool cannot be saved, and no LoRA be taken from it",
        "its weights are on the workers",
        "Load it with ComfyUI's own loader (Load Diffusion Model) for that",
    )


def refuse_copying() -> NoReturn:
    raise UnsupportedError(
        "A model on the pool cannot be copied with its weights, as a node does here",
        "its weights are on the workers",
        OTHER_LOADER,
    )


def refuse_training() -> NoReturn:
    raise UnsupportedError(
        "A model on the pool cannot be trained",
        "its weights are on the workers, without gradients",
        "Load it with ComfyUI's own loader (Load Diffusion Model) to train a LoRA",
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse entries of transformer_options that the model is to fill: this process never sees what is in them."""
    for key in FILLED.keys() & options.keys():
        _refuse(FILLED[key], "the model keeps what it has computed there for its next calls, and it is on the workers")


def refuse_another_device() -> NoReturn:
    """Core's nodes that give a model, or a copy of it, to another device of this process."""
    _refuse(
        "MultiGPU CFG Split, or Select Model Device,",
        "it loads the model on another device of this process, and the devices of the pool are its workers'",
        "Remove the node: cfg_degree of Ray Init Actor computes conditions on several devices at once, and gpu_indices "
        "says on which",
    )


def _refuse(
    name: str,
    why: str,
    remedy: str = OTHER_LOADER,
) -> NoReturn:
    raise UnsupportedError(f"{name} cannot be used with a model on the Raylight pool", why, remedy)


def _cells(function: Any, seen: set[int]) -> Iterator[tuple[types.CellType, types.FunctionType, str]]:
    """Every closure cell a function can reach through the functions it closes over."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return
    seen.add(id(function))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield cell, function, name
        if not _empty(cell):
            yield from _cells(cell.cell_contents, seen)


def _states(value: Any, name: str, seen: set[int]) -> Iterator[tuple[object, str]]:
    """Changeable objects a callable can reach, with the names it has for them: what its cells hold, the object
    of a method, a callable object and its attributes, the arguments of a partial."""
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(value, types.MethodType):
        parts = [("self", value.__self__), (name, value.__func__)]
    elif isinstance(value, functools.partial):
        parts = [(name, value.func), *((name, item) for item in value.args), *value.keywords.items()]
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        parts = [(key, cell.cell_contents) for key, cell in cells if not _empty(cell)]
    elif not isinstance(value, HARMLESS):
        yield value, name or type(value).__name__
        parts = getattr(value, "__dict__", {}).items()
    for key, part in parts:
        yield from _states(part, key, seen)


def _empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _writes(function: types.FunctionType, name: str) -> bool:
    return any(step.opname in SETS and step.argval == name for step in dis.get_instructions(function))


def _reads(function: types.FunctionType, name: str) -> bool:
    """Whether it looks at a variable, or hands it on to a function that it makes."""
    steps = (step for step in dis.get_instructions(function) if step.opname not in SETS)
    return any(name in (step.argval if isinstance(step.argval, tuple) else (step.argval,)) for step in steps)


def _harmless(cell: types.CellType) -> bool:
    return _empty(cell) or isinstance(cell.cell_contents, HARMLESS)
