"""A node that caches steps in the ways of packs that swap a method, or the blocks, of a model around each call."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.wan.model import sinusoidal_embedding_1d
from torch import distributed, nn

CATEGORY = "raylight/test"


def change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return (now - before).abs().mean() / before.abs().mean()


def wan_forward(  # noqa: PLR0917, the signature is ComfyUI's
    self: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    context: torch.Tensor,
    freqs: Any = None,
    transformer_options: Any = None,
    **_: Any,
) -> torch.Tensor:
    """Wan's, from text alone, with one state for each condition: blocks are left out while the sum is small."""
    x = self.patch_embedding(x.float()).to(x.dtype)
    grid = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    e = self.time_embedding(sinusoidal_embedding_1d(self.freq_dim, t.flatten()).to(x.dtype))
    e = e.reshape(t.shape[0], -1, e.shape[-1])
    e0 = self.time_projection(e).unflatten(2, (6, self.dim))
    context = self.text_embedding(context)
    if not hasattr(self, "cached"):
        self.cached = {number: {"sum": 0.0, "seen": None, "residual": None} for number in (0, 1)}
    conds = transformer_options["cond_or_uncond"]
    rows = len(x) // len(conds)
    compute = not transformer_options["may_skip"]
    for number, cond in enumerate(conds):
        state, seen = self.cached[cond], x[number * rows : (number + 1) * rows].clone()
        if state["seen"] is None:
            compute = True
        else:
            state["sum"] += float(change(seen, state["seen"]))
            if state["sum"] >= transformer_options["cache_limit"]:
                compute, state["sum"] = True, 0.0
        state["seen"] = seen
    if compute:
        before = x
        for block in self.blocks:
            x = block(x, e=e0, freqs=freqs, context=context)
        for number, cond in enumerate(conds):
            self.cached[cond]["residual"] = (x - before)[number * rows : (number + 1) * rows]
    else:
        for number, cond in enumerate(conds):
            x[number * rows : (number + 1) * rows] += self.cached[cond]["residual"]
    return self.unpatchify(self.head(x, e), grid)


def flux_forward(  # noqa: PLR0917, the signature is ComfyUI's
    self: Any,
    img: torch.Tensor,
    img_ids: torch.Tensor,
    txt: torch.Tensor,
    txt_ids: torch.Tensor,
    timesteps: torch.Tensor,
    y: torch.Tensor,
    guidance: Any = None,
    control: Any = None,
    transformer_options: Any = None,
    attn_mask: Any = None,
    **_: Any,
) -> torch.Tensor:
    """Flux's, which asks the first block's modulation. The blocks write into what it keeps, as in packs."""
    img = self.img_in(img)
    vec = self.time_in(timestep_embedding(timesteps, 256).to(img.dtype))
    if self.params.guidance_embed:
        vec = vec + self.guidance_in(timestep_embedding(guidance, 256).to(img.dtype))
    vec = vec + self.vector_in(y[:, : self.params.vec_in_dim])
    txt = self.txt_in(txt)
    pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
    modulation, _ = self.double_blocks[0].img_mod(vec)
    seen = self.double_blocks[0].img_norm1(img) * (1 + modulation.scale) + modulation.shift
    compute = True
    if hasattr(self, "cached_sum"):
        self.cached_sum += float(change(seen, self.cached_seen))
        compute = self.cached_sum >= transformer_options["cache_limit"] or not transformer_options["may_skip"]
    if compute:
        self.cached_sum = 0.0
    self.cached_seen = seen
    if not compute:
        img += self.cached_residual
    else:
        before = img
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe, attn_mask=attn_mask)
        img = img[:, txt.shape[1] :]
        self.cached_residual = img - before
    return self.final_layer(img, vec)


FORWARDS = {"WanModel": wan_forward, "Flux": flux_forward}


def method(model: Any, inner: Any, limit: float) -> None:
    """The forward swapped for one that decides; its state is on the model, and deleted when a sampling begins."""
    options = model.model_options.setdefault("transformer_options", {})
    options["cache_limit"] = limit
    context = mock.patch.multiple(inner, forward_orig=FORWARDS[type(inner).__name__].__get__(inner, inner.__class__))

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        c = arguments["c"]
        sigmas = c["transformer_options"]["sample_sigmas"]
        found = (sigmas == arguments["timestep"][0]).nonzero()
        step = int(found[0]) if len(found) else 0
        if step == 0:
            for name in ("cached", "cached_sum"):
                if hasattr(inner, name):
                    delattr(inner, name)
        c["transformer_options"]["may_skip"] = step < len(sigmas) - 2
        with context:
            return call(arguments["input"], arguments["timestep"], **c)

    model.set_model_unet_function_wrapper(wrapper)


@dataclasses.dataclass
class Buffers:
    """What a sampling keeps of its last computed step."""

    first: Any = None
    rest: Any = None


buffers: Buffers | None = None
"""Of the sampling at hand."""
seen: list[float] = []
"""Noise levels."""
scale = 1.0


def current() -> Buffers | None:
    return buffers


def begin() -> None:
    global buffers  # noqa: PLW0603, as packs do
    buffers = Buffers()


class CachedBlocks(nn.Module):
    """In the place of the blocks: the first one runs and decides whether the others do."""

    def __init__(self, blocks: Any, limit: float, allowed: Callable[[bool], bool]) -> None:
        super().__init__()
        self.blocks = blocks
        self.limit = limit
        self.allowed = allowed

    def forward(self, x: torch.Tensor, **others: Any) -> torch.Tensor:
        buffers, given = current(), x
        assert buffers is not None
        x = self.blocks[0](x, **others)
        first = x - given
        similar = buffers.first is not None and float(change(first, buffers.first)) < self.limit
        if self.allowed(similar):
            return x + buffers.rest
        buffers.first = first
        after = x
        for block in self.blocks[1:]:
            x = block(x, **others)
        buffers.rest = x - after
        return x


def blocks(model: Any, inner: Any, limit: float) -> None:
    """The blocks swapped for one; its state is in the module, and counted around the call."""
    in_a_row = 0
    level = None

    @torch.compiler.disable()
    def allowed(similar: bool) -> bool:
        nonlocal in_a_row
        in_a_row = in_a_row + 1 if similar and in_a_row < 2 else 0
        return in_a_row > 0

    cached = nn.ModuleList([CachedBlocks(inner.blocks, limit, allowed)])

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        nonlocal level, in_a_row
        now = arguments["timestep"][0].item()
        if current() is None or level is None or now > level:
            begin()
            in_a_row = 0
        level = now
        with mock.patch.object(inner, "blocks", cached):
            return call(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(wrapper)


def outputs(model: Any, inner: Any, limit: float) -> None:
    """The whole of the model swapped for what returns its last output: kept with the function."""
    kept: dict[str, Any] = {}

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "x" not in kept or float(change(x, kept["x"])) >= limit:
            kept["x"] = x.clone()
            kept["output"] = type(self)._forward(self, x, *args, **kwargs)
        return kept["output"]

    @contextlib.contextmanager
    def swapped() -> Iterator[None]:
        with mock.patch.object(inner, "_forward", types.MethodType(forward, inner)):
            yield

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        if float(arguments["timestep"][0]) == float(arguments["c"]["transformer_options"]["sample_sigmas"][0]):
            kept.clear()
        with swapped():
            return call(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(wrapper)


def within(model: Any, inner: Any, limit: float) -> None:
    """Each block decides for itself."""

    def cached(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not hasattr(self, "kept") or float(change(x, self.kept[0])) >= limit:
            self.kept = x.clone(), type(self).forward(self, x, *args, **kwargs) - x
        return x + self.kept[1]

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        if float(arguments["timestep"][0]) == float(arguments["c"]["transformer_options"]["sample_sigmas"][0]):
            for block in inner.blocks:
                if hasattr(block, "kept"):
                    del block.kept
        with contextlib.ExitStack() as stack:
            for block in inner.blocks:
                stack.enter_context(mock.patch.object(block, "forward", types.MethodType(cached, block)))
            return call(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(wrapper)


def swapping(name: str, change_it: Callable[[Any, Any, dict[str, Any]], Any], *, stays: bool = False) -> Any:
    """A way that swaps a method for the model's own, and does something else around the call."""

    def way(model: Any, inner: Any, limit: float) -> None:
        def own(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(type(self), name)(self, *args, **kwargs)

        def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
            if stays:
                setattr(inner, name, types.MethodType(own, inner))
                return change_it(inner, call, arguments)
            with mock.patch.object(inner, name, types.MethodType(own, inner)):
                return change_it(inner, call, arguments)

        model.set_model_unet_function_wrapper(wrapper)

    return way


def as_it_is(inner: Any, call: Any, arguments: dict[str, Any]) -> Any:
    return call(arguments["input"], arguments["timestep"], **arguments["c"])


def given_louder(inner: Any, call: Any, arguments: dict[str, Any]) -> Any:
    return call(1.1 * arguments["input"], arguments["timestep"], **arguments["c"])


def written(inner: Any, call: Any, arguments: dict[str, Any]) -> Any:
    arguments["input"].mul_(1.1)
    return as_it_is(inner, call, arguments)


def answered_louder(inner: Any, call: Any, arguments: dict[str, Any]) -> Any:
    return 1.1 * as_it_is(inner, call, arguments)


def not_called(inner: Any, call: Any, arguments: dict[str, Any]) -> Any:
    return arguments["input"].clone()


def looked_at(inner: Any, call: Any, arguments: dict[str, Any]) -> Any:
    assert arguments["c"]["c_crossattn"].shape[0]
    return as_it_is(inner, call, arguments)


def unlike(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Leaves the blocks out on one worker."""
    if distributed.get_rank() == 1:
        return x.clone()
    return type(self).forward_orig(self, x, *args, **kwargs)


def apart(model: Any, inner: Any, limit: float) -> None:
    """Decides otherwise on one worker than on another."""
    context = mock.patch.multiple(inner, forward_orig=types.MethodType(unlike, inner))

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        with context:
            return as_it_is(inner, call, arguments)

    model.set_model_unet_function_wrapper(wrapper)


def with_model(model: Any, inner: Any, limit: float) -> None:
    """Holds the MODEL, whose settings are in ComfyUI's process alone."""

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        model.get_model_object("model_sampling")
        with mock.patch.multiple(inner, forward_orig=types.MethodType(wan_forward, inner)):
            return as_it_is(inner, call, arguments)

    model.set_model_unet_function_wrapper(wrapper)


def scaled(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return scale * type(self).forward_orig(self, x, *args, **kwargs)


def by_module(model: Any, inner: Any, limit: float) -> None:
    """Swaps in a function of the module, which reads what the node has set there."""
    context = mock.patch.multiple(inner, forward_orig=types.MethodType(scaled, inner))

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        with context:
            return as_it_is(inner, call, arguments)

    model.set_model_unet_function_wrapper(wrapper)


def collecting(model: Any, inner: Any, limit: float) -> None:
    """Collects things in a variable of the module."""

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        seen.append(float(arguments["timestep"][0]))
        with mock.patch.multiple(inner, forward_orig=types.MethodType(wan_forward, inner)):
            return as_it_is(inner, call, arguments)

    model.set_model_unet_function_wrapper(wrapper)


def filling(model: Any, inner: Any, limit: float) -> None:
    """Keeps what it counts in a dict of transformer_options."""
    model.model_options.setdefault("transformer_options", {})["kept"] = {}

    def forward(self: Any, *args: Any, transformer_options: Any = None, **kwargs: Any) -> torch.Tensor:
        transformer_options["kept"]["calls"] = transformer_options["kept"].get("calls", 0) + 1
        return type(self).forward_orig(self, *args, transformer_options=transformer_options, **kwargs)

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        with mock.patch.multiple(inner, forward_orig=types.MethodType(forward, inner)):
            return as_it_is(inner, call, arguments)

    model.set_model_unet_function_wrapper(wrapper)


def shared(model: Any, inner: Any, limit: float) -> None:
    """Shares what it counts with a function that stays in ComfyUI's process."""
    count = 0

    def wrapper(call: Any, arguments: dict[str, Any]) -> Any:
        nonlocal count
        count += 1
        with mock.patch.multiple(inner, forward_orig=types.MethodType(wan_forward, inner)):
            return as_it_is(inner, call, arguments)

    def after(arguments: dict[str, Any]) -> Any:
        return arguments["denoised"] * (1 + count)

    model.set_model_unet_function_wrapper(wrapper)
    model.set_model_sampler_post_cfg_function(after)


WAYS: Mapping[str, Callable[[Any, Any, float], None]] = {
    "method": method,
    "blocks": blocks,
    "outputs": outputs,
    "within": within,
    "outer": swapping("forward", as_it_is),
    "staying": swapping("forward_orig", as_it_is, stays=True),
    "given": swapping("forward_orig", given_louder),
    "written": swapping("forward_orig", written),
    "answered": swapping("forward_orig", answered_louder),
    "not called": swapping("forward_orig", not_called),
    "looked at": swapping("forward_orig", looked_at),
    "apart": apart,
    "with model": with_model,
    "shared": shared,
    "filling": filling,
    "by module": by_module,
    "collecting": collecting,
}


class RLTestCache:
    """Leaves out parts of a model that would hardly give something else, in one of the ways of packs."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "how": (list(WAYS),), "limit": ("FLOAT", {"default": 0.3})}}

    def patch(self, model: Any, how: str, limit: float) -> tuple[Any]:
        global scale  # noqa: PLW0603, as packs do
        scale = limit
        model = model.clone()
        WAYS[how](model, model.get_model_object("diffusion_model"), limit)
        return (model,)
