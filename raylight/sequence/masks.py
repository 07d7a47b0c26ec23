"""An attention mask that is different for one stretch of queries than for another, and never made as one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class QueryMask:
    """The mask of some queries.

    Attributes:
        start, stop: positions of the queries among all tokens.
        mask: [B or 1, H or 1, stop - start or 1, keys or 1], added to the scores; None where all keys take part.
        exact: the model asks for no attention of low precision (`low_precision_attention`).
    """

    start: int
    stop: int
    mask: torch.Tensor | None = None
    exact: bool = False


@dataclass(frozen=True)
class QueryMasks:
    """One mask for each stretch of queries, in the place of the mask of an attention call.

    A model that calls attention once for each stretch makes one call with this instead, so that ranks whose tokens
    lie in other stretches still make the same calls.

    Attributes:
        parts: stretches without a gap, from the first token to the last; empty ones are left out.
    """

    parts: tuple[QueryMask, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(part for part in self.parts if part.start < part.stop))
        ends = [0, *(part.stop for part in self.parts)]
        assert [part.start for part in self.parts] == ends[:-1], ends

    def of_heads(self, start: int, stop: int) -> QueryMasks:
        """The masks of heads start:stop."""
        return QueryMasks(tuple(replace(part, mask=of_heads(part.mask, start, stop)) for part in self.parts))

    def at(self, ranges: Sequence[tuple[int, int]]) -> Iterator[QueryMask]:
        """The masks of queries that lie at these positions (start, stop), as positions among those queries."""
        offset = 0
        for first, last in ranges:
            for part in self.parts:
                start, stop = max(first, part.start), min(last, part.stop)
                if start >= stop:
                    continue
                mask = part.mask
                if mask is not None and mask.shape[2] > 1:
                    mask = mask[:, :, start - part.start : stop - part.start]
                yield QueryMask(offset + start - first, offset + stop - first, mask, part.exact)
            offset += last - first


Mask = torch.Tensor | QueryMasks
"""What an attention call can have for a mask."""


def of_heads(mask: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    """The mask for heads start:stop."""
    return mask[:, start:stop] if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 else mask


def four_dims(mask: torch.Tensor) -> torch.Tensor:
    """A mask as ComfyUI's attention reads it, [B or 1, H or 1, Lq or 1, Lk or 1]."""
    if mask.ndim == 1:
        return mask[None, None, None]
    return mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
