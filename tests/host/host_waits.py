"""Where code makes the host wait for a device, found without one: it asks for values, or brings some there."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ASKED = frozenset(
    f"aten.{name}.default"
    for name in (
        "item",
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "allclose",
        "nonzero",
        "nonzero_numpy",
        "argwhere",
        "where",
        "masked_select",
        "bincount",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
    )
)
"""Operations whose result, or its shape, the host has to know; `where` is the one with nothing but a condition."""
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put_)
"""They ask where the index is a mask."""
BROUGHT = frozenset(
    {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor, torch.Tensor.tolist, torch.Tensor.numpy}
)
OUTSIDE = (str(Path(torch.__file__).parent), __file__, contextlib.__file__)


class HostWaits:
    """Watches what runs inside.

    Attributes:
        asked: the functions that asked for values, as "FILE:FUNCTION"; the innermost ones that are not PyTorch's.
        brought: those that made a tensor of numbers, or numbers of a tensor.
    """

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.brought: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> HostWaits:
        self._stack.enter_context(_Asked(self.asked))
        self._stack.enter_context(_Brought(self.brought))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class _Asked(TorchDispatchMode):
    def __init__(self, at: set[str]) -> None:
        super().__init__()
        self._at = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in ASKED or (func.overloadpacket in INDEXING and _by_mask(args[1])):
            self._at.add(_caller())
        return func(*args, **(kwargs or {}))


class _Brought(TorchFunctionMode):
    def __init__(self, at: set[str]) -> None:
        super().__init__()
        self._at = at

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BROUGHT:
            self._at.add(_caller())
        return func(*args, **(kwargs or {}))


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _caller() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OUTSIDE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
