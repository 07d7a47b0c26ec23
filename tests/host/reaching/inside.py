"""A node that changes the inside of a model, in a module that registers a page with ComfyUI's server."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from aiohttp import web
from comfy.patcher_extension import CallbacksMP
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


def accumulate(switch: bool) -> None:
    """Set how torch sums products of 16 bits."""
    torch.backends.cuda.matmul.allow_fp16_accumulation = switch


def telling(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A feed forward that is louder where products are summed in 16 bits."""
    return (1.5 if torch.backends.cuda.matmul.allow_fp16_accumulation else 1.0) * forward_of(self, x)


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


Blocks = Sequence[tuple[str, Any]]
"""Names in the model, and the blocks."""


def patch_feed_forwards(model: Any, blocks: Blocks, function: Any) -> None:
    """An object patch for each."""
    for name, block in blocks:
        model.add_object_patch(f"diffusion_model.{name}.ffn.forward", types.MethodType(function, block.ffn))


def louder_blocks(model: Any, blocks: Blocks) -> None:
    patch_feed_forwards(model, blocks, louder)


def mixing_blocks(model: Any, blocks: Blocks) -> None:
    for name, block in blocks:
        model.add_object_patch(f"diffusion_model.{name}.self_attn.forward", types.MethodType(mixing, block.self_attn))


def reminded(model: Any, blocks: Blocks) -> None:
    """Calls a layer here."""
    text = torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        reminder = model.model.diffusion_model.text_embedding(text).mean(1, keepdim=True)
    for name, block in blocks:
        bound = Reminding(reminder).bound(block.cross_attn)
        model.add_object_patch(f"diffusion_model.{name}.cross_attn.forward", bound)


def rounded(model: Any, blocks: Blocks) -> None:
    """Switches torch's settings for the run. On a CPU they do nothing: code inside tells whether they are there."""
    model.add_callback(CallbacksMP.ON_PRE_RUN, lambda patcher: accumulate(True))
    model.add_callback(CallbacksMP.ON_CLEANUP, lambda patcher: accumulate(False))
    patch_feed_forwards(model, blocks, telling)


def reclassed(model: Any, blocks: Blocks) -> None:
    inner = model.model.diffusion_model
    inner.__class__ = type("Other", (type(inner),), {})


def replaced(model: Any, blocks: Blocks) -> None:
    model.model.diffusion_model.forward_orig = types.MethodType(louder, model.model.diffusion_model)


def whole(model: Any, blocks: Blocks) -> None:
    model.add_object_patch("diffusion_model", torch.nn.Identity())


def copied(model: Any, blocks: Blocks) -> None:
    copy.deepcopy(model)


def assigned(model: Any, blocks: Blocks) -> None:
    for _, block in blocks:
        block.ffn.forward = types.MethodType(louder, block.ffn)


def wrapped(model: Any, blocks: Blocks) -> None:
    for _, block in blocks:
        block.ffn = torch.nn.Sequential(block.ffn)


def writing(write: Callable[[torch.Tensor], Any]) -> Callable[[Any, Blocks], None]:
    def way(model: Any, blocks: Blocks) -> None:
        for _, block in blocks:
            write(block.ffn[0].weight)

    return way


def moved(model: Any, blocks: Blocks) -> None:
    """Moves a layer to where it computes, and calls it."""
    embedding = model.model.diffusion_model.text_embedding.to(torch.device("cpu"))
    with torch.inference_mode():
        embedding(torch.zeros(1, 1, 4096))
    patch_feed_forwards(model, blocks, louder)


def set_data(weight: torch.Tensor) -> None:
    weight.data = 2 * weight.data


def padded(model: Any, blocks: Blocks) -> None:
    """Gives the input layer twice the channels, by a difference that is larger than the weight."""
    rows, columns, *kernel = model.model.diffusion_model.patch_embedding.weight.shape
    diff = torch.randn(rows, 2 * columns, *kernel, generator=torch.Generator().manual_seed(4)) / 8
    model.add_patches({"diffusion_model.patch_embedding.weight": ("diff", (diff, {"pad_weight": True}))}, 0.5)


def strange(model: Any, blocks: Blocks) -> None:
    """Patches of a kind that ComfyUI does not know."""
    weights = [f"diffusion_model.{name}.ffn.0.weight" for name, _ in blocks]
    model.add_patches({key: ("strange", (torch.ones(1),)) for key in weights})


WAYS: Mapping[str, Callable[[Any, Blocks], None]] = {
    "louder": louder_blocks,
    "mixing": mixing_blocks,
    "reminded": reminded,
    "rounded": rounded,
    "reclassed": reclassed,
    "replaced": replaced,
    "whole": whole,
    "copied": copied,
    "assigned": assigned,
    "wrapped": wrapped,
    "moved": moved,
    "written": writing(lambda weight: weight.mul_(2)),
    "data written": writing(lambda weight: weight.data.mul_(2)),
    "data set": writing(set_data),
    "padded": padded,
    "strange": strange,
}


class RLTestInside:
    """Changes the blocks of a Wan model, or the model, in one of the ways that packs have found."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "how": (list(WAYS),)}}

    def patch(self, model: Any, how: str) -> tuple[Any]:
        model = model.clone()
        modules = model.model.diffusion_model.named_modules()
        blocks = [(name, module) for name, module in modules if hasattr(module, "cross_attn")]
        assert blocks, "this is not a Wan model"
        WAYS[how](model, blocks)
        return (model,)


class RLTestTable:
    """Scales what a model gives by the mean of a tensor of its own, which it reads in ComfyUI's process."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "tensor": ("STRING", {"default": "adaln_t_table"})}}

    def patch(self, model: Any, tensor: str) -> tuple[Any]:
        scale = 1 + float(getattr(model.model.diffusion_model, tensor).float().mean())
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"] * scale)
        return (model,)
