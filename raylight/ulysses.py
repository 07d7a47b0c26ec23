"""The exchange of tokens for heads between ranks (Ulysses), uneven where it must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .comm import Comm
from .layout import Layout, share


class Ulysses:
    """The exchange of tokens for heads between the ranks that hold one stretch of every segment together.

    Args:
        comm: those ranks.
        layout: how the segments are cut.
        order: how the segments are concatenated.
        pack: move several tensors in one exchange where their shapes and dtypes agree; the same result.
        sync: synchronise the device after each exchange.
        first: rank of the layout that comm's first one is.
    """

    def __init__(
        self, comm: Comm, *, layout: Layout, order: tuple[str, ...], pack: bool, sync: bool, first: int = 0
    ) -> None:
        self.cut = tuple(name for name in order if not layout.replicated(name))
        self._comm = comm
        self._layout = layout
        self._order = order
        self._pack = pack
        self._sync = sync
        self._first = first

    def stretch(self, name: str, *, index: int | None = None) -> tuple[int, int]:
        """(start, stop) within the segment of what these ranks, or those of ring index `index`, hold together."""
        first = self._first if index is None else index * self._comm.size
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

    def to_heads(self, tensors: Sequence[torch.Tensor], *, heads: int) -> list[torch.Tensor]:
        """[B, local, H, D] each -> [B, stretch, this rank's heads, D] each, tokens in the model's own order."""
        if self._comm.size == 1:
            return list(tensors)
        first = tensors[0]
        if self._pack and all(t.shape == first.shape and t.dtype == first.dtype for t in tensors):
            return self._trade(tensors, heads=heads)
        return [whole for t in tensors for whole in self._trade([t], heads=heads)]

    def _trade(self, tensors: Sequence[torch.Tensor], *, heads: int) -> list[torch.Tensor]:
        layout, comm = self._layout, self._comm
        batch, _, _, width = tensors[0].shape
        spans = shares(heads, comm.size)
        start, stop = spans[comm.rank]
        mine = stop - start
        segments = [self._segments(t) for t in tensors]
        if len(self.cut) == len(self._order):
            travelling = list(tensors)
        else:
            travelling = [torch.cat([s[name] for name in self.cut], 1) for s in segments] if self.cut else []
        counts = [layout.local(self.cut, rank=self._first + rank) for rank in range(comm.size)]
        chunks: list[torch.Tensor] = []
        if self.cut:
            flat = torch.cat([t[:, :, a:b].reshape(-1) for a, b in spans for t in travelling])
            send = [len(tensors) * batch * counts[comm.rank] * (b - a) * width for a, b in spans]
            receive = [len(tensors) * batch * count * mine * width for count in counts]
            got = comm.exchange(flat, send=send, receive=receive)
            self._synchronise(got)
            if batch == len(tensors) == len(self._order) == 1:
                # what arrives is already in order
                return [got.view(1, sum(counts), mine, width)]
            chunks = [
                chunk.view(len(tensors), batch, count, mine, width)
                for chunk, count in zip(got.split(receive), counts, strict=True)
            ]
        whole = []
        for index in range(len(tensors)):
            parts, offsets = [], [0] * comm.size
            for name in self._order:
                if name not in self.cut:
                    parts.append(segments[index][name][:, :, start:stop])
                    continue
                for rank, chunk in enumerate(chunks):
                    a, b = layout.span(name, rank=self._first + rank)
                    parts.append(chunk[index].narrow(1, offsets[rank], b - a))
                    offsets[rank] += b - a
            whole.append(torch.cat(parts, 1))
        return whole

    def _segments(self, t: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._order, t.split([self._layout.local((name,)) for name in self._order], 1), strict=True))

    def to_tokens(self, out: torch.Tensor, *, heads: int, width: int) -> torch.Tensor:
        """[B, stretch, this rank's heads * D] -> [B, local, H * D].

        Replicated tokens go to every rank from the ranks that own their heads, so their bytes agree.
        """
        layout, comm = self._layout, self._comm
        if comm.size == 1:
            return out
        parts = [(name, part, self.stretch(name)[0]) for name, part in self.parts(out).items()]
        pieces = []
        for rank in range(comm.size):
            cut = []
            for name, part, start in parts:
                a, b = layout.span(name, rank=self._first + rank)
                cut.append(part[:, a - start : b - start])
            pieces.append(torch.cat(cut, 1) if len(cut) > 1 else cut[0])
        local = layout.local(self._order)
        shapes = [(out.shape[0], local, (b - a) * width) for a, b in shares(heads, comm.size)]
        got = comm.all_to_all(pieces, shapes=shapes)
        self._synchronise(out)
        return torch.cat(got, 2)

    def join_heads(self, out: torch.Tensor, *, heads: int, width: int) -> torch.Tensor:
        """[B, L, this rank's heads * D] -> [B, L, H * D], the same bytes on all ranks."""
        sizes = [(b - a) * width for a, b in shares(heads, self._comm.size)]
        got = self._comm.all_gather(out, dim=2, sizes=sizes)
        self._synchronise(out)
        return torch.cat(got, 2) if len(got) > 1 else got[0]

    def _synchronise(self, t: torch.Tensor) -> None:
        if self._sync and t.device.type != "cpu":
            torch.get_device_module(t.device).synchronize()


def shares(heads: int, size: int) -> list[tuple[int, int]]:
    """Every rank's span of the heads."""
    return [share(heads, rank=rank, size=size) for rank in range(size)]
