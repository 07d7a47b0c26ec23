"""Collectives of one group of ranks, with uneven sizes: the only user of torch.distributed's collectives."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist


class Meter:
    """What the groups of a mesh have done together.

    Attributes:
        count: collectives entered. Ranks that failed with equal counts failed at the same point, with
            nobody left waiting.
        seconds: wall clock spent inside collectives. On an accelerator that is the time to queue them,
            unless each is synchronised.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Count one collective, before it starts, and time it."""
        self.count += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class Comm:
    """One group of ranks and this process's place in it. Only `Mesh` makes them.

    Sizes always come from the caller, who computes them from shapes: nothing is communicated to learn
    them, so no rank can wait for another's arithmetic. In a group of one every method returns its input.
    Data travels as bytes, so every dtype works on every backend; only `all_reduce` needs a dtype that
    the backend can add.

    Attributes:
        rank: this process's index in the group.
        size: ranks in the group.
        ranks: their global ranks.
        meter: the mesh's counter.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, ranks: tuple[int, ...], rank: int, meter: Meter) -> None:
        assert (group is None) == (len(ranks) == 1), ranks
        self._group = group
        self.ranks = ranks
        self.rank = rank
        self.size = len(ranks)
        self.meter = meter

    @property
    def count(self) -> int:
        """Collectives entered on this rank by all groups of the mesh."""
        return self.meter.count

    def exchange(self, flat: torch.Tensor, *, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """All-to-all of a flat contiguous tensor.

        Args:
            flat: [sum(send)], any dtype; the first send[0] elements go to rank 0, and so on.
            send: elements for each rank.
            receive: elements from each rank.

        Returns:
            [sum(receive)], what came from rank 0 first.
        """
        if self.size == 1:
            return flat
        width = flat.element_size()
        out = flat.new_empty(sum(receive))
        with self.meter.collective():
            dist.all_to_all_single(
                out.view(torch.uint8),
                flat.view(torch.uint8),
                [count * width for count in receive],
                [count * width for count in send],
                group=self._group,
            )
        return out

    def all_to_all(self, pieces: Sequence[torch.Tensor], *, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Give pieces[i] to rank i and get a contiguous tensor of shapes[i] from it; one dtype for all of them."""
        if self.size == 1:
            return list(pieces)
        receive = [math.prod(shape) for shape in shapes]
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        out = self.exchange(flat, send=[piece.numel() for piece in pieces], receive=receive)
        return [part.view(list(shape)) for part, shape in zip(out.split(receive), shapes, strict=True)]

    def all_gather(self, x: torch.Tensor, *, dim: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's `x`, in rank order; rank i's has sizes[i] along `dim`, and is equal in all other dims."""
        if self.size == 1:
            return [x]
        assert x.shape[dim] == sizes[self.rank], (tuple(x.shape), dim, sizes)
        most = max(sizes)
        mine = x.movedim(dim, 0).contiguous()
        if mine.shape[0] < most:
            # equal counts are the one form that gloo and NCCL share, and the padding is at most a row
            padded = mine.new_zeros(most, *mine.shape[1:])
            padded[: mine.shape[0]] = mine
            mine = padded
        out = mine.new_empty(self.size, *mine.shape)
        with self.meter.collective():
            dist.all_gather_into_tensor(
                out.view(-1).view(torch.uint8), mine.view(-1).view(torch.uint8), group=self._group
            )
        return [chunk[:size].movedim(0, dim) for chunk, size in zip(out.unbind(0), sizes, strict=True)]

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """The `x` of the group's rank 0; every rank passes one of the same shape and dtype."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        with self.meter.collective():
            dist.broadcast(out.view(-1).view(torch.uint8), src=self.ranks[0], group=self._group)
        return out

    def all_reduce(self, x: torch.Tensor, *, op: Literal["sum", "max"] = "sum") -> torch.Tensor:
        """Sum or maximum of every rank's `x`, all of one shape and dtype."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        with self.meter.collective():
            dist.all_reduce(out, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=self._group)
        return out
