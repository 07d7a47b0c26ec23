"""Parcels: a pickled value, and where its tensors are in the bytes beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .arena import ArenaRef

ALIGNMENT = 64
CPU = torch.device("cpu")
FILE = "file"
"""First part of a name that a `Reference` gives to a tensor of a file; the second is its FileRef."""
Reference = Callable[[object], tuple[Any, ...] | None]


@dataclass(frozen=True)
class TensorRef:
    """One tensor in a parcel's bytes. `key` is the number workers keep it under, None for this call only."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_device: bool
    key: int | None


@dataclass(frozen=True)
class Parcel:
    """A pickled value whose tensors travel beside it, in the arena or `inline`.

    `reply` is the (offset, length) of the arena that the answer may use; (0, 0) where none is shared.
    A `lasting` arena holds nothing else and is not written again: its tensors are used where they are.
    """

    blob: bytes
    tensors: tuple[TensorRef, ...]
    arena: ArenaRef | None
    inline: bytes | None
    dropped: tuple[int, ...]
    reply: tuple[int, int]
    lasting: bool = False


def nbytes(tensor: TensorRef) -> int:
    """Size of the tensor a ref names, in bytes."""
    return tensor.dtype.itemsize * torch.Size(tensor.shape).numel()


def place(storage: torch.Tensor, ref: TensorRef) -> torch.Tensor:
    """The view of `storage` (uint8, 1-D) that holds the tensor `ref` names."""
    count = nbytes(ref)
    if not count:
        return torch.empty(ref.shape, dtype=ref.dtype)
    return storage[ref.offset : ref.offset + count].view(ref.dtype).view(ref.shape)


def lay_out(tensors: Iterable[torch.Tensor], keys: Iterable[int | None]) -> tuple[tuple[TensorRef, ...], int]:
    """Give each tensor an aligned offset. Returns the refs and the bytes needed."""
    refs, end = [], 0
    for tensor, key in zip(tensors, keys, strict=True):
        refs.append(TensorRef(end, tuple(tensor.shape), tensor.dtype, tensor.device.type != "cpu", key))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(refs), end
