"""Collectives of one group of ranks, with uneven sizes: the only user of torch.distributed's collectives."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist

Beside = tuple[torch.Tensor | None, torch.Tensor | None]
"""What comes from the rank before and from the one after; None where there is no such rank or nothing to get."""


class Place:
    """Where a rank is: `since` is when it began to wait for others, by `time.monotonic()`, None while it does not."""

    def __init__(self) -> None:
        self.since: float | None = None


class Meter:
    """What the groups of a mesh have done together.

    Attributes:
        place: says whether this rank waits at the moment; several meters may have one.
        count: collectives entered. Ranks that failed with equal counts failed at the same point, with
            nobody left waiting.
        seconds: wall clock spent inside collectives. On an accelerator that is the time to queue them,
            unless each is synchronised.
        bytes_sent: payload that this rank has given to other ranks, by kind: "all_to_all" and "ring" what
            goes to others, "all_gather" and "all_reduce" its own part times size - 1, "broadcast" the
            same on the rank that gives it, "halo" and "first" what goes to neighbours and to rank 0, "weights"
            its parts of blocks. Padding does not count.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()
        self.count = 0
        self.seconds = 0.0
        self.bytes_sent: Counter[str] = Counter()

    def collective(self, kind: str, sent: int) -> AbstractContextManager[None]:
        """Count one collective and the bytes it sends, before it starts; what is entered times it."""
        self.count += 1
        self.bytes_sent[kind] += sent
        return self.waiting()

    def repeat(self, count: int, sent: Counter[str]) -> None:
        """Count collectives that a device repeats by itself."""
        self.count += count
        self.bytes_sent.update(sent)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time what belongs to a collective that has been counted."""
        start = time.perf_counter()
        self.place.since = time.monotonic()
        try:
            yield
        finally:
            self.place.since = None
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

    def all_to_all(self, pieces: Sequence[torch.Tensor], *, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Give pieces[i] to rank i and get a contiguous tensor of shapes[i] from it; one dtype for all of them."""
        if self.size == 1:
            return list(pieces)
        got = self.trade([[piece] for piece in pieces], shapes, dim=0)
        return [pieces[self.rank].contiguous() if part is None else part for part in got]

    def trade(
        self,
        going: Sequence[Sequence[torch.Tensor]],
        shapes: Sequence[Sequence[int]],
        *,
        dim: int,
    ) -> list[torch.Tensor | None]:
        """Give tensors going[i], joined along `dim`, to rank i and get a contiguous one of shapes[i] from it.

        All travel as one, in a group of several. What this rank would give itself is left alone: None in its place.

        Args:
            going: one dtype for all of them, at least one tensor for every rank; those without elements are not sent.
        """
        send, receive = (
            [0 if rank == self.rank else count for rank, count in enumerate(side)]
            for side in ([sum(t.numel() for t in tensors) for tensors in going], map(math.prod, shapes))
        )
        flat = going[0][0].new_empty(sum(send))
        for tensors, part in zip(going, flat.split(send), strict=True):
            if part.numel():
                whole = list(tensors[0].shape)
                whole[dim] = sum(t.shape[dim] for t in tensors)
                torch.cat(list(tensors), dim, out=part.view(whole))
        (got,) = self._exchange(flat, send, receive, "all_to_all").wait()
        return [
            None if rank == self.rank else part.view(list(shape))
            for rank, (part, shape) in enumerate(zip(got.split(receive), shapes, strict=True))
        ]

    def _exchange(self, flat: torch.Tensor, send: list[int], receive: list[int], kind: str) -> Passing:
        """Start giving each rank so many elements of `flat`, in rank order, and getting so many of it."""
        got, itemsize = flat.new_empty(sum(receive)), flat.element_size()
        with self.meter.collective(kind, flat.nbytes):
            work = dist.all_to_all_single(
                got.view(torch.uint8),
                flat.view(torch.uint8),
                [count * itemsize for count in receive],
                [count * itemsize for count in send],
                group=self._group,
                async_op=True,
            )
        return Passing([flat], [got], [work], self.meter)

    def start_swap(self, going: Sequence[Sequence[torch.Tensor]], coming: Sequence[Sequence[torch.Tensor]]) -> Passing:
        """Start giving tensors going[i] to rank i and filling coming[i] with what it gives, in a group of several.

        Counts as one collective. Each tensor goes from where it is to where it belongs, which takes ten times as long
        to start as `trade`. What this rank would give itself is left alone, and what is empty is not sent.

        Args:
            going, coming: contiguous, any dtype; what a rank gives and what the other takes agree in number and bytes.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        sent = [t for rank in others for t in going[rank] if t.numel()]
        with self.meter.collective("all_to_all", sum(t.nbytes for t in sent)):
            steps = [
                self._step(verb, t, self.ranks[rank])
                for rank in others
                for verb, tensors in ((dist.isend, going[rank]), (dist.irecv, coming[rank]))
                for t in tensors
                if t.numel()
            ]
            works = dist.batch_isend_irecv(steps) if steps else []
        return Passing(sent, [], works, self.meter)

    def all_gather(self, x: torch.Tensor, *, dim: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's `x`, in rank order; rank i's has sizes[i] along `dim`, and is equal in all other dims."""
        if self.size == 1:
            return [x]
        assert x.shape[dim] == sizes[self.rank], (tuple(x.shape), dim, sizes)
        most = max(sizes)
        sent = x.nbytes * (self.size - 1)
        mine = x.movedim(dim, 0).contiguous()
        if mine.shape[0] < most:
            # equal counts are the one form that gloo and NCCL share, and the padding is at most a row
            padded = mine.new_zeros(most, *mine.shape[1:])
            padded[: mine.shape[0]] = mine
            mine = padded
        out = self._stacked(mine, sent)
        return [chunk[:size].movedim(0, dim) for chunk, size in zip(out.unbind(0), sizes, strict=True)]

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`, all of one shape and dtype: [size, *x.shape], in rank order."""
        return x[None] if self.size == 1 else self._stacked(x.contiguous(), x.nbytes * (self.size - 1))

    def _stacked(self, x: torch.Tensor, sent: int) -> torch.Tensor:
        out = x.new_empty(self.size, *x.shape)
        with self.meter.collective("all_gather", sent):
            if out.numel():
                dist.all_gather_into_tensor(
                    out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8), group=self._group
                )
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """The `x` of the group's rank 0; every rank passes one of the same shape and dtype."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        with self.meter.collective("broadcast", 0 if self.rank else x.nbytes * (self.size - 1)):
            if out.numel():
                dist.broadcast(out.view(-1).view(torch.uint8), src=self.ranks[0], group=self._group)
        return out

    def all_reduce(self, x: torch.Tensor, *, op: Literal["sum", "max"] = "sum") -> torch.Tensor:
        """Sum or maximum of every rank's `x`, all of one shape and dtype."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        with self.meter.collective("all_reduce", x.nbytes * (self.size - 1)):
            dist.all_reduce(out, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=self._group)
        return out

    def pass_on(self, tensors: Sequence[torch.Tensor], *, shapes: Sequence[Sequence[int]]) -> Passing:
        """Start giving `tensors` to the next rank and taking tensors of `shapes` from the one before.

        Counts as one collective, also where there is nothing to give; what is empty is not sent.

        Args:
            tensors: contiguous, not written to until the passing is over.
            shapes: of what comes, one for each of `tensors`, in the same dtypes.
        """
        coming = [t.new_empty(list(shape)) for t, shape in zip(tensors, shapes, strict=True)]
        assert self.size > 1
        after, before = self.ranks[(self.rank + 1) % self.size], self.ranks[self.rank - 1]
        with self.meter.collective("ring", sum(t.nbytes for t in tensors)):
            steps = [self._step(dist.isend, t, after) for t in tensors if t.numel()]
            steps += [self._step(dist.irecv, t, before) for t in coming if t.numel()]
            works = dist.batch_isend_irecv(steps) if steps else []
        return Passing(tensors, coming, works, self.meter)

    def start_halo(self, x: torch.Tensor, *, dim: int, above: int, below: int) -> Callable[[], Beside]:
        """Start getting the neighbours' slices that border on `x`, where the ranks hold consecutive stretches of `dim`.

        Args:
            x: equal on all ranks in every other dim, with at least max(above, below) slices on each.
            above: slices to get from the end of the rank before, as every rank does.
            below: slices to get from the beginning of the rank after.

        Returns:
            What waits for both; call it also before giving up on an error.
        """
        length = x.shape[dim]
        assert max(above, below) <= length, (above, below, tuple(x.shape))
        # what one side gets of its neighbour, the neighbour gives
        sides = [(self.rank - 1, above, 0, below), (self.rank + 1, below, length - above, above)]
        here = [side for side in sides if 0 <= side[0] < self.size]
        if not here:
            return lambda: (None, None)
        send, receive, each = [0] * self.size, [0] * self.size, x.numel() // length
        for peer, wanted, _, given in here:
            send[peer], receive[peer] = given * each, wanted * each
        going, flat = [x.narrow(dim, start, given) for _, _, start, given in here], x.new_empty(sum(send))
        # packed at once where that can be: starting a copy takes longer than the copy
        if above == below:
            torch.stack(going, out=flat.view(len(going), *going[0].shape))
        else:
            torch.cat([part.reshape(-1) for part in going], out=flat)
        passing = self._exchange(flat, send, receive, "halo")
        top = above * each if self.rank else 0

        def slices(part: torch.Tensor, count: int) -> torch.Tensor | None:
            return part.view(*x.shape[:dim], count, *x.shape[dim + 1 :]) if part.numel() else None

        def arrived() -> Beside:
            (got,) = passing.wait()
            return slices(got[:top], above), slices(got[top:], below)

        return arrived

    def to_first(self, x: torch.Tensor | None, *, source: int, like: torch.Tensor) -> Passing:
        """Start giving rank `source`'s `x` to rank 0, which gets one of the shape and dtype of `like`.

        Every rank counts it as one collective, also those that have no part in it; the others pass no `x`.
        """
        steps: list[dist.P2POp] = []
        going = [x.contiguous()] if x is not None and 0 != self.rank == source else []
        coming = [torch.empty_like(like)] if self.rank == 0 != source else []
        with self.meter.collective("first", sum(t.nbytes for t in going)):
            steps += [self._step(dist.isend, t, self.ranks[0]) for t in going if t.numel()]
            steps += [self._step(dist.irecv, t, self.ranks[source]) for t in coming if t.numel()]
            works = dist.batch_isend_irecv(steps) if steps else []
        return Passing(going, coming, works, self.meter)

    def start_maximum(self, x: torch.Tensor) -> Passing:
        """Start the maximum of every rank's `x`, all of one shape and dtype."""
        out = x.clone(memory_format=torch.contiguous_format)
        if self.size == 1:
            return Passing([], [out], [], self.meter)
        with self.meter.collective("all_reduce", x.nbytes * (self.size - 1)):
            work = dist.all_reduce(out, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return Passing([], [out], [work], self.meter)

    def start_gather(self, mine: torch.Tensor, out: torch.Tensor) -> Passing:
        """Start putting every rank's `mine` into `out`, in rank order.

        Args:
            mine: flat bytes, as many on every rank, not written to until the passing is over.
            out: flat bytes, `size` times as many.
        """
        if self.size == 1:
            out.copy_(mine)
            return Passing([], [out], [], self.meter)
        with self.meter.collective("weights", mine.nbytes * (self.size - 1)):
            work = dist.all_gather_into_tensor(out, mine, group=self._group, async_op=True)
        return Passing([mine], [out], [work], self.meter)

    def _step(self, verb: Callable[..., Any], t: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(verb, t.view(-1).view(torch.uint8), peer, group=self._group)


class Passing:
    """Tensors on their way between ranks; `wait` for them also before giving up on an error."""

    def __init__(
        self, going: Sequence[torch.Tensor], coming: list[torch.Tensor], works: Sequence[Any], meter: Meter
    ) -> None:
        # kept, since a transfer in flight does not keep its memory
        self._going = going
        self._coming = coming
        self._works = works
        self._meter = meter

    def wait(self) -> list[torch.Tensor]:
        """What came, when it is there; on an accelerator, when work that is queued from here on may use it."""
        with self._meter.waiting():
            for work in self._works:
                work.wait()
        return self._coming
