"""Ring attention: keys and values travel between the ranks, and what each adds is merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .comm import Comm
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
    mask: BlockMask | None,
    scale: float,
    exact: bool,
) -> torch.Tensor:
    """Attention of this rank's queries over the keys of all ranks of the ring, size - 1 transfers.

    Args:
        q: [B, Lq, H, D], with equal H on all ranks; with H = 0 only the transfers are counted.
        own: keys and values that take part first, [B, Lk, H, D].
        going: those of them that the other ranks do not have, contiguous; they travel.
        lengths: tokens of `going` on each rank of the ring.
        own_pieces, pieces: positions of the keys of `own`, and of `going` on each rank.
        mask: of q's rows and all keys.
        exact: keep from kernels of low precision.

    Returns:
        [B, H, Lq, D], fp32 or wider.
    """
    q = q.transpose(1, 2)
    if mask is not None:
        q = mask.query(q)
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
                allowed = None if mask is None else mask.block(positions)
                total = merge(total, kernel.with_lse(q, k, v, mask=allowed, scale=scale, exact=exact))
        finally:
            # also after an error: a transfer in flight must not lose its memory
            if passing is not None:
                keys = going = passing.wait()
                positions = pieces[(comm.rank - step - 1) % comm.size]
    if total is None:
        v = own[1]
        return v.new_zeros(v.shape[0], v.shape[2], q.shape[2], v.shape[3])
    return total[0] if mask is None else mask.finish(total[0])


def attend_whole(
    q: torch.Tensor,
    own: Sequence[torch.Tensor],
    *,
    pieces: Pieces,
    comm: Comm,
    kernel: LocalKernel,
    mask: BlockMask | None,
    scale: float,
    exact: bool,
) -> torch.Tensor:
    """Attention of queries that all ranks have, over the keys of all ranks of the ring: one all-gather of results.

    Merged in the order of the ranks, so that all of them get the same bytes.

    Args:
        q: [B, Lq, H, D], equal on all ranks.
        own: this rank's keys and values, [B, Lk, H, D], each key on one rank.
        pieces: their positions.

    Returns:
        [B, H, Lq, D], fp32 or wider.
    """
    q = q.transpose(1, 2)
    if mask is not None:
        q = mask.query(q)
    k, v = (t.transpose(1, 2) for t in own)
    dtype = torch.promote_types(v.dtype, torch.float32)
    rows = (q.shape[0], q.shape[1], q.shape[2])
    if q.shape[1] and k.shape[2]:
        allowed = None if mask is None else mask.block(pieces)
        out, lse = kernel.with_lse(q, k, v, mask=allowed, scale=scale, exact=exact)
    else:
        out, lse = v.new_zeros(*rows, v.shape[3], dtype=dtype), v.new_full(rows, -torch.inf, dtype=dtype)
    packed = torch.cat([out.to(dtype), lse.to(dtype)[..., None]], -1)
    total: Part | None = None
    for part in comm.all_gather(packed, dim=0, sizes=[rows[0]] * comm.size):
        total = merge(total, (part[..., :-1], part[..., -1]))
    assert total is not None
    return total[0] if mask is None else mask.finish(total[0])
