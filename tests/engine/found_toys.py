"""Small transformers that are wrong to divide in one way each, or only in a certain way; torch alone, no ComfyUI."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def plain(q: Any, k: Any, v: Any, heads: int, *, mask: Any = None, scale: Any = None, **more: Any) -> torch.Tensor:
    """Attention that nothing can take the place of."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def attention(q: Any, k: Any, v: Any, heads: int, transformer_options: Any = None, **more: Any) -> torch.Tensor:
    """As ComfyUI's: an override in transformer_options takes its place."""
    override = (transformer_options or {}).get("optimized_attention_override")
    out: torch.Tensor = override(plain, q, k, v, heads, **more) if override else plain(q, k, v, heads, **more)
    return out


def table(length: int) -> torch.Tensor:
    """Something like rope, [1, L, 1]."""
    return 1 + torch.sin(torch.arange(length) * 0.3)[None, :, None]


class Attention(nn.Module):
    """Attention among the tokens that it is given."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.kind = nn.Linear(width, 3 * width), nn.Linear(width, width), heads, kind

    def forward(self, x: torch.Tensor, pe: Any = None, transformer_options: Any = None) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if pe is not None:
            q, k = q * pe, k * pe
        if self.kind == "length_in_q":
            q = q * math.log(q.shape[1])
        more: dict[str, Any] = {}
        if self.kind == "length_in_scale":
            more["scale"] = math.log(q.shape[1]) / 8
        if self.kind == "causal_mask":
            more["mask"] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.kind == "bypass_module":
            return self.out(plain(q, k, v, self.heads))
        return self.out(attention(q, k, v, self.heads, transformer_options=transformer_options, **more))


class Rounding(nn.Module):
    """Gives 16 bits of what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()


class Block(nn.Module):
    """Attention and a feed forward, and one thing more."""

    def __init__(self, width: int, heads: int, kind: str, index: int, owner: list[Any]) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width, heads, kind)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.kind, self.index, self.owner, self.heads = kind, index, owner, heads
        if kind == "conv_module":
            self.conv = nn.Conv1d(width, width, 3, padding=1)
        if kind == "group_norm":
            self.gn = nn.GroupNorm(4, width)
        if kind == "position_table":
            self.table = nn.Parameter(torch.randn(1, 512, width))
        if kind == "rounds":
            self.rounding = Rounding()
        if kind == "conv_inline":
            self.weight = nn.Parameter(torch.randn(width, 1, 3))

    def forward(
        self, x: torch.Tensor, pe: Any = None, keep: Any = None, transformer_options: Any = None
    ) -> torch.Tensor:
        x, pe = self.before(x, pe, transformer_options or {})
        x = x + self.attn(self.norm(x), pe, transformer_options=transformer_options)
        x = self.after(x, keep)
        return x + self.down(F.gelu(self.up(x)))

    def before(self, x: torch.Tensor, pe: Any, options: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """What is wrong before attention."""
        kind, owner = self.kind, self.owner[0]
        if kind == "rope_attribute":
            pe = owner.pe
        if kind == "rope_inside":
            pe = table(x.shape[1])
        if kind == "rope_cache":
            pe = owner.tables.setdefault(x.shape[1], table(x.shape[1]))
        if kind == "state_attribute":
            x = x + owner.state if self.index else x
            owner.state = x.mean(1, keepdim=True)
        if kind == "state_options":
            x = x + options["shared"]["mean"] if self.index else x
            options["shared"]["mean"] = x.mean(1, keepdim=True)
        if kind == "state_hidden":
            # as above, and with a last layer of zeros
            x = x + owner.state if self.index else x
            owner.state = x.mean(1, keepdim=True)
        if kind == "bypass_inline":
            h = self.norm(x)
            x = x + plain(h, h, h, self.heads)
        return x, pe

    def after(self, x: torch.Tensor, keep: Any) -> torch.Tensor:
        """What is wrong after attention."""
        ways = {
            "mean": lambda: x + x.mean(1, keepdim=True),
            "mean_small": lambda: x + 1e-3 * x.mean(1, keepdim=True),
            "conv_inline": lambda: (
                x + F.conv1d(x.transpose(1, 2), self.weight, padding=1, groups=x.shape[-1]).transpose(1, 2)
            ),
            "conv_module": lambda: x + self.conv(x.transpose(1, 2)).transpose(1, 2),
            "group_norm": lambda: x + self.gn(x.transpose(1, 2)).transpose(1, 2),
            "position_table": lambda: x + self.table[:, : x.shape[1]],
            "cumsum": lambda: x + x.cumsum(1) / x.shape[1],
            "roll": lambda: x + x.roll(1, 1),
            "first_token": lambda: x + x[:, :1],
            # each is right for what a proof tries: few tokens, small values, one picture
            "late_mean": lambda: x + x.mean(1, keepdim=True) if x.shape[1] > 90 else x,
            "late_values": lambda: x + x.mean(1, keepdim=True) if x.abs().amax() > 100 else x,
            "late_values_last": lambda: x + x.mean(1, keepdim=True) if self.index == 2 and x.abs().amax() > 100 else x,
            "batch_mean": lambda: x + x.mean(1, keepdim=True) if x.shape[0] > 1 else x,
            "rounds": lambda: self.rounding(x).float(),
            "told_length": lambda: x.reshape(x.shape[0], keep, -1),
            "keep_indices": lambda: x.index_add(1, keep, x.new_ones(x.shape[0], len(keep), x.shape[2])),
            "draws": lambda: x + torch.rand_like(x),
            "global_max": lambda: x / x.abs().max(),
            "length_in_output": lambda: x * math.log(x.shape[1]),
            "batch_statistic": lambda: x - x.mean(0, keepdim=True) * 0.5,
        }
        return ways[self.kind]() if self.kind in ways else x


class Toy(nn.Module):
    """Text and a picture in one sequence."""

    def __init__(self, kind: str = "right", width: int = 40, heads: int = 5, depth: int = 3) -> None:
        super().__init__()
        owner: list[Any] = []
        self.first, self.last, self.text = nn.Linear(4, width), nn.Linear(width, 4), nn.Linear(6, width)
        self.blocks = nn.ModuleList([Block(width, heads, kind, i, owner) for i in range(depth)])
        if kind == "two_lists":
            self.others = nn.ModuleList([Block(width, heads, "", i, owner) for i in range(depth)])
        if kind == "state_hidden":
            nn.init.zeros_(self.last.weight)
        # a list, so that it is no sub-module
        owner.append(self)
        self.kind = kind
        self.state: Any = None
        self.pe: Any = None
        self.tables: dict[int, torch.Tensor] = {}

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, transformer_options: Any = None
    ) -> torch.Tensor:
        tokens = torch.cat([self.text(context), self.first(x.flatten(2).transpose(1, 2))], 1) * (1 + t[:, None, None])
        self.pe, keep = table(tokens.shape[1]), torch.arange(0, tokens.shape[1], 3)
        options = {**(transformer_options or {}), "shared": {}}
        inside = self.kind in ("rope_attribute", "rope_inside", "rope_cache")
        pe = None if inside else self.pe
        for index, block in enumerate(self.blocks):
            if self.kind in ("dropped", "added"):
                pe = table(tokens.shape[1])
            more = {"keep_indices": {"keep": keep}, "told_length": {"keep": self.pe.shape[1]}}.get(self.kind, {})
            if self.kind == "other_form" and not context.any():
                more = {"keep": keep}
            tokens = block(tokens, pe, transformer_options=options, **more)
            tokens = self.between(tokens, index, pe, options, context.shape[1])
        out = self.last(tokens[:, -x.flatten(2).shape[2] :])
        return out.transpose(1, 2).unflatten(2, x.shape[2:])

    def between(self, tokens: torch.Tensor, index: int, pe: Any, options: Any, text: int) -> torch.Tensor:
        """What happens to tokens after a block."""
        if self.kind == "between":
            tokens = tokens - tokens.mean(1, keepdim=True)
        if self.kind == "late_between" and text > 20:
            tokens = tokens - tokens.mean(1, keepdim=True)
        if self.kind == "between_method":
            tokens = tokens + tokens.flip(1)
        if self.kind == "dropped" and index == 0:
            tokens = tokens[:, text:]
        if self.kind == "added" and index == 0:
            tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        if self.kind == "two_lists":
            # each list is fed by the other
            tokens = tokens + 0.5 * self.others[index](tokens, pe, transformer_options=options)
        return tokens


class Twins(nn.Module):
    """Two streams, in one attention or each alone with text looking at the picture: their lengths may be equal."""

    def __init__(self, width: int = 40, heads: int = 5) -> None:
        super().__init__()
        self.img, self.txt, self.last = nn.Linear(4, width), nn.Linear(6, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList([TwinBlock(width, heads) for _ in range(3)])

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, transformer_options: Any = None
    ) -> torch.Tensor:
        img, txt = self.img(x.transpose(1, 2)) * (1 + t[:, None, None]), self.txt(context)
        pe = table(txt.shape[1] + img.shape[1])
        for block in self.blocks:
            img, txt = block(img, txt, pe, transformer_options=transformer_options)
        return self.last(img).transpose(1, 2)


class TwinBlock(nn.Module):
    """One attention over text and picture."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.one, self.two = Attention(width, heads, ""), nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, img: torch.Tensor, txt: torch.Tensor, pe: torch.Tensor, transformer_options: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.attn(torch.cat([txt, img], 1), pe, transformer_options=transformer_options)
        return img + self.one(both[:, txt.shape[1] :]).tanh(), txt + self.two(both[:, : txt.shape[1]]).tanh()


def picture(rows: int = 5, columns: int = 7, text: int = 6, batch: int = 2) -> Inputs:
    """Inputs of a `Toy`."""
    generator = torch.Generator().manual_seed(rows * columns + text)
    x = torch.randn(batch, 4, rows, columns, generator=generator)
    context = torch.randn(batch, text, 6, generator=generator)
    return (x, torch.linspace(0.3, 0.6, batch), context), {"transformer_options": {}}


def line(length: int = 11, text: int = 11) -> Inputs:
    """Inputs of `Twins`."""
    generator = torch.Generator().manual_seed(length + text)
    x = torch.randn(2, 4, length, generator=generator)
    context = torch.randn(2, text, 6, generator=generator)
    return (x, torch.linspace(0.3, 0.6, 2), context), {"transformer_options": {}}
