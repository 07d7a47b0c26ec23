"""Layers of a model on the pool for nodes that call them, patch them or look at their weights in ComfyUI's process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.model_patcher
import torch
from torch import nn

from ...loaders.source import Source
from ...raylight.config import ModelSpec
from ..mapping.adopt import Home, adopt
from ..mapping.gguf_ops import BlockPatch, Blocks
from ..mapping.loading import normal_tensors
from ..mapping.mapped_patcher import is_blocks, patch_dtype
from ..wire.messages import PREFIX
from ..wire.pickling import Weight
from ..wire.said import Told

CPU = torch.device("cpu")
PatchesOf = Callable[[str], list[Any]]
"""Says which patches a weight has at the moment, by its key."""


def marked(model: nn.Module, spec: ModelSpec, rpc: Any, *, prefix: str = PREFIX) -> nn.Module:
    """A model on the pool whose modules and weights say what they are on the workers: `raylight_place` of modules,
    `raylight_source` and `raylight_rpc` of weights, with `raylight_version`, by which one that was written into is
    told."""
    for name, module in model.named_modules():
        module.raylight_place = (spec, name)  # type: ignore[assignment]
    for key, parameter in model.state_dict(keep_vars=True).items():
        parameter.raylight_source = (spec, prefix + key)
        parameter.raylight_rpc = rpc
        parameter.raylight_version = _version_of(parameter)
    return model


class Layers:
    """The diffusion model of a file, whose memory its weights are: what is not used is not read.

    A weight that is patched at the moment is what ComfyUI's patcher makes of it, and is made whenever it is read, since
    all of them would be another copy of the model. One that is not is the file's memory.

    Raises:
        LoadError: the file changed.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, rpc: Any, patches_of: PatchesOf) -> None:
        with normal_tensors(), rpc.told.here(loading=True):
            adopted = adopt(Source.of(spec), spec, dtype)
        self.model = marked(adopted.patcher.model.diffusion_model, spec, rpc)
        self._classes = {name: type(module) for name, module in self.model.named_modules()}
        by_module: dict[nn.Module, dict[str, _Weight]] = {}
        for key, home in adopted.homes.items():
            weight = _Blocks(key, home, rpc.told, spec, dtype) if is_blocks(home) else _Weight(key, home, rpc.told)
            by_module.setdefault(home.module, {})[home.name] = weight
            if type(weight.bare) is nn.Parameter:
                weight.bare.__class__ = Weight
        for module, weights in by_module.items():
            module.__dict__["_parameters"] = _Parameters(module._parameters, weights, patches_of)
            if getattr(module, "quant", ""):
                module.quant = ""  # type: ignore[assignment]  # to itself it has a plain weight

    def replaced(self) -> Iterator[tuple[str, object]]:
        """What has been put in the place of modules, of their classes, of their methods and of the values of weights,
        by its dotted name."""
        for name, module in self.model.named_modules():
            place = place_of(module)
            if place is None:
                yield name, module
            elif type(module) is not self._classes[place[1]]:
                yield f"{name}.__class__", type(module)
            buffers = ((key, buffer) for key, buffer in module._buffers.items() if hasattr(buffer, "raylight_source"))
            for key, tensor in itertools.chain(_bare(module), buffers):
                if tensor is not None and is_written(tensor):
                    yield f"{name}.{key}", tensor
            for attribute, value in vars(module).items():
                usual = getattr(type(module), attribute, None)
                if callable(usual) and getattr(value, "__func__", value) is not usual:
                    yield f"{name}.{attribute}", value


def is_written(tensor: torch.Tensor) -> bool:
    """Whether something has written into a tensor of a file or a model since it got its name on the workers."""
    return _version_of(tensor) != getattr(tensor, "raylight_version", 0)


def _version_of(tensor: torch.Tensor) -> int:
    """How often that was so of the tensor, or of what shares its memory; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def place_of(value: object) -> tuple[Any, ...] | None:
    """The spec and name of a module of a diffusion model on the pool; None for all others."""
    place: tuple[Any, ...] | None = vars(value).get("raylight_place") if isinstance(value, nn.Module) else None
    return place


class _Parameters(dict[str, Any]):
    """The parameters of a module, each as it is at the moment when it is read."""

    def __init__(self, bare: Mapping[str, Any], weights: Mapping[str, _Weight], patches_of: PatchesOf) -> None:
        super().__init__(bare)
        self._weights = dict(weights)
        self._patches_of = patches_of

    def __setitem__(self, name: str, value: Any) -> None:
        """What a node puts there, or has moved, is that."""
        self._weights.pop(name, None)
        super().__setitem__(name, value)

    def __getitem__(self, name: str) -> Any:
        bare = super().__getitem__(name)
        weight = self._weights.get(name)
        if weight is None:
            return bare
        patches = self._patches_of(weight.key)
        return weight.patched(patches) if patches else weight.bare

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return ((name, self[name]) for name in self)

    def bare(self) -> Iterator[tuple[str, Any]]:
        """Each without patches; None where a layer has none."""
        for name in self:
            weight = self._weights.get(name)
            yield name, super().__getitem__(name) if weight is None else weight.bare

    def __reduce__(self) -> Any:
        """A copy is of what it is at the moment."""
        return dict, (dict(self.items()),)


def _bare(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parameters of a module without patches: those that are patched are others whenever they are read."""
    own = module._parameters
    return own.bare() if isinstance(own, _Parameters) else iter(own.items())


class _Weight:
    """A parameter of a layer.

    Attributes:
        key: in the BaseModel.
        bare: without patches.
    """

    def __init__(self, key: str, home: Home, told: Told) -> None:
        self.key = key
        self._told = told
        self.bare: Any = home.parameter
        self._name = home.name
        self._dtype = home.dtype
        # as the layer is before its parameters are others when they are read
        self._module = copy.copy(home.module)
        self._module.__dict__["_parameters"] = dict(home.module._parameters)

    def patched(self, patches: list[Any]) -> torch.Tensor:
        """What ComfyUI's patcher makes of it."""
        with normal_tensors(), self._told.here(loading=False):
            layer = copy.copy(self._module)
            layer.__dict__["_parameters"] = dict(self._module._parameters)
            bare = self.bare.data if isinstance(self.bare, Weight) else self.bare
            if self._dtype is not None or bare is not self.bare:
                dtype = self._dtype or bare.dtype
                layer._parameters[self._name] = nn.Parameter(bare.to(dtype), requires_grad=False)
            # under its own key, which stochastic rounding begins with
            patcher = comfy.model_patcher.ModelPatcher(_alone(layer, self.key.split(".")[:-1]), CPU, CPU)
            patcher.patches = {self.key: patches}
            patcher.patch_weight_to_device(self.key)
            found: torch.Tensor = getattr(layer, self._name)
            return found


class _Blocks(_Weight):
    """One of a GGUF file, quantised: with the weight's shape and type, and dequantised by what computes with it."""

    def __init__(self, key: str, home: Home, told: Told, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__(key, home, told)
        layer: Any = home.module
        self.bare = Blocks(home.tensor, layer.quant, layer.whole_shape, dtype)
        # what it is on the workers
        vars(self.bare).update(vars(home.parameter), raylight_version=_version_of(self.bare))
        self._computed = patch_dtype(spec)

    def patched(self, patches: list[Any]) -> torch.Tensor:
        with normal_tensors(), self._told.here(loading=False):
            return BlockPatch(self.key, patches, self._computed)(self.bare.whole())


def _alone(layer: nn.Module, path: list[str]) -> nn.Module:
    """A model in which there is nothing but a layer, at its place."""
    for name in reversed(path):
        outer = nn.Module()
        outer.add_module(name, layer)
        layer = outer
    return layer
