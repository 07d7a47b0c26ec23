"""Runs an unmodified decoder or encoder on a strip of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..raylight.errors import UnsupportedError
from ..raylight.rows.row_rules import COPIED_BYTES, RowParallel
from ..raylight.rows.strips import Rows

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of [batch, channels, ..., rows, width] over all positions, where keys may be more than queries."""
PICTURE_DIMS = 4
"""Dims of something with rows, at least."""


@contextmanager
def strip_of(
    model: torch.nn.Module, rows: Rows, attention: Attention, *, copied_bytes: int = COPIED_BYTES
) -> Iterator[None]:
    """While it is entered, calls of `model` on this rank's rows give this rank's rows of the whole picture's result.

    All ranks must make the same calls, and draw from equal random states. The mode belongs to the thread that
    enters it. Modules that name their attention `optimized_attention` get one with keys and values of all rows;
    they have their own back afterwards, also on error.

    Args:
        attention: used in place of the modules' own, which may want as many keys as queries.
        copied_bytes: see RowParallel.
    """
    found = [module for module in model.modules() if "optimized_attention" in vars(module)]
    own = [module.optimized_attention for module in found]

    def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.ndim < PICTURE_DIMS:  # ranks whose strips differ would disagree on the size of what is exchanged
            raise UnsupportedError(
                f"{type(model).__name__} attends to positions that are not in rows",
                f"its attention is over {tuple(q.shape)}, as over windows of the picture",
                rows.remedy,
            )
        return attention(q, rows.gather(k), rows.gather(v))

    try:
        for module in found:
            module.optimized_attention = gathered  # type: ignore[assignment]
        with RowParallel(rows, copied_bytes=copied_bytes):
            yield
    finally:
        for module, function in zip(found, own, strict=True):
            module.optimized_attention = function
