"""Ulysses attention: tokens are traded for heads around a local kernel that sees every token of its heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .comm import Comm
from .errors import UnsupportedError
from .layout import Layout, gather, share

Kernel = Callable[..., torch.Tensor]
"""ComfyUI's attention signature: (q, k, v, heads, mask=None, skip_reshape=False, ...) -> [B, L, heads * D]."""


class Ulysses:
    """Self-attention over a sequence that is cut over the ranks of `comm`.

    Args:
        comm: the ranks that share the sequence.
        layout: how its segments are cut.
        order: how the segments are concatenated in q, k and v.
        pack: move q, k and v in one exchange where their shapes and dtypes agree; the same result.
        sync: synchronise the device after each exchange.
    """

    def __init__(self, comm: Comm, *, layout: Layout, order: tuple[str, ...], pack: bool, sync: bool) -> None:
        self._comm = comm
        self._layout = layout
        self._order = order
        self._cut = tuple(name for name in order if not layout.replicated(name))
        self._pack = pack
        self._sync = sync

    def __call__(  # noqa: PLR0917, the signature is ComfyUI's
        self,
        local: Kernel,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of this rank's queries over the keys and values of all ranks.

        Args:
            local: computes attention for some heads and all tokens; called in the form the caller uses.
            q, k, v: this rank's tokens, [B, local, heads * D], or [B, heads, local, D] with `skip_reshape`.
            heads: heads over all ranks, any number; a rank may get none.
            mask: whole, or as long as this rank's tokens in its last dim: then it is gathered.
            skip_output_reshape: return [B, heads, local, D].
            attn_precision, kwargs: passed on.

        Returns:
            [B, local, heads * D] in v's dtype.

        Raises:
            UnsupportedError: token counts that are not the region's, fewer key than query heads, or a
                mask per head.
        """
        layout, comm = self._layout, self._comm
        if not skip_reshape:
            # [B, L, H, D] is the form that travels
            q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        self._check(q, k, v, heads)
        mask = self._whole_mask(mask)
        start, stop = share(heads, rank=comm.rank, size=comm.size)
        width = v.shape[-1]
        q, k, v = self._to_heads((q, k, v), heads=heads)
        if stop > start:
            if attn_precision is not None:
                kwargs["attn_precision"] = attn_precision
            if skip_reshape:
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            else:
                q, k, v = (t.flatten(2) for t in (q, k, v))
            out = local(q, k, v, stop - start, mask=mask, skip_reshape=skip_reshape, **kwargs)
            # ranks without heads cannot know another dtype, and byte counts must agree
            out = out.to(v.dtype)
        else:
            out = v.new_empty(v.shape[0], layout.total(self._order), 0)
        out = self._to_tokens(out, heads=heads, width=width)
        return out.unflatten(-1, (heads, width)).transpose(1, 2) if skip_output_reshape else out

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> None:
        expected = self._layout.local(self._order)
        if {q.shape[1], k.shape[1], v.shape[1]} != {expected}:
            raise UnsupportedError(
                "A patch changes the number of tokens inside attention",
                f"q, k and v have {q.shape[1]}, {k.shape[1]} and {v.shape[1]} tokens, this worker holds {expected}",
                "Remove the node that adds or drops tokens (such as a reference cache or token merging)",
            )
        if {q.shape[2], k.shape[2], v.shape[2]} != {heads}:
            raise UnsupportedError(
                "Attention with fewer key than query heads cannot be split",
                f"q, k and v have {q.shape[2]}, {k.shape[2]} and {v.shape[2]} heads, {heads} were announced",
                "Set ulysses_degree to 1 for this model",
            )

    def _whole_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask for all keys; a rank keeps some heads and all tokens, so what is whole passes as it is."""
        if mask is None:
            return None
        if mask.ndim == 4 and mask.shape[1] > 1:
            raise UnsupportedError(
                "An attention mask per head cannot be split",
                f"the mask's shape is {list(mask.shape)}",
                "Remove the node that makes it, or set ulysses_degree to 1",
            )
        layout, order = self._layout, self._order
        total, local = layout.total(order), layout.local(order)
        if mask.shape[-1] in (1, total):
            return mask
        # a block builds its own mask on every rank, so all of them come here or none does
        if mask.shape[-1] == local and (mask.ndim == 1 or mask.shape[-2] == 1):
            return gather(mask, dim=mask.ndim - 1, over=order, layout=layout, comm=self._comm)
        raise UnsupportedError(
            "An attention mask fits neither all tokens nor this worker's",
            f"its shape is {list(mask.shape)}, with {total} tokens, {local} of them here",
            "Remove the node that makes it",
        )

    def _to_heads(self, tensors: Sequence[torch.Tensor], *, heads: int) -> list[torch.Tensor]:
        """[B, local, H, D] each -> [B, total, this rank's heads, D] each, tokens in the model's own order."""
        first = tensors[0]
        if self._pack and all(t.shape == first.shape and t.dtype == first.dtype for t in tensors):
            return self._trade(tensors, heads=heads)
        return [whole for t in tensors for whole in self._trade([t], heads=heads)]

    def _trade(self, tensors: Sequence[torch.Tensor], *, heads: int) -> list[torch.Tensor]:
        layout, comm = self._layout, self._comm
        batch, _, _, width = tensors[0].shape
        spans = [share(heads, rank=rank, size=comm.size) for rank in range(comm.size)]
        start, stop = spans[comm.rank]
        mine = stop - start
        segments = [self._segments(t) for t in tensors]
        if len(self._cut) == len(self._order):
            travelling = list(tensors)
        else:
            travelling = [torch.cat([s[name] for name in self._cut], 1) for s in segments] if self._cut else []
        counts = [layout.local(self._cut, rank=rank) for rank in range(comm.size)]
        chunks: list[torch.Tensor] = []
        if self._cut:
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
                if name not in self._cut:
                    parts.append(segments[index][name][:, :, start:stop])
                    continue
                for rank, chunk in enumerate(chunks):
                    a, b = layout.span(name, rank=rank)
                    parts.append(chunk[index].narrow(1, offsets[rank], b - a))
                    offsets[rank] += b - a
            whole.append(torch.cat(parts, 1))
        return whole

    def _segments(self, t: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._order, t.split([self._layout.local((name,)) for name in self._order], 1), strict=True))

    def _to_tokens(self, out: torch.Tensor, *, heads: int, width: int) -> torch.Tensor:
        """[B, total, this rank's heads * D] -> [B, local, H * D].

        Replicated tokens go to every rank from the ranks that own their heads, so their bytes agree.
        """
        layout, comm = self._layout, self._comm
        pieces = []
        parts = out.split([layout.length(name) for name in self._order], 1)
        for rank in range(comm.size):
            spans = [layout.span(name, rank=rank) for name in self._order]
            cut = [part[:, a:b] for part, (a, b) in zip(parts, spans, strict=True)]
            pieces.append(torch.cat(cut, 1) if len(cut) > 1 else cut[0])
        local = layout.local(self._order)
        shapes = []
        for rank in range(comm.size):
            a, b = share(heads, rank=rank, size=comm.size)
            shapes.append((out.shape[0], local, (b - a) * width))
        got = comm.all_to_all(pieces, shapes=shapes)
        self._synchronise(out)
        return torch.cat(got, 2)

    def _synchronise(self, t: torch.Tensor) -> None:
        if self._sync and t.device.type != "cpu":
            torch.get_device_module(t.device).synchronize()
