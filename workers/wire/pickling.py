"""How values are pickled beside their tensors: functions by value, live objects by name."""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Callable
from typing import Any, TypeVar

import cloudpickle
import torch

from ...raylight.errors import UnsupportedError
from . import path_modules
from .parcels import Reference

T = TypeVar("T")


class Weight(torch.nn.Parameter):
    """A parameter that counts what is written into it through `data`, which torch does not."""

    def detach(self) -> torch.Tensor:
        """Of this class, as torch wants it of what becomes a parameter."""
        return super().detach().as_subclass(Weight)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return super().detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        same = value.shape == self.shape and value.dtype == self.dtype
        if not same or not torch.equal(value.to(self.device), self):  # a layer that is moved has the values it had
            self.raylight_version = -1  # no count of torch's
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


PLAIN = (torch.Tensor, torch.nn.Parameter, Weight)


class _Cell:
    """Contents of a closure cell, pickled apart from the cell so that functions can share it."""

    def __init__(self, cell: types.CellType) -> None:
        self.value: tuple[Any, ...]
        try:
            self.value = (cell.cell_contents,)
        except ValueError:  # not filled yet
            self.value = ()

    @property
    def cell_contents(self) -> Any:
        if not self.value:
            raise ValueError("empty cell")
        return self.value[0]


class Pickler(cloudpickle.Pickler):
    """By-value pickling whose tensors are handed to `take` and whose live objects to `refer`.

    cloudpickle gives every function its own copies of its cells; two patches that share a `nonlocal`
    would come apart in the worker. Cells are therefore pickled empty, once, and filled by each function.
    """

    def __init__(self, file: io.BytesIO, take: Callable[[torch.Tensor], tuple[str, Any]], refer: Reference) -> None:
        super().__init__(file, protocol=5)
        self._take = take
        self._refer = refer

    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        referred = self._refer(obj)
        if referred is not None:
            return ("live", referred)
        # subclasses, such as quantised tensors, know themselves how to be pickled
        if isinstance(obj, torch.Tensor) and type(obj) in PLAIN and obj.layout == torch.strided:
            if obj.is_meta:
                raise UnsupportedError(
                    "A weight that only the workers hold was about to be sent to them", f"shape {tuple(obj.shape)}"
                )
            return self._take(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is types.CellType:
            return types.CellType, ()
        named = path_modules.reference(obj)
        if named is not None:
            return named
        reduced = super().reducer_override(obj)
        if isinstance(obj, types.FunctionType) and obj.__closure__ and isinstance(reduced, tuple):
            make, new_args, (attributes, slots), *rest = reduced
            slots = {**slots, "__closure__": tuple(_Cell(cell) for cell in obj.__closure__)}
            reduced = (make, (*new_args[:4], obj.__closure__), (attributes, slots), *rest)
        return reduced


class Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        tensors: list[torch.Tensor],
        held: dict[int, torch.Tensor],
        resolve: Callable[[tuple[Any, ...]], Any] | None,
    ) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._held = held
        self._resolve = resolve

    def persistent_load(self, pid: tuple[str, Any]) -> Any:
        kind, value = pid
        if kind == "tensor":
            return self._tensors[value]
        if kind == "held":
            return self._held[value]
        # models may write into what they are given, as HunyuanDiT does, and others are given the same
        if kind == "copy of tensor":
            return self._tensors[value].clone()
        if kind == "copy of held":
            return self._held[value].clone()
        assert self._resolve is not None
        return self._resolve(value)


def copied(value: T, is_shared: Callable[[object], bool]) -> T:
    """A copy of a value with all that it holds, also inside of functions, but for what `is_shared`.

    Raises:
        UnsupportedError: something in it cannot be copied.
    """
    shared: list[object] = []
    memo: dict[int, int] = {}

    def refer(found: object) -> tuple[Any, ...] | None:
        if not is_shared(found):
            return None
        if id(found) not in memo:
            memo[id(found)] = len(shared)
            shared.append(found)
        return (memo[id(found)],)

    file = io.BytesIO()
    try:
        Pickler(file, lambda _: ("", None), refer).dump(value)
        copy: T = Unpickler(io.BytesIO(file.getvalue()), [], {}, lambda name: shared[name[0]]).load()
    except Exception as error:  # what objects of other packs raise is open
        raise UnsupportedError("Something in the model or conditioning cannot be copied", str(error)) from error
    return copy
