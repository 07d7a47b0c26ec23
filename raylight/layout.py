"""Which tokens of a sequence each rank holds: pure arithmetic, and the cuts and joins that follow from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .comm import Comm


def share(total: int, *, rank: int, size: int) -> tuple[int, int]:
    """Span (start, stop) of rank `rank` when `total` things are dealt to `size` ranks, the first ones getting one more.

    Used for tokens and for heads; the span is empty where there are fewer things than ranks.
    """
    each, more = divmod(total, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


@functools.lru_cache(maxsize=4096)
def dealt(total: int, speeds: tuple[float, ...], *, least: int = 0) -> tuple[int, ...]:
    """How many of `total` things each of some ranks gets, in proportion to their speeds.

    The fractions that are left go to the largest of them (the method of largest remainders), the first of equal ones.

    Args:
        least: what each gets at least; there are so many for all.
    """
    assert total >= least * len(speeds) and min(speeds) > 0, (total, speeds, least)
    rest, scale = total - least * len(speeds), sum(speeds)
    # what a rank has already counts as its own: the faster ones get the rest until all have what they should
    wanted = [max(0.0, total * speed / scale - least) for speed in speeds]
    wanted = [share * rest / sum(wanted) for share in wanted] if sum(wanted) else [0.0] * len(speeds)
    given = [math.floor(share) for share in wanted]
    behind = sorted(range(len(speeds)), key=lambda rank: given[rank] - wanted[rank])
    for rank in behind[: rest - sum(given)]:
        given[rank] += 1
    return tuple(least + count for count in given)


@dataclass(frozen=True)
class Segment:
    """A named stretch of tokens.

    Attributes:
        length: tokens over all ranks.
        grid: sizes of the tensor dims that the tokens come from, where they are more than one (T, H, W).
        whole: every rank keeps all of it, whatever its length.
        shares: tokens of each rank, at least one, where they are not to be dealt evenly.
    """

    name: str
    length: int
    grid: tuple[int, ...] = ()
    whole: bool = False
    shares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert not self.shares or (sum(self.shares) == self.length and min(self.shares) > 0), self


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the segments of one region lie on `size` ranks, seen from `rank`.

    Each segment is cut by itself, unevenly where it must be. One that is shorter than `size`, or declared
    whole, is replicated: a rank without a single row of a segment would break models that infer sizes from it.
    In every method `over` names the segments that a tensor's token dim concatenates, in that order.

    Attributes:
        speeds: of the ranks, to which their parts are in proportion; () for even parts.
    """

    segments: tuple[Segment, ...]
    rank: int
    size: int
    speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        names = [segment.name for segment in self.segments]
        assert len(set(names)) == len(names), names
        assert 0 <= self.rank < self.size, (self.rank, self.size)
        assert len(self.speeds) in (0, self.size), (self.speeds, self.size)

    def length(self, name: str) -> int:
        """Tokens of a segment over all ranks."""
        return self.segment(name).length

    def segment(self, name: str) -> Segment:
        """The segment of that name."""
        return next(segment for segment in self.segments if segment.name == name)

    def replicated(self, name: str) -> bool:
        """Whether every rank holds the whole segment."""
        segment = self.segment(name)
        return segment.whole or (segment.length < self.size and not segment.shares)

    def span(self, name: str, *, rank: int | None = None) -> tuple[int, int]:
        """(start, stop) within the segment of what `rank` (default: this one) holds."""
        segment, index = self.segment(name), self.rank if rank is None else rank
        if self.replicated(name):
            return 0, segment.length
        shares = segment.shares
        if not shares and self.speeds:
            shares = dealt(segment.length, self.speeds, least=1)
        if shares:
            assert len(shares) == self.size, (segment, self.size)
            return sum(shares[:index]), sum(shares[: index + 1])
        return share(segment.length, rank=index, size=self.size)

    def total(self, over: Sequence[str]) -> int:
        """Tokens of the whole."""
        return sum(self.length(name) for name in over)

    def local(self, over: Sequence[str], *, rank: int | None = None) -> int:
        """Tokens that `rank` (default: this one) holds."""
        return sum(stop - start for start, stop in (self.span(name, rank=rank) for name in over))

    def boundary(self, position: int, *, over: Sequence[str]) -> int:
        """How many of this rank's tokens lie before a global position: the local form of a boundary."""
        before = offset = 0
        for name in over:
            start, stop = self.span(name)
            before += min(max(position - offset - start, 0), stop - start)
            offset += self.length(name)
        return before

    def positions(self, over: Sequence[str], *, device: torch.device) -> torch.Tensor:
        """Global positions of this rank's tokens, int64 [local]."""
        parts, offset = [], 0
        for name in over:
            start, stop = self.span(name)
            parts.append(torch.arange(offset + start, offset + stop, device=device))
            offset += self.length(name)
        return torch.cat(parts)

    def split(self, x: torch.Tensor, *, dim: int, over: Sequence[str]) -> torch.Tensor:
        """This rank's part of a whole tensor, of any dtype, as a tensor that owns its memory.

        Blocks write into what they are given, and a view would keep the whole activation alive.
        """
        assert x.shape[dim] == self.total(over), (tuple(x.shape), dim, self)
        parts, offset = [], 0
        for name in over:
            start, stop = self.span(name)
            parts.append(x.narrow(dim, offset + start, stop - start))
            offset += self.length(name)
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)

    def join(self, chunks: Sequence[torch.Tensor], *, dim: int, over: Sequence[str]) -> torch.Tensor:
        """The whole tensor from every rank's part, in rank order.

        A replicated segment is taken from rank 0, so that all ranks get the same bytes.
        """
        offsets = [0] * self.size
        parts = []
        for name in over:
            for rank, chunk in enumerate(chunks):
                start, stop = self.span(name, rank=rank)
                if rank == 0 or not self.replicated(name):
                    parts.append(chunk.narrow(dim, offsets[rank], stop - start))
                offsets[rank] += stop - start
        return torch.cat(parts, dim)


def gather(x: torch.Tensor, *, dim: int, over: Sequence[str], layout: Layout, comm: Comm) -> torch.Tensor:
    """The whole tensor from this rank's part `x`: a collective of the ranks of `comm`; equal bytes on all of them."""
    assert x.shape[dim] == layout.local(over), (tuple(x.shape), dim, layout)
    if all(layout.replicated(name) for name in over):
        return comm.broadcast(x)
    sizes = [layout.local(over, rank=rank) for rank in range(layout.size)]
    return layout.join(comm.all_gather(x, dim=dim, sizes=sizes), dim=dim, over=over)
