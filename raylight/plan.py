"""The vocabulary in which a model family says where its tokens are: data that `hooks.install` carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import UnsupportedError
from .layout import Layout

Entry = Callable[[Any, Layout], Any]
"""Turns a whole argument into this rank's: called as entry(value, layout), never with None."""


@dataclass(frozen=True, init=False)
class Split:
    """Cut a tensor along `dim`, whose tokens are those of the segments `over` (default "x") in that order."""

    dim: int
    over: tuple[str, ...]

    def __init__(self, dim: int, *over: str) -> None:
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "over", over or ("x",))

    def __call__(self, value: torch.Tensor, layout: Layout) -> torch.Tensor:
        return layout.split(value, dim=self.dim, over=self.over)


@dataclass(frozen=True, init=False)
class Rope:
    """Cut a rope table [1 or B, L, ...] or [1 or B, 1 or H, L, ...] along its dim of length L.

    Raises:
        UnsupportedError: not exactly one of dims 1 and 2 is as long as the sequence. That is what patches
            do that add or drop tokens.
    """

    over: tuple[str, ...]

    def __init__(self, *over: str) -> None:
        object.__setattr__(self, "over", over or ("x",))

    def __call__(self, value: torch.Tensor, layout: Layout) -> torch.Tensor:
        if all(layout.replicated(name) for name in self.over):
            return value
        dims = [dim for dim in (1, 2) if value.shape[dim] == layout.total(self.over)]
        if len(dims) != 1:
            raise UnsupportedError(
                "The rope table does not fit the tokens",
                f"its shape is {list(value.shape)} and there are {layout.total(self.over)} tokens",
                "Remove the node that changes the number of tokens inside the model (such as a reference cache)",
            )
        return layout.split(value, dim=dims[0], over=self.over)


@dataclass(frozen=True)
class PerFrame:
    """Modulation [B, 1 or F or L, ...] along `dim`: one row stays; F rows become one row per local token.

    Frames map to tokens as Wan's `repeat_e` does it: L // F tokens each, one more where that leaves a rest.
    A tensor of another rank than `ndim` is not per frame and stays as it is.
    """

    dim: int
    over: tuple[str, ...] = ("x",)
    ndim: int = field(kw_only=True)

    def __call__(self, value: torch.Tensor, layout: Layout) -> torch.Tensor:
        if value.ndim != self.ndim or value.shape[self.dim] == 1:
            return value
        each = -(-layout.total(self.over) // value.shape[self.dim])
        return value.index_select(self.dim, layout.positions(self.over, device=value.device) // each)


@dataclass(frozen=True, init=False)
class Ranges:
    """Token ranges [(start, stop, ...)] from global to local positions; stop may be None; empty ones are dropped."""

    over: tuple[str, ...]

    def __init__(self, *over: str) -> None:
        object.__setattr__(self, "over", over or ("x",))

    def __call__(self, value: list[Any], layout: Layout) -> list[tuple[Any, ...]]:
        found = []
        for start, stop, *rest in value:
            last = layout.total(self.over) if stop is None else stop
            local = layout.boundary(start, over=self.over), layout.boundary(last, over=self.over)
            if local[0] < local[1]:
                found.append((*local, *rest))
        return found


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One list of transformer blocks.

    Attributes:
        at: path of the blocks from the root, such as "blocks.*".
        streams: block arguments that are token tensors, and how they are cut; they name the segments.
        shared: arguments that every block gets whole, and their local form.
        outputs: how the block's outputs are joined, in their order.
        attention: paths, from a block, of the modules whose attention spans all tokens; "" is the block.
        order: how the segments are concatenated inside that attention.
        optional: names in `shared` that some versions of the model do not have.
        patches: names of transformer_options patch lists that the block calls with a dict of [B, L, ..]
            tensors and that return [B, L, C]; they are shown the whole sequence.
    """

    at: str
    streams: Mapping[str, Split]
    outputs: tuple[Split, ...]
    attention: tuple[str, ...]
    shared: Mapping[str, Entry] = field(default_factory=dict)
    order: tuple[str, ...] = ("x",)
    optional: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Head:
    """A module after the last block that treats every token by itself: its small output is joined, not its input.

    Attributes:
        at: path from the root.
        shared: arguments that it gets whole, and their local form.
        output: how its one output is joined.
        optional: names in `shared` that some versions of the model do not have.
    """

    at: str
    shared: Mapping[str, Entry] = field(default_factory=dict)
    output: Split = field(default_factory=lambda: Split(1))
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Region:
    """Tokens are cut on entry to the first block and joined at `exit`, or after the last block where that is None.

    Everything outside sees whole tensors. `exit` needs that nothing between the last block and it adds,
    drops or looks across tokens.
    """

    blocks: Blocks
    exit: Head | None = field(default=None, kw_only=True)


@dataclass(frozen=True, init=False)
class Plan:
    """The regions of a model, in the order in which they run.

    Attributes:
        regions: one per list of blocks.
        block_patches: transformer_options patch lists that see tokens between blocks, so that their
            presence asks for block granularity.
    """

    regions: tuple[Region, ...]
    block_patches: tuple[str, ...]

    def __init__(self, *regions: Region, block_patches: tuple[str, ...] = ("double_block", "noise_refiner")) -> None:
        object.__setattr__(self, "regions", regions)
        object.__setattr__(self, "block_patches", block_patches)
