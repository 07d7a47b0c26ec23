"""The exchange of tokens for heads between ranks (Ulysses), uneven where it must be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from ..comm import Comm
from ..layout import Layout, dealt, share

Span = tuple[int, int]
"""Heads start:stop."""


class Ulysses:
    """The exchange of tokens for heads between the ranks that hold one stretch of every segment together.

    Args:
        comm: those ranks.
        layout: how the segments are cut.
        order: how the segments are concatenated.
        sync: synchronise the device after each exchange.
        first: rank of the layout that comm's first one is.
    """

    def __init__(self, comm: Comm, *, layout: Layout, order: tuple[str, ...], sync: bool, first: int = 0) -> None:
        self.cut = tuple(name for name in order if not layout.replicated(name))
        self._comm = comm
        self._layout = layout
        self._order = order
        self._sync = sync
        self._first = first
        # all ring indices divide heads alike: keys and values of a rank's heads come from those of the same place
        self._speeds = (
            tuple(sum(layout.speeds[place :: comm.size]) for place in range(comm.size)) if layout.speeds else ()
        )
        # by segment: what every one of these ranks holds of it
        self._spans = {name: [layout.span(name, rank=first + rank) for rank in range(comm.size)] for name in order}

    def heads(self, count: int) -> list[Span]:
        """Every rank's span of so many heads."""
        return shares(count, self._comm.size, self._speeds)

    def turns(self, heads: int, count: int) -> list[list[Span]]:
        """Those spans in `count` parts: of all ranks in the first part, in the second, ..."""
        return [
            [
                (start + first, start + last)
                for start, stop in self.heads(heads)
                for first, last in [share(stop - start, rank=turn, size=count)]
            ]
            for turn in range(count)
        ]

    def stretch(self, name: str, *, index: int | None = None) -> tuple[int, int]:
        """(start, stop) within the segment of what these ranks, or those of ring index `index`, hold together."""
        if index is None:
            return self._spans[name][0][0], self._spans[name][-1][1]
        first = index * self._comm.size
        start, _ = self._layout.span(name, rank=first)
        _, stop = self._layout.span(name, rank=first + self._comm.size - 1)
        return start, stop

    def length(self, over: Sequence[str], *, index: int | None = None) -> int:
        """Tokens of some segments that they hold together."""
        return sum(stop - start for start, stop in (self.stretch(name, index=index) for name in over))

    def positions(self, over: Sequence[str], *, index: int | None = None) -> list[tuple[int, int]]:
        """Global ranges of those tokens, one for each segment."""
        offsets, offset = {}, 0
        for name in self._order:
            offsets[name] = offset
            offset += self._layout.length(name)
        spans = [(offsets[name], *self.stretch(name, index=index)) for name in over]
        return [(offset + start, offset + stop) for offset, start, stop in spans]

    def parts(self, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """The segments of a tensor of all their tokens [B, stretch, ...], as views."""
        lengths = [stop - start for start, stop in map(self.stretch, self._order)]
        return dict(zip(self._order, t.split(lengths, 1), strict=True))

    def select(self, t: torch.Tensor, over: Sequence[str]) -> torch.Tensor:
        """Some segments of a tensor of all their tokens, contiguous."""
        if tuple(over) == self._order:
            return t.contiguous()
        parts = self.parts(t)
        return torch.cat([t[:, :0], *(parts[name] for name in over)], 1)

    def to_heads(self, tensors: Sequence[torch.Tensor], *, heads: int, large: bool = False) -> list[torch.Tensor]:
        """[B, local, H, D] each -> [B, stretch, this rank's heads, D] each, tokens in the model's own order.

        Args:
            large: send each tensor from where it is to where it goes. Otherwise all travel as one, which copies them
                twice and takes a tenth of the time to start. Equal on all ranks.
        """
        if self._comm.size == 1:
            return list(tensors)
        spans = self.heads(heads)
        if large:
            return self.start_heads(tensors, spans=spans)()
        alike = len({(t.shape, t.dtype) for t in tensors}) == 1
        return [got for some in ([tensors] if alike else [[t] for t in tensors]) for got in self._heads(some, spans)]

    def _heads(self, tensors: Sequence[torch.Tensor], spans: Sequence[Span]) -> list[torch.Tensor]:
        """`to_heads` of tensors alike, with as few operations as can be: in small models they take the time."""
        rank, dtype, count = self._comm.rank, tensors[0].dtype, len(tensors)
        if all(map(_in_words, tensors)):
            tensors = [t.view(torch.int64) for t in tensors]
        start, stop = spans[rank]
        mine = torch.cat([t[:, :, start:stop] for t in tensors])
        own = self._segments(mine)
        if self.cut:
            rows, _, _, width = mine.shape
            lengths = [sum(self._held(name, other) for name in self.cut) for other in range(len(spans))]
            shapes = [(rows, length, stop - start, width) for length in lengths]
            leaving = tensors if len(own) == len(self.cut) else [self._cut_tokens(t) for t in tensors]
            going = [[t[:, :, first:last] for t in leaving] for first, last in spans]
            blocks = self._comm.trade(going, shapes, dim=0)
            self._synchronise(mine)
        pieces = []
        offsets = [0] * len(spans)
        for name in self._order:
            if name not in self.cut:
                pieces.append(own[name])
                continue
            for other, block in enumerate(blocks):
                length = self._held(name, other)
                pieces.append(own[name] if block is None else block.narrow(1, offsets[other], length))
                offsets[other] += length
        return list(torch.cat(pieces, 1).view(dtype).chunk(count))

    def _held(self, name: str, rank: int) -> int:
        """Tokens of a segment that one of these ranks holds."""
        start, stop = self._spans[name][rank]
        return stop - start

    def _cut_tokens(self, t: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of the segments that are cut."""
        parts = self._segments(t)
        return torch.cat([parts[name] for name in self.cut], 1)

    def start_heads(
        self, tensors: Sequence[torch.Tensor], *, spans: Sequence[Span]
    ) -> Callable[[], list[torch.Tensor]]:
        """Start `to_heads` for some heads of every rank, in a group of several; what is returned waits for them.

        All tensors travel in one exchange. What belongs to this rank is copied to its place and not sent, and what
        comes arrives in its place where that is contiguous.

        Args:
            spans: those heads, by rank.
        """
        comm, rank = self._comm, self._comm.rank
        start, stop = spans[rank]
        stretch = self.length(self._order)
        going: list[list[torch.Tensor]] = [[] for _ in spans]
        coming: list[list[torch.Tensor]] = [[] for _ in spans]
        later: list[tuple[torch.Tensor, torch.Tensor]] = []
        whole = []
        for t in tensors:
            whole.append(t.new_empty(t.shape[0], stretch, stop - start, t.shape[-1]))
            places = self.parts(whole[-1])
            for name, part in self._segments(t).items():
                if name not in self.cut:
                    _put(places[name], part[:, :, start:stop])
                    continue
                offset = self.stretch(name)[0]
                for other, (first, last) in enumerate(spans):
                    low, high = self._spans[name][other]
                    place = places[name][:, low - offset : high - offset]
                    if other == rank:
                        _put(place, part[:, :, start:stop])
                        continue
                    going[other].append(_compact(part[:, :, first:last]))
                    coming[other].append(
                        place
                        if place.is_contiguous()
                        else torch.empty_like(place, memory_format=torch.contiguous_format)
                    )
                    if coming[other][-1] is not place:
                        later.append((place, coming[other][-1]))
        passing = comm.start_swap(going, coming) if self.cut else None

        def arrived() -> list[torch.Tensor]:
            if passing is not None:
                passing.wait()
                self._synchronise(whole[0])
            for place, got in later:
                _put(place, got)
            return whole

        return arrived

    def _segments(self, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """The segments of a tensor of this rank's tokens [B, local, ...], as views."""
        lengths = [self._held(name, self._comm.rank) for name in self._order]
        return dict(zip(self._order, t.split(lengths, 1), strict=True))

    def to_tokens(self, out: torch.Tensor, *, heads: int, width: int, large: bool = False) -> torch.Tensor:
        """[B, stretch, this rank's heads * D] -> [B, local, H * D]; `large` as in `to_heads`.

        Replicated tokens go to every rank from the ranks that own their heads, so their bytes agree.
        """
        if self._comm.size == 1:
            return out
        spans = self.heads(heads)
        if not large:
            return self._tokens(out, spans, width)
        whole = self.room(out, heads=heads, width=width)
        self.start_tokens(out, whole, spans=spans, width=width)()
        return whole

    def _tokens(self, out: torch.Tensor, spans: Sequence[Span], width: int) -> torch.Tensor:
        """`to_tokens` with few operations."""
        rank, dtype = self._comm.rank, out.dtype
        if width * out.element_size() % 8 == 0 and _in_words(out):
            out, width = out.view(torch.int64), width * out.element_size() // 8
        going = self._by_rank(out)
        mine = _joined(going[rank])
        blocks = self._comm.trade(going, [(*mine.shape[:2], (last - first) * width) for first, last in spans], dim=1)
        self._synchronise(out)
        return torch.cat([mine if block is None else block for block in blocks], 2).view(dtype)

    def _by_rank(self, out: torch.Tensor) -> list[list[torch.Tensor]]:
        """What each of these ranks holds of a tensor of all their tokens [B, stretch, ...], a view for each segment."""
        found: list[list[torch.Tensor]] = [[] for _ in range(self._comm.size)]
        for name, part in self.parts(out).items():
            offset = self.stretch(name)[0]
            for views, (start, stop) in zip(found, self._spans[name], strict=True):
                views.append(part[:, start - offset : stop - offset])
        return found

    def room(self, like: torch.Tensor, *, heads: int, width: int) -> torch.Tensor:
        """[B, local, H * D] for `start_tokens` to fill."""
        return like.new_empty(like.shape[0], self._layout.local(self._order), heads * width)

    def start_tokens(
        self, out: torch.Tensor, whole: torch.Tensor, *, spans: Sequence[Span], width: int
    ) -> Callable[[], None]:
        """Start `to_tokens` for some heads of every rank, in a group of several.

        What is returned waits for them and puts them into their place in `whole`.

        Args:
            out: [B, stretch, this rank's of those heads * D].
            spans: those heads, by rank.
        """
        comm = self._comm
        places = [whole[:, :, a * width : b * width] for a, b in spans]
        going: list[list[torch.Tensor]] = []
        for rank, views in enumerate(self._by_rank(out)):
            joined = _joined(views)
            if rank == comm.rank:
                _put(places[rank], joined)
            going.append([] if rank == comm.rank else [_compact(joined)])
        coming = [
            [] if rank == comm.rank else [torch.empty_like(place, memory_format=torch.contiguous_format)]
            for rank, place in enumerate(places)
        ]
        passing = comm.start_swap(going, coming)

        def arrived() -> None:
            passing.wait()
            self._synchronise(out)
            for place, got in zip(places, coming, strict=True):
                for t in got:
                    _put(place, t)

        return arrived

    def join_heads(self, out: torch.Tensor, *, heads: int, width: int) -> torch.Tensor:
        """[B, L, this rank's heads * D] -> [B, L, H * D], the same bytes on all ranks."""
        sizes = [(b - a) * width for a, b in self.heads(heads)]
        got = self._comm.all_gather(out, dim=2, sizes=sizes)
        self._synchronise(out)
        return torch.cat(got, 2) if len(got) > 1 else got[0]

    def _synchronise(self, t: torch.Tensor) -> None:
        if self._sync and t.device.type != "cpu":
            torch.get_device_module(t.device).synchronize()


def _compact(t: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous."""
    if t.is_contiguous():
        return t
    whole = torch.empty_like(t, memory_format=torch.contiguous_format)
    _put(whole, t)
    return whole


def _put(place: torch.Tensor, values: torch.Tensor) -> None:
    """Copy, in elements of 8 bytes where that can be: a strided copy takes as long per element, however small."""
    if all(map(_in_words, (place, values))):
        place, values = place.view(torch.int64), values.view(torch.int64)
    place.copy_(values)


def _in_words(t: torch.Tensor) -> bool:
    """Whether the bytes of every stretch of the last dim are whole words of 8."""
    ratio = 8 // t.element_size()
    steps = (t.shape[-1], t.storage_offset(), *t.stride()[:-1])
    return ratio > 1 and t.stride(-1) == 1 and not any(step % ratio for step in steps)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def shares(heads: int, size: int, speeds: tuple[float, ...] = ()) -> list[Span]:
    """Every rank's span of the heads, in proportion to their speeds where there are some."""
    if not speeds:
        return [share(heads, rank=rank, size=size) for rank in range(size)]
    ends = list(itertools.accumulate(dealt(heads, speeds)))
    return list(zip([0, *ends], ends, strict=False))
