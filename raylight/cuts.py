"""How one tensor, table or list of positions becomes a rank's part of it: the entries that plans are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .errors import MisfitError
from .layout import Layout, Segment, gather

if TYPE_CHECKING:
    from .comm import Comm

Entry = Callable[[Any, Layout], Any]
"""Turns a whole argument into this rank's: called as entry(value, layout), never with None."""


@dataclass(frozen=True, init=False)
class Split:
    """Cut a tensor along its token dim, whose tokens are those of the segments `over` (default "x") in that order.

    Attributes:
        dim: the token dim, or the first of them.
        grid: how many dims from `dim` on are tokens together (T, H, W kept apart: 3). Blocks then see
            [.., local, 1, 1, ..]; leaving joins and restores the grid.
    """

    dim: int
    over: tuple[str, ...]
    grid: int

    def __init__(self, dim: int, *over: str, grid: int = 1) -> None:
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "over", over or ("x",))
        object.__setattr__(self, "grid", grid)

    def segment(self, value: torch.Tensor) -> Segment:
        """The one segment that a whole stream consists of."""
        shape = tuple(value.shape[self.dim : self.dim + self.grid])
        return Segment(self.over[0], math.prod(shape), shape if self.grid > 1 else ())

    def __call__(self, value: torch.Tensor, layout: Layout) -> torch.Tensor:
        if self.grid == 1:
            return layout.split(value, dim=self.dim, over=self.over)
        flat = value.flatten(self.dim, self.dim + self.grid - 1)
        return layout.split(flat, dim=self.dim, over=self.over)[_padded(self.dim, self.grid)]

    def join(self, value: torch.Tensor, layout: Layout, comm: Comm) -> torch.Tensor:
        """The whole stream again, with equal bytes on every rank: a collective."""
        if self.grid > 1:
            value = value.flatten(self.dim, self.dim + self.grid - 1)
        whole = gather(value, dim=self.dim, over=self.over, layout=layout, comm=comm)
        return whole.unflatten(self.dim, layout.segment(self.over[0]).grid) if self.grid > 1 else whole


@dataclass(frozen=True)
class Stretch:
    """Joins an output that is of some tokens only, start:stop of the whole sequence.

    Attributes:
        arg: the argument of the module, (start, stop, ...), that says which.
        dim: the token dim of the output.
    """

    arg: str
    dim: int = 0
    over: tuple[str, ...] = ("x",)

    def join(self, value: torch.Tensor, given: tuple[Any, ...], layout: Layout, comm: Comm) -> torch.Tensor:
        """The output for all tokens given[0]:given[1], with equal bytes on every rank: a collective."""
        if all(layout.replicated(name) for name in self.over):
            return comm.broadcast(value)
        ranks = [replace(layout, rank=rank) for rank in range(layout.size)]
        start, stop, *_ = given
        sizes = [each.boundary(stop, over=self.over) - each.boundary(start, over=self.over) for each in ranks]
        return torch.cat(comm.all_gather(value, dim=self.dim, sizes=sizes), self.dim)


def _padded(dim: int, grid: int) -> tuple[Any, ...]:
    return (slice(None),) * (dim + 1) + (None,) * (grid - 1)


@dataclass(frozen=True)
class Replicated:
    """A stream that every rank keeps whole: short, or changed between blocks. In attention its heads are shared."""

    dim: int
    name: str

    @property
    def over(self) -> tuple[str, ...]:
        return (self.name,)

    def segment(self, value: torch.Tensor) -> Segment:
        """The one segment that the stream consists of."""
        return Segment(self.name, value.shape[self.dim], whole=True)

    def __call__(self, value: torch.Tensor, layout: Layout) -> torch.Tensor:
        # owned: blocks write into their inputs
        return value.clone()

    def join(self, value: torch.Tensor, layout: Layout, comm: Comm) -> torch.Tensor:
        """Rank 0's, so that the bytes are equal on every rank: a collective."""
        return comm.broadcast(value)


Stream = Split | Replicated


@dataclass(frozen=True, init=False)
class Rope:
    """Cut a rope table [1 or B, L, ...] or [1 or B, 1 or H, L, ...] along its dim of length L, or each of a tuple.

    Attributes:
        dim: the token dim; None finds it among 1 and 2, the last dim excepted.

    Raises:
        MisfitError: no dim, or more than one, is as long as the sequence. That is what patches do that
            add or drop tokens.
    """

    over: tuple[str, ...]
    dim: int | None

    def __init__(self, *over: str, dim: int | None = None) -> None:
        object.__setattr__(self, "over", over or ("x",))
        object.__setattr__(self, "dim", dim)

    def __call__(self, value: Any, layout: Layout) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self(item, layout) if isinstance(item, torch.Tensor) else item for item in value)
        if all(layout.replicated(name) for name in self.over):
            return value
        candidates = range(1, min(3, value.ndim - 1)) if self.dim is None else (self.dim,)
        dims = [dim for dim in candidates if value.shape[dim] == layout.total(self.over)]
        if len(dims) != 1:
            raise MisfitError(
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


@dataclass(frozen=True, init=False)
class Index:
    """A boundary between tokens, from its global to its local position."""

    over: tuple[str, ...]

    def __init__(self, *over: str) -> None:
        object.__setattr__(self, "over", over or ("x",))

    def __call__(self, value: int, layout: Layout) -> int:
        return layout.boundary(value, over=self.over)
