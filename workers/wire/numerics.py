"""How matrix products of 16 bits are summed in this process: torch's settings, which nodes switch for a run."""

from __future__ import annotations

from typing import Any

from torch.backends import cuda

NAMES = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


def take() -> tuple[Any, ...]:
    """The settings, as plain data; None for one that this torch does not have."""
    return tuple(getattr(cuda.matmul, name, None) for name in NAMES)


def put(values: tuple[Any, ...]) -> None:
    """Have the settings of another process, as `take` returned them; what is missing or unknown here stays."""
    for name, value, here in zip(NAMES, values, take(), strict=False):
        if value != here and None not in (value, here):
            setattr(cuda.matmul, name, value)
