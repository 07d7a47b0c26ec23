"""Attention over a sequence that is cut over ranks: tokens for heads (Ulysses), and around a ring what remains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import MisfitError, PlanError, UnsupportedError
from ..layout import Layout, gather
from ..mesh import Mesh
from . import ring
from .kernels import LocalKernel, scale_of
from .masks import Mask, QueryMask, QueryMasks, four_dims, of_heads
from .ulysses import Span, Ulysses

Kernel = Callable[..., torch.Tensor]
"""ComfyUI's attention signature: (q, k, v, heads, mask=None, skip_reshape=False, ...) -> [B, L, heads * D]."""

TURNS = 4
"""Turns at most in which heads are exchanged while others compute: what stays visible is one part of as many."""
LARGE_FLOPS = 1e12
"""What a rank has to compute, in each turn, for an exchange whose start takes longer than one that copies: a
millisecond or two of the fastest devices."""


class SequenceAttention:
    """Attention over a sequence that is cut over the ranks of `mesh.sequence`.

    Each ring index holds a stretch of every segment, its ulysses ranks a part of that stretch. Tokens are
    traded for heads between the ulysses ranks; then keys and values travel between the ring indices.

    Args:
        mesh: its ranks, and how they exchange (`overlap`, `sync_ulysses`).
        layout: how the segments are cut over `mesh.sequence`.
        order: how the segments are concatenated in k and v, and in q.
        kernel: computes the parts of a ring; not used without one.
        replicated_query: q is whole and equal on all ranks, whatever its length; so is the result.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        layout: Layout,
        order: tuple[str, ...],
        kernel: LocalKernel | None,
        replicated_query: bool = False,
    ) -> None:
        self._sequence = mesh.sequence
        self._comm = mesh.axis("ulysses")
        self._ring = mesh.axis("ring")
        self._layout = layout
        self._order = order
        self._kernel = kernel
        self._whole_query = replicated_query
        self._total, self._local = layout.total(order), layout.local(order)
        self._overlap = 1 if mesh.parallel.sync_ulysses else mesh.parallel.overlap
        self._ulysses = Ulysses(
            self._comm,
            layout=layout,
            order=order,
            sync=mesh.parallel.sync_ulysses,
            first=self._ring.rank * self._comm.size,
        )

    def __call__(  # noqa: PLR0917, the signature is ComfyUI's
        self,
        local: Kernel,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: Mask | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of this rank's queries over the keys and values of all ranks.

        Args:
            local: computes attention for some heads and all tokens, called in the form the caller uses; not
                called with a ring.
            q, k, v: this rank's tokens, [B, local, heads * D], or [B, heads, local, D] with `skip_reshape`;
                k and v of fewer heads with `enable_gqa`.
            heads: of q, over all ranks, any number; a rank may get none.
            mask: whole, or as long as this rank's tokens in its last dim: then it is gathered. `QueryMasks` are of
                all queries and keys.
            skip_output_reshape: return [B, heads, local, D].
            attn_precision, kwargs: passed on.

        Returns:
            [B, local, heads * D] in v's dtype.

        Raises:
            UnsupportedError: token or head counts that are not the region's, a mask that fits no tokens, or with
                a ring an override of the user's. All ranks raise alike.
        """
        around = self._ring.size > 1
        user = "optimized_attention_override" in (kwargs.get("transformer_options") or ())
        if around and user:
            raise UnsupportedError(
                "An attention override cannot be used with ring attention",
                "the workers merge parts of the attention, and an override computes all of it",
                "Set ring_degree to 1 and ulysses_degree higher, or remove the node that sets it",
            )
        grouped = kwargs.pop("enable_gqa", False)
        q, k, v = _by_head(q, k, v, heads=heads, skip_reshape=skip_reshape, grouped=grouped)
        self._check(q, k, v, heads)
        mask = self._whole_mask(mask, heads=heads, queries=q.shape[1] if self._whole_query else None)
        width = v.shape[-1]
        if attn_precision is not None and not around:
            kwargs["attn_precision"] = attn_precision
        flops = 4.0 * q.shape[0] * self._total**2 * heads * width / self._sequence.size
        # an override of the user's sees all heads of this rank at once
        count = 1 if around or user or self._whole_query else self._turns(flops, heads)
        if count > 1:
            form: dict[str, Any] = {"skip_reshape": skip_reshape, "kwargs": kwargs}
            out = self._in_turns(local, (q, k, v), mask, self._ulysses.turns(heads, count), form=form)
            return out.unflatten(-1, (heads, width)).transpose(1, 2) if skip_output_reshape else out
        spans = self._ulysses.heads(heads)
        start, stop = spans[self._comm.rank]
        mask = _heads_of(mask, start, stop)
        if self._whole_query:
            q = q[:, :, start:stop]
            k, v = self._ulysses.to_heads((k, v), heads=heads)
        else:
            q, k, v = self._ulysses.to_heads((q, k, v), heads=heads, large=flops >= LARGE_FLOPS)
        if around:
            out = self._around(q, k, v, mask, kwargs)
        else:
            # a user's override can fail where it is called, which a rank without heads would not see
            agree = user and any(first == last for first, last in spans)
            out = self._here(local, q, k, v, mask, agree=agree, skip_reshape=skip_reshape, kwargs=kwargs)
        if self._whole_query:
            out = self._ulysses.join_heads(out, heads=heads, width=width)
        else:
            out = self._ulysses.to_tokens(out, heads=heads, width=width, large=flops >= LARGE_FLOPS)
        return out.unflatten(-1, (heads, width)).transpose(1, 2) if skip_output_reshape else out

    def _turns(self, flops: float, heads: int) -> int:
        """In how many turns the heads are exchanged, for what each rank has to compute: the same on all ranks."""
        if self._comm.size == 1:
            return 1
        fewest = min(stop - start for start, stop in self._ulysses.heads(heads))
        return max(1, min(self._overlap or min(TURNS, int(flops / LARGE_FLOPS)), fewest))

    def _in_turns(
        self,
        local: Kernel,
        tensors: Sequence[torch.Tensor],
        mask: Mask | None,
        spans: Sequence[Sequence[Span]],
        *,
        form: dict[str, Any],
    ) -> torch.Tensor:
        """`_here` for some heads after the other, [B, local, H, D] each -> [B, local, H * D].

        While some are computed, the next ones arrive and the last ones' outputs leave.
        """
        exchange, rank = self._ulysses, self._comm.rank
        *_, heads, width = tensors[-1].shape
        whole = exchange.room(tensors[-1], heads=heads, width=width)
        arriving = [exchange.start_heads(tensors, spans=spans[0])]
        leaving: list[Callable[[], None]] = []
        try:
            for turn, these in enumerate(spans):
                q, k, v = arriving.pop()()
                if turn + 1 < len(spans):
                    arriving.append(exchange.start_heads(tensors, spans=spans[turn + 1]))
                out = self._here(local, q, k, v, _heads_of(mask, *these[rank]), agree=False, **form)
                leaving.append(exchange.start_tokens(out, whole, spans=these, width=width))
        finally:
            # nothing is on its way any more, also after an error
            for landed in (*arriving, *leaving):
                landed()
        return whole

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> None:
        expected = self._local
        if {expected if self._whole_query else q.shape[1], k.shape[1], v.shape[1]} != {expected}:
            raise MisfitError(
                "A patch changes the number of tokens inside attention",
                f"q, k and v have {q.shape[1]}, {k.shape[1]} and {v.shape[1]} tokens, this worker holds {expected}",
                "Remove the node that adds or drops tokens (such as a reference cache or token merging)",
            )
        if {q.shape[2], k.shape[2], v.shape[2]} != {heads}:
            raise UnsupportedError(
                "Attention with fewer key than query heads cannot be split",
                f"q, k and v have {q.shape[2]}, {k.shape[2]} and {v.shape[2]} heads, {heads} were announced",
                "Set ulysses_degree and ring_degree to 1 for this model",
            )

    def _whole_mask(self, mask: Mask | None, *, heads: int, queries: int | None) -> Mask | None:
        """The mask for all queries and keys."""
        total = self._total
        if mask is None:
            return None
        if isinstance(mask, QueryMasks):
            wide = {part.mask.shape[-1] for part in mask.parts if part.mask is not None}
            if mask.parts[-1].stop == (total if queries is None else queries) and wide <= {1, total}:
                return mask
            raise PlanError("The masks of an attention call do not fit its tokens", f"{mask.parts[-1].stop}, {wide}")
        rows = 1 if mask.ndim == 1 else mask.shape[-2]
        of_heads = mask.ndim < 4 or mask.shape[1] in (1, heads)
        if of_heads and mask.shape[-1] in (1, total) and rows in (1, total if queries is None else queries):
            return mask
        # a block builds its own mask on every rank, so all of them come here or none does
        if of_heads and mask.shape[-1] == self._local and rows == 1:
            return gather(mask, dim=mask.ndim - 1, over=self._order, layout=self._layout, comm=self._sequence)
        raise MisfitError(
            "An attention mask fits neither all tokens nor this worker's",
            f"its shape is {list(mask.shape)}, with {heads} heads and {total} tokens, {self._local} of them here",
            "Remove the node that makes it",
        )

    def _here(
        self,
        local: Kernel,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask | None,
        *,
        agree: bool,
        skip_reshape: bool,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """`local` on [B, L, some heads, D], as it is used to be called -> [B, Lq, those heads * D] in v's dtype.

        With `agree` all ranks fail where one does.
        """
        problem = None
        out = v.new_empty(v.shape[0], q.shape[1], 0)
        if mine := q.shape[2]:
            try:
                q, k, v = (t.transpose(1, 2) if skip_reshape else t.flatten(2) for t in (q, k, v))
                # ranks without heads cannot know another dtype, and byte counts must agree
                if isinstance(mask, QueryMasks):
                    outs = []
                    for part in mask.parts:
                        rows = q.narrow(2 if skip_reshape else 1, part.start, part.stop - part.start)
                        more = {**kwargs, "low_precision_attention": False} if part.exact else kwargs
                        outs.append(local(rows, k, v, mine, mask=part.mask, skip_reshape=skip_reshape, **more))
                    out = torch.cat(outs, 1)
                else:
                    out = local(q, k, v, mine, mask=mask, skip_reshape=skip_reshape, **kwargs)
                out = out.to(v.dtype)
            except Exception as error:
                if not agree:
                    raise
                problem = error
        if agree:
            failed = self._comm.all_reduce(torch.tensor(int(problem is not None), device=v.device), op="max")
            if problem is not None:
                raise problem
            if failed.item():
                raise UnsupportedError(
                    "An attention override failed on another worker",
                    "this one has no head, so it cannot tell why; the override may draw random numbers",
                    "Remove the node that sets it, or set ulysses_degree to 1",
                )
        return out

    def _rows(self, q: torch.Tensor, mask: Mask | None, *, exact: bool) -> list[ring.Rows]:
        """The queries [B, Lq, some heads, D] of this ring index, by the mask that they have."""
        ranges = [(0, q.shape[1])] if self._whole_query else self._ulysses.positions(self._order)
        if isinstance(mask, QueryMasks):
            parts = list(mask.at(ranges))
        else:
            if mask is not None:
                mask = four_dims(mask)
                if mask.shape[2] > 1:
                    mask = torch.cat([mask[:, :, start:stop] for start, stop in ranges], 2)
            parts = [QueryMask(0, q.shape[1], mask)]
        return [
            ring.Rows(
                part.start,
                part.stop,
                None if part.mask is None else ring.BlockMask(part.mask, keys=self._total, dtype=q.dtype),
                exact or part.exact,
            )
            for part in parts
        ]

    def _around(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask | None, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Ring attention of [B, L, some heads, D] -> [B, Lq, those heads * D] in v's dtype."""
        assert self._kernel is not None
        comm, exchange, order = self._ring, self._ulysses, self._order
        index = comm.rank
        common: dict[str, Any] = {
            "comm": comm,
            "kernel": self._kernel,
            "rows": self._rows(q, mask, exact=kwargs.get("low_precision_attention", True) is False),
            "scale": scale_of(q, kwargs),
        }
        if self._whole_query:
            # keys that every rank has count once
            names = order if index == 0 else exchange.cut
            keys = [exchange.select(t, names) for t in (k, v)]
            out = ring.attend_whole(q, keys, pieces=exchange.positions(names), **common)
            return out.transpose(1, 2).flatten(2).to(v.dtype)
        out = ring.attend(
            q,
            (k, v),
            [exchange.select(t, exchange.cut) for t in (k, v)],
            lengths=[exchange.length(exchange.cut, index=i) for i in range(comm.size)],
            own_pieces=exchange.positions(order),
            pieces=[exchange.positions(exchange.cut, index=i) for i in range(comm.size)],
            **common,
        )
        out = out.transpose(1, 2).flatten(2).to(v.dtype)
        kept = tuple(name for name in order if name not in exchange.cut)
        if not kept:
            return out
        # each ring index merges in an order of its own
        parts = exchange.parts(out)
        same = comm.broadcast(torch.cat([parts[name] for name in kept], 1))
        parts.update(zip(kept, same.split([self._layout.length(name) for name in kept], 1), strict=True))
        return torch.cat([parts[name] for name in order], 1)


class ByLength:
    """One of several attentions, by the number of this rank's query tokens: no two orders have the same."""

    def __init__(self, attentions: Sequence[SequenceAttention], lengths: Sequence[int]) -> None:
        self._by_length = dict(zip(lengths, attentions, strict=True))

    def __call__(self, local: Callable[..., Any], q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        length = q.shape[2 if kwargs.get("skip_reshape") else 1]
        if length not in self._by_length:
            raise PlanError("An attention call spans other tokens than the plan says", f"{length} of them")
        return self._by_length[length](local, q, *args, **kwargs)


def _by_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, skip_reshape: bool, grouped: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in the form that travels, [B, L, heads, D]; `grouped` ones are repeated for the heads of q."""
    if skip_reshape:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    else:
        q = q.unflatten(-1, (heads, -1))
        fewer = k.shape[-1] // q.shape[-1] if grouped else heads
        # SD3 hands over v by head already
        k, v = (t.flatten(2).unflatten(-1, (fewer, -1)) for t in (k, v))
    if grouped and heads % k.shape[2] == 0:
        k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
    return q, k, v


def _heads_of(mask: Mask | None, start: int, stop: int) -> Mask | None:
    """The mask for heads start:stop."""
    return mask.of_heads(start, stop) if isinstance(mask, QueryMasks) else of_heads(mask, start, stop)
