"""A node that changes the inside of a model, in a module that registers a page with ComfyUI's server."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any
from unittest import mock

import torch
from aiohttp import web
from server import PromptServer

CATEGORY = "raylight/test"


@PromptServer.instance.routes.get("/raylight-test/inside")
async def page(request: Any) -> Any:
    """Is not asked for: registering it is what matters."""
    return web.Response()


def forward_of(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What the module's class does, whatever the instance does."""
    return type(self).forward(self, *args, **kwargs)


def louder(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A feed forward, each token by itself."""
    PromptServer.instance.send_sync("raylight-test-louder", {})
    return 1.25 * forward_of(self, x)


def mixing(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """An attention that adds the mean over all tokens."""
    return forward_of(self, x, *args, **kwargs) + x.mean(1, keepdim=True)


class Reminding:
    """A cross-attention that adds something of another text."""

    def __init__(self, reminder: torch.Tensor) -> None:
        self.reminder = reminder

    def bound(self, module: Any) -> types.MethodType:
        """The method of a module."""

        def forward(attention: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return forward_of(attention, x, *args, **kwargs) + self.reminder.to(x)

        return types.MethodType(forward, module)


def swapped(inner: Any, call: Any, arguments: dict[str, Any]) -> Any:
    """Calls the model with another method in the place of its own, as caches do."""
    with mock.patch.multiple(inner, forward_orig=types.MethodType(louder, inner)):
        return call(arguments["input"], arguments["timestep"], **arguments["c"])


class RLTestInside:
    """Changes the blocks of a Wan model, or the model, in one of the ways that packs have found."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "how": ("STRING", {"default": "louder"})}}

    def patch(self, model: Any, how: str) -> tuple[Any]:
        model = model.clone()
        inner = model.model.diffusion_model
        blocks = [(name, module) for name, module in inner.named_modules() if hasattr(module, "cross_attn")]
        assert blocks, "this is not a Wan model"
        if how == "reclassed":
            inner.__class__ = type("Other", (type(inner),), {})
        elif how == "replaced":
            inner.forward_orig = types.MethodType(louder, inner)
        elif how == "swapped":
            model.set_model_unet_function_wrapper(functools.partial(swapped, inner))
        elif how == "copied":
            copy.deepcopy(model)
        elif how == "assigned":
            for _, block in blocks:
                block.ffn.forward = types.MethodType(louder, block.ffn)
        elif how == "wrapped":
            for _, block in blocks:
                block.ffn = torch.nn.Sequential(block.ffn)
        elif how == "reminded":
            text = torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(3))
            with torch.inference_mode():
                reminder = inner.text_embedding(text).mean(1, keepdim=True)
            for name, block in blocks:
                bound = Reminding(reminder).bound(block.cross_attn)
                model.add_object_patch(f"diffusion_model.{name}.cross_attn.forward", bound)
        else:
            part, function = ("ffn", louder) if how == "louder" else ("self_attn", mixing)
            for name, block in blocks:
                bound = types.MethodType(function, getattr(block, part))
                model.add_object_patch(f"diffusion_model.{name}.{part}.forward", bound)
        return (model,)
