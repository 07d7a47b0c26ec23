"""Finds out by measuring whether a model may be run in strips: the same random input whole and divided."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .strips import Strips

SEED = 20240229
EXACT = 1e-3
"""Largest difference, relative to the largest value, that rounding explains in fp32 and TF32; a missing row
makes it 0.3 and more."""
ROUGH = 6e-2
"""The same in 16 bits: two to three times what summing in another order was seen to do."""


def limit(dtype: torch.dtype) -> float:
    """The largest difference that a model of this dtype may show."""
    return EXACT if dtype in (torch.float32, torch.float64) else ROUGH


def difference(
    run: Callable[[torch.Tensor], torch.Tensor],
    whole: torch.Tensor,
    sample: torch.Tensor,
    strips: Strips,
    divided: Callable[[], AbstractContextManager[None]],
) -> float:
    """How far this rank's strip is from its rows of the whole result, relative to the largest value of that.

    Args:
        run: decodes or encodes.
        whole: what `run` made of all of `sample` after torch.manual_seed(SEED).
        sample: [batch, channels, ..., rows, width], the same on every rank.
        divided: enters `row_rules.RowParallel`.

    Returns:
        The difference, or infinity where the result is not made of rows in the order of the latent's.

    Raises:
        UnsupportedError: a call that no rule covers. All ranks raise it at the same call.
    """
    torch.manual_seed(SEED)
    with divided():
        strip = run(strips.own(sample).contiguous())
    if whole.shape[-2] % strips.total or strip.shape != strips.own(whole).shape or not whole.isfinite().all():
        return float("inf")
    wanted = strips.own(whole)
    return float((strip.float() - wanted.float()).abs().max() / whole.float().abs().max().clamp_min(1e-12))
