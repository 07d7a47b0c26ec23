"""Ring attention: keys and values travel between the ranks, and what each adds is merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..comm import Comm
from .kernels import LocalKernel
from .torch_kernels import Part

SWAMPED = -1e8
"""Scores that a mask lowers by more than this have no bits left of their own: such rows are plain averages."""
NEVER = -1e30
"""What takes the place of -inf in a mask: its exponential is zero, and sums of it stay finite."""

Pieces = Sequence[tuple[int, int]]
"""Ranges (start, stop) of global key positions, in the order of the keys in a block."""


class BlockMask:
    """One mask over all keys, in the form that a kernel may take it block by block.

    The kernels differ in what they return for rows without a key, so they never see one: a mask is lowered to
    its largest value per row and made finite, and `finish` clears the rows that have no key at all.

    Args:
        mask: [B or 1, H or 1, Lq or 1, Lk or 1], bool (True takes part) or added to the scores.
        keys: Lk.
        dtype: of the queries.
    """

    def __init__(self, mask: torch.Tensor, *, keys: int, dtype: torch.dtype) -> None:
        self._mask = mask.expand(*mask.shape[:3], keys)
        self._dtype = dtype
        if mask.dtype == torch.bool:
            self._empty = ~mask.any(-1, keepdim=True)
            self._top = None
            self._flat = None
        else:
            top = mask.amax(-1, keepdim=True)
            self._empty = top == -torch.inf
            self._top = top.masked_fill(self._empty, 0)
            self._flat = self._top < SWAMPED

    def query(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, H, Lq, D] as the blocks of this mask need it."""
        return q if self._flat is None else q.masked_fill(self._flat, 0)

    def block(self, pieces: Pieces) -> torch.Tensor:
        """The mask of some keys: finite, in the queries' dtype, [B or 1, H or 1, Lq or 1, keys]."""
        parts = [self._mask[..., start:stop] for start, stop in pieces]
        part = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        lowest = max(NEVER, torch.finfo(self._dtype).min)
        if self._top is None:
            return torch.zeros(part.shape, dtype=self._dtype, device=part.device).masked_fill_(~part, lowest)
        return (part - self._top).clamp_(min=lowest).to(self._dtype)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """out [B, H, Lq, D] with zeros where no key takes part, as in plain attention."""
        return out.masked_fill_(self._empty, 0)


@dataclass(frozen=True)
class Rows:
    """Some of the queries at hand, start:stop, and how the model wants their attention.

    Attributes:
        mask: of these queries and all keys.
        exact: keep them from kernels of low precision.
    """

    start: int
    stop: int
    mask: BlockMask | None
    exact: bool

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """Their part of a tensor [B, H, Lq, ...], a view."""
        return t[:, :, self.start : self.stop]


def _asked(q: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
    """q [B, H, Lq, D] as the blocks of its masks need it."""
    if all(part.mask is None for part in rows):
        return q
    return _joined([part.of(q) if part.mask is None else part.mask.query(part.of(q)) for part in rows])


def _over(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: Pieces,
    *,
    rows: Sequence[Rows],
    kernel: LocalKernel,
    scale: float,
) -> Part:
    """Attention of q over the keys at some positions, each of its rows with its mask."""
    found = []
    for part in rows:
        allowed = None if part.mask is None else part.mask.block(pieces)
        found.append(kernel.with_lse(part.of(q), k, v, mask=allowed, scale=scale, exact=part.exact))
    outs, lses = zip(*found, strict=True)
    return _joined(outs), _joined(lses)


def _finished(out: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
    """out [B, H, Lq, D], which is written to, with zeros in the rows without a key."""
    for part in rows:
        if part.mask is not None:
            part.mask.finish(part.of(out))
    return out


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts), 2) if len(parts) > 1 else parts[0]


def merge(first: Part | None, second: Part) -> Part:
    """Attention over the keys of both parts; the sums are fp32 or wider, and `first` is written to.

    A part without keys has a log-sum-exp of -inf; at most one of both may have one.
    """
    out, lse = second
    if first is None:
        return out.to(torch.promote_types(out.dtype, torch.float32)), lse
    total, before = first
    # second's weight, e^b / (e^a + e^b)
    return total.lerp_(out.to(total.dtype), torch.sigmoid(lse - before)[..., None]), torch.logaddexp(before, lse)


def attend(
    q: torch.Tensor,
    own: Sequence[torch.Tensor],
    going: Sequence[torch.Tensor],
    *,
    lengths: Sequence[int],
    own_pieces: Pieces,
    pieces: Sequence[Pieces],
    comm: Comm,
    kernel: LocalKernel,
    rows: Sequence[Rows],
    scale: float,
) -> torch.Tensor:
    """Attention of this rank's queries over the keys of all ranks of the ring, size - 1 transfers.

    Args:
        q: [B, Lq, H, D], with equal H on all ranks; with H = 0 only the transfers are counted.
        own: keys and values that take part first, [B, Lk, H, D].
        going: those of them that the other ranks do not have, contiguous; they travel.
        lengths: tokens of `going` on each rank of the ring.
        own_pieces, pieces: positions of the keys of `own`, and of `going` on each rank.
        rows: the queries, in parts that follow each other.

    Returns:
        [B, H, Lq, D], fp32 or wider.
    """
    q = _asked(q.transpose(1, 2), rows)
    total: Part | None = None
    keys, positions = own, own_pieces
    for step in range(comm.size):
        passing = None
        if step < comm.size - 1:
            length = lengths[(comm.rank - step - 1) % comm.size]
            passing = comm.pass_on(going, shapes=[(t.shape[0], length, *t.shape[2:]) for t in going])
        try:
            if q.shape[1] and keys[0].shape[1]:
                k, v = (t.transpose(1, 2) for t in keys)
                total = merge(total, _over(q, k, v, positions, rows=rows, kernel=kernel, scale=scale))
        finally:
            # also after an error: a transfer in flight must not lose its memory
            if passing is not None:
                keys = going = passing.wait()
                positions = pieces[(comm.rank - step - 1) % comm.size]
    if total is None:
        v = own[1]
        return v.new_zeros(v.shape[0], v.shape[2], q.shape[2], v.shape[3])
    return _finished(total[0], rows)


def attend_whole(
    q: torch.Tensor,
    own: Sequence[torch.Tensor],
    *,
    pieces: Pieces,
    comm: Comm,
    kernel: LocalKernel,
    rows: Sequence[Rows],
    scale: float,
) -> torch.Tensor:
    """Attention of queries that all ranks have, over the keys of all ranks of the ring: one all-gather of results.

    Merged in the order of the ranks, so that all of them get the same bytes.

    Args:
        q: [B, Lq, H, D], equal on all ranks.
        own: this rank's keys and values, [B, Lk, H, D], each key on one rank.
        pieces: their positions.
        rows: the queries, in parts that follow each other.

    Returns:
        [B, H, Lq, D], fp32 or wider.
    """
    q = _asked(q.transpose(1, 2), rows)
    k, v = (t.transpose(1, 2) for t in own)
    dtype = torch.promote_types(v.dtype, torch.float32)
    shape = (q.shape[0], q.shape[1], q.shape[2])
    if q.shape[1] and k.shape[2]:
        out, lse = _over(q, k, v, pieces, rows=rows, kernel=kernel, scale=scale)
    else:
        out, lse = v.new_zeros(*shape, v.shape[3], dtype=dtype), v.new_full(shape, -torch.inf, dtype=dtype)
    packed = torch.cat([out.to(dtype), lse.to(dtype)[..., None]], -1)
    total: Part | None = None
    for part in comm.all_gather(packed, dim=0, sizes=[shape[0]] * comm.size):
        total = merge(total, (part[..., :-1], part[..., -1]))
    assert total is not None
    return _finished(total[0], rows)
