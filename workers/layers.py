"""Layers of a model on the pool for nodes that call them, patch them or look at their weights in ComfyUI's process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..loaders.source import Source
from ..raylight.config import ModelSpec
from .adopt import adopt
from .loading import normal_tensors
from .messages import PREFIX


def marked(model: nn.Module, spec: ModelSpec, link: Any) -> nn.Module:
    """A diffusion model whose modules and weights say what they are on the workers: `raylight_place` of modules,
    `raylight_source` and `raylight_link` of weights."""
    for name, module in model.named_modules():
        module.raylight_place = (spec, name)  # type: ignore[assignment]
    for key, parameter in model.state_dict(keep_vars=True).items():
        parameter.raylight_source = (spec, PREFIX + key)
        parameter.raylight_link = link
    return model


class Layers:
    """The diffusion model of a file, whose memory its weights are: what is not used is not read. They have no patches.

    Raises:
        LoadError: the file changed.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, link: Any) -> None:
        with normal_tensors():
            self.model = marked(adopt(Source.of(spec), spec, dtype).patcher.model.diffusion_model, spec, link)
        self._classes = {name: type(module) for name, module in self.model.named_modules()}

    def replaced(self) -> Iterator[tuple[str, object]]:
        """What has been put in the place of modules, of their classes and of their methods, by its dotted name."""
        for name, module in self.model.named_modules():
            place = place_of(module)
            if place is None:
                yield name, module
            elif type(module) is not self._classes[place[1]]:
                yield f"{name}.__class__", type(module)
            for attribute, value in vars(module).items():
                usual = getattr(type(module), attribute, None)
                if callable(usual) and getattr(value, "__func__", value) is not usual:
                    yield f"{name}.{attribute}", value


def place_of(value: object) -> tuple[Any, ...] | None:
    """The spec and name of a module of a diffusion model on the pool; None for all others."""
    place: tuple[Any, ...] | None = vars(value).get("raylight_place") if isinstance(value, nn.Module) else None
    return place
