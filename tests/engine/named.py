"""A model whose checkpoint names the attention of a layer, as ComfyUI after 0.33 reads it, shared over ranks.

None of the ComfyUIs that tests run on has that yet, so the order in which its attention looks for a function is
written here (comfy/ldm/modules/attention.py of the versions after 0.33, `wrap_attn`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from comfy_raylight.raylight.cuts import Split
from comfy_raylight.raylight.errors import UnsupportedError
from comfy_raylight.raylight.install import install
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.plan import Blocks, Plan, Region
from comfy_raylight.raylight.sequence import kernels
from torch import nn

HEADS, WIDTH, TOKENS = 5, 8, 23
PLAN = Plan(
    Region(Blocks(at="blocks.*", streams={"x": Split(1)}, outputs=(Split(1),), attention=("attn",))),
)


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **more: Any) -> torch.Tensor:
    """What ComfyUI's attention is without anything set."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rounded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **more: Any) -> torch.Tensor:
    """One of low precision, head by head: a rank with some of the heads gives what one process gives."""
    q, k, v = ((t * 4).round() / 4 for t in (q, k, v))
    return stock(q, k, v, heads)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, preferred_attention: Any = None, **more: Any
) -> torch.Tensor:
    """An override is asked first, and given the stock function; then what the layer names."""
    function: Callable[..., torch.Tensor]
    override = more["transformer_options"].get("optimized_attention_override")
    if override is not None:
        function = partial(override, stock)
    elif preferred_attention is not None and preferred_attention.function is not None:
        function = preferred_attention.function
    else:
        function = stock
    return function(q, k, v, heads, **more)


class Preference(nn.Module):
    function: Callable[..., torch.Tensor] | None = None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.comfy_attention = Preference()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def forward(self, x: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return attention(
            q, k, v, HEADS, preferred_attention=self.comfy_attention, transformer_options=transformer_options
        )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        return x + self.attn(x, transformer_options)


class Model(nn.Module):
    """Three layers, of which the second names an attention of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
        self.layer(1).comfy_attention.function = rounded

    def layer(self, index: int) -> Attention:
        found = self.get_submodule(f"blocks.{index}.attn")
        assert isinstance(found, Attention)
        return found

    def forward(self, x: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, transformer_options)
        return x


def named(grid: Any) -> None:
    """The engine calls what the layer would have called; overrides, and kernels that users choose, come before it."""
    mesh: Mesh = grid.mesh
    ring = mesh.axis("ring").size > 1
    x = torch.randn(1, TOKENS, HEADS * WIDTH, generator=torch.Generator().manual_seed(1))

    def hotter(func: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = func(q * 1.5, *args, **kwargs)
        return out

    def shared(model: Model, options: dict[str, Any], kernel: Any = grid.kernel) -> torch.Tensor:
        installation = install(model, PLAN, mesh, kernel=kernel)
        try:
            out: torch.Tensor = installation.wrapper(model, x.clone(), options)
            return out
        finally:
            installation.remove()

    def refused(words: str, model: Model) -> bool:
        try:
            shared(model, {})
        except UnsupportedError as error:
            return words in str(error)
        return False

    model = Model()
    want = model(x.clone(), {})
    stock_model = Model()
    stock_model.layer(1).comfy_attention.function = None
    grid.note("wrong stock for a named attention", stock_model(x.clone(), {}), want)
    grid.note("error nothing named", shared(stock_model, {}), stock_model(x.clone(), {}))
    chosen = kernels.resolve("TORCH_MATH", ring=ring)
    grid.note("error chosen kernel before a named attention", shared(model, {}, chosen), stock_model(x.clone(), {}))
    if ring:
        grid.hold("a named attention is refused with a ring", refused("names an attention kernel", model))
        return
    grid.note("error named attention", shared(model, {}), want)
    over = {"optimized_attention_override": hotter}
    grid.note("error override before a named attention", shared(model, dict(over)), model(x.clone(), dict(over)))
    # a LoRA of later versions may put another object in its place
    model.layer(1).comfy_attention = Preference()
    grid.note("error named attention exchanged", shared(model, {}), stock_model(x.clone(), {}))
    model.layer(1).qkv.comfy_attention = Preference()
    model.layer(1).comfy_attention.function = rounded
    grid.hold("several in a block are refused", refused("name different kernels", model))
