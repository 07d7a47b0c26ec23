"""A parity case: one of ComfyUI's real model classes at a tiny width, its inputs, and how it is compared.

ComfyUI itself is imported where a model is built: in rank processes only, after `ranks.enter_comfy`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from comfy_raylight.patches.control import control_plan_for
from comfy_raylight.patches.registry import plan_for
from comfy_raylight.raylight.plan import Plan, Region, RowPlan
from comfy_raylight.tests.host.large import LARGE

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
TOLERANCE = 1e-6
"""Largest error of a family in fp32, relative to the largest value of the output."""
EVERY = ("trunk", "block", "auto", "turns", "synced", "wrapped", "kernel")
UNEQUAL = "unequal"
"""A mode of every case that is right: ranks that are not equally fast have unequal parts."""
CHOOSES_BLOCK = ("auto", "block")
TRUNK = ("trunk",)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Another dtype for every tensor with a token dim; timesteps stay, as ComfyUI passes them."""
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, dtype) for item in value)
    token_wise = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
    return value.to(dtype) if token_wise else value


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model with one set of inputs.

    Attributes:
        family: name of the model's class.
        model, make: how to build the model and its inputs; inputs are made anew for each forward.
        base: plain inputs of the same model, for the forward after one that raised.
        modes: "trunk" and "block" force a granularity, "auto" lets the engine choose; "turns",
            "synced" and "kernel" choose and switch an option on, "wrapped" is a DIFFUSION_MODEL wrapper.
        meshes: where to run it (names of `meshes.MESHES`); () is everywhere.
        all_meshes: whether it runs on all of them by default too.
        needs: (module, text): the module's source must hold the text in this ComfyUI; ("module", "") that
            the module is there.
        half: the model and its inputs in bf16, within the noise of that (`ranks.noise_of`).
        wrong: a negative control: the outputs must differ.
        loud: of a negative control: it raises instead, in some ComfyUI or in all.
        raises: the type of the error that every rank must raise.
        ring_raises: the same, where the sequence is cut over a ring.
        change: makes the plan of a negative control from the family's.
        every: whether it runs by default, and not only with RAYLIGHT_TEST_LARGE=1.
        tolerance: of its error, where it has reason to be larger.
        rounded: times the noise that is allowed in bf16; 2 where strips round by themselves, each side as much.
    """

    name: str
    family: str
    model: Callable[..., torch.nn.Module]
    make: Callable[[], Inputs]
    base: Callable[[], Inputs] | None = None
    modes: tuple[str, ...] = ("trunk", "block")
    meshes: tuple[str, ...] = ()
    all_meshes: bool = False
    needs: tuple[str, str] | None = None
    half: bool = False
    wrong: bool = False
    loud: bool = False
    raises: str = ""
    ring_raises: str = ""
    change: Callable[[Any], Any] | None = None
    tolerance: float = TOLERANCE
    every: bool = True
    rounded: int = 1

    def build(self) -> torch.nn.Module:
        """The model with its random weights."""
        return self.model(dtype=torch.bfloat16) if self.half else self.model()

    def inputs(self) -> Inputs:
        """A fresh set: models write into theirs."""
        args, kwargs = copy.deepcopy(self.make())
        return (cast(args, torch.bfloat16), cast(kwargs, torch.bfloat16)) if self.half else (args, kwargs)

    def plain(self) -> Inputs:
        """A fresh set without what makes this case special."""
        return copy.deepcopy((self.base or self.make)())

    def modes_on(self, mesh: str, size: int) -> list[str]:
        """The modes to run on a mesh; what does not depend on the number of ranks is not repeated on many."""
        if mesh == "u2":
            return list(self.modes)
        if not self.wrong and (LARGE or self.modes == EVERY):
            return [*self._on_others(size), UNEQUAL]
        return self._on_others(size)

    def _on_others(self, size: int) -> list[str]:
        once = ("auto", "synced", "wrapped", "kernel") if size < 4 else ("auto", "synced", "wrapped", "kernel", "block")
        return [mode for mode in self.modes if mode not in once] or list(self.modes[-1:])

    def plan(self, model: torch.nn.Module) -> Plan | RowPlan:
        """The family's plan, or the changed one."""
        plan = control_plan_for(model) or plan_for(model)
        return plan if self.change is None else self.change(plan)

    def available(self) -> bool:
        """Whether this ComfyUI has it."""
        if self.needs is None:
            return True
        module, text = self.needs
        try:
            return text in inspect.getsource(importlib.import_module(module))
        except ModuleNotFoundError:
            return False


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def build(path: str, rest: Mapping[str, Any] | None = None, **wanted: Any) -> torch.nn.Module:
    """The class at `path` with those of the wanted arguments that this ComfyUI knows, and random weights.

    Args:
        rest: arguments that the class takes without naming them, by its **kwargs.
    """
    import comfy.ops

    place = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    module, _, name = path.rpartition(".")
    space = importlib.import_module(module)
    cls = getattr(space, name)
    known = set(inspect.signature(cls.__init__).parameters)
    base = cls
    while "kwargs" in inspect.signature(base.__init__).parameters and base.__base__ is not torch.nn.Module:
        # it hands the rest on
        base = base.__base__
        known |= set(inspect.signature(base.__init__).parameters)
    if hasattr(space, name + "Params"):
        known |= {field.name for field in fields(getattr(space, name + "Params"))}
    model = cls(**{key: value for key, value in (place | wanted).items() if key in known}, **(rest or {}))
    return filled(model)


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random parameters; the same for every rank."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.6 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model.eval()


def patched(inputs: Callable[[], Inputs], options: Callable[[], dict[str, Any]]) -> Inputs:
    args, kwargs = inputs()
    return args, {**kwargs, "transformer_options": options()}


def override() -> dict[str, Any]:
    def user(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert "optimized_attention_override" in kwargs["transformer_options"]
        return func(*args, **kwargs) * 1.5

    return {"optimized_attention_override": user}


def backend() -> dict[str, Any]:
    """What ComfyUI's Model Attention Backend sets for "pytorch attention"."""
    from comfy.ldm.modules.attention import get_attention_function
    from comfy.model_patcher import ModelPatcher

    place = torch.device("cpu")
    patcher = ModelPatcher(torch.nn.Identity(), place, place)
    patcher.set_model_optimized_attention(get_attention_function("pytorch"))
    options: dict[str, Any] = patcher.model_options["transformer_options"]
    return options


def draws() -> dict[str, Any]:
    def user(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = func(*args, **kwargs)
        return out + torch.rand_like(out)

    return {"optimized_attention_override": user}


def skip(*blocks: tuple[str, int]) -> dict[str, Any]:
    def skipped(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return args

    return {"patches_replace": {"dit": dict.fromkeys(blocks, skipped)}}


def run_original(*blocks: tuple[str, int]) -> dict[str, Any]:
    def original(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return extra["original_block"](args)

    return {"patches_replace": {"dit": dict.fromkeys(blocks, original)}}


def without(plan: Plan, *, shared: str = "", attention: bool = True, head: bool = True) -> Plan:
    """The plan with something forgotten in every region."""
    regions = []
    for region in plan.regions:
        lists = []
        for blocks in region.blocks:
            kept = {name: entry for name, entry in blocks.shared.items() if name != shared}
            forgetful = replace(blocks, shared=kept)
            lists.append(forgetful if attention else replace(forgetful, attention=()))
        leave = region.exit if head or region.exit is None else replace(region.exit, shared={})
        regions.append(Region(*lists, exit=leave, whole=region.whole, parts=region.parts, per_block=region.per_block))
    return Plan(*regions, block_patches=plan.block_patches)
