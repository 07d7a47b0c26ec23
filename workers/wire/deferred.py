"""Tensors that the workers will compute during the next model call: here they have a shape, and what is done to them
is noted down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...raylight import cfg
from ...raylight.config import ModelSpec
from ...raylight.errors import UnsupportedError

WITHOUT = frozenset({"device", "pin_memory", "non_blocking", "layout"})
"""Arguments that say where a result is to be: it is where the workers compute."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One call of a ControlNet: the keyword arguments of its forward."""

    spec: ModelSpec
    arguments: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of an operator of ATen, such as "aten.mul.Tensor"; one that writes gives a new tensor."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    writes: bool


@dataclass(frozen=True, eq=False)
class Result:
    """One of the tensors that an evaluation or operation returns, in the order of `flat`."""

    of: Evaluation | Operation
    index: int


@dataclass(frozen=True)
class Slot:
    """A tensor in the outline of what an evaluation returns; equal indices are one tensor."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Deferred(torch.Tensor):
    """A tensor without data. It is pickled as its `Result`, which the workers compute in its place.

    Attributes:
        result: how it is computed.
        sources: the evaluations it needs, with the object that each was asked of.
    """

    result: Result
    sources: frozenset[tuple[Evaluation, Any]]
    _aliased: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(
        cls, meta: torch.Tensor, device: torch.device, result: Result, sources: frozenset[tuple[Evaluation, Any]]
    ) -> Deferred:
        """A tensor with the shape, strides and dtype of `meta` that says it is on `device`."""
        found: Deferred = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )
        found.result, found.sources, found._aliased = result, sources, False
        return found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.result,)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        found = deferred_in((args, kwargs))
        device = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)), None)
        kwargs = {name: value for name, value in kwargs.items() if name not in WITHOUT}
        writes = bool(func._schema.is_mutable)
        target = args[0] if args else None
        if writes and (not isinstance(target, Deferred) or target._aliased or func._schema.returns[1:]):
            _refuse(func, "it writes into a tensor that shares its memory with others")
        try:
            meta = func(*cfg.mapped(args, _on_meta), **cfg.mapped(kwargs, _on_meta))
        except (RuntimeError, NotImplementedError) as error:
            _refuse(func, str(error).splitlines()[0])
        operation = Operation(str(func), cfg.mapped(args, _noted), cfg.mapped(kwargs, _noted), writes)
        if writes:
            assert isinstance(target, Deferred)
            target.result = Result(operation, 0)
            target.sources = target.sources.union(*(tensor.sources for tensor in found))
            return target
        if not isinstance(meta, (torch.Tensor, list, tuple)):
            _refuse(func, "it reads their values")
        sources = frozenset[tuple[Evaluation, Any]]().union(*(tensor.sources for tensor in found))
        shares = any(returned.alias_info is not None for returned in func._schema.returns)
        numbers = iter(range(len(flat(meta))))

        def deferred(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            made = cls.of(value, device or found[0].device, Result(operation, next(numbers)), sources)
            made._aliased = shares
            return made

        for tensor in found if shares else ():
            tensor._aliased = True
        return cfg.mapped(meta, deferred)


def deferred_in(value: Any) -> list[Deferred]:
    """The deferred tensors nested in dicts, lists and tuples."""
    return [tensor for tensor in cfg.tensors(value) if isinstance(tensor, Deferred)]


def carried(value: Any) -> list[torch.Tensor]:
    """The tensors with data that go along with a value, each once: those that operations bring in too."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()

    def walk(item: Any) -> None:
        if isinstance(item, (Deferred, Result)):
            source = item.result.of if isinstance(item, Deferred) else item.of
            if isinstance(source, Operation) and id(source) not in seen:
                seen.add(id(source))
                walk((*source.args, source.kwargs))
        elif isinstance(item, torch.Tensor):
            found[id(item)] = item
        elif isinstance(item, (dict, list, tuple)):
            for part in item.values() if isinstance(item, dict) else item:
                walk(part)

    walk(value)
    return list(found.values())


def flat(value: Any) -> list[torch.Tensor]:
    """The tensors nested in dicts, lists and tuples, each once, in the order in which they are met."""
    return list({id(tensor): tensor for tensor in cfg.tensors(value)}.values())


def outline(value: Any) -> Any:
    """The same structure with a Slot for each tensor."""
    index = {id(tensor): number for number, tensor in enumerate(flat(value))}

    def slot(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return Slot(index[id(item)], tuple(item.shape), tuple(item.stride()), item.dtype)

    return cfg.mapped(value, slot)


def filled(found: Any, evaluation: Evaluation, asked: object, device: torch.device) -> Any:
    """What an evaluation returns, by its outline: a deferred tensor for each slot, one object for equal indices.

    Args:
        asked: what the sources of the tensors name beside the evaluation.
    """
    made: dict[int, Deferred] = {}

    def fill(item: Any) -> Any:
        if not isinstance(item, Slot):
            return item
        if item.index not in made:
            meta = torch.empty_strided(item.shape, item.stride, dtype=item.dtype, device="meta")
            sources = frozenset({(evaluation, asked)})
            made[item.index] = Deferred.of(meta, device, Result(evaluation, item.index), sources)
        return made[item.index]

    return cfg.mapped(found, fill)


class Computed:
    """A worker's side: the tensors that results stand for, each evaluation and operation run once.

    Args:
        evaluate: calls the ControlNet.
        device: where it computes.

    Attributes:
        seconds: spent in evaluations.
    """

    def __init__(self, evaluate: Callable[[Evaluation], Any], device: torch.device) -> None:
        self._evaluate = evaluate
        self._device = device
        self.seconds = 0.0
        self._done: dict[int, tuple[object, list[torch.Tensor]]] = {}  # with the object, so that its id stays its own

    def tensor(self, result: Result) -> torch.Tensor:
        """The tensor itself."""
        source = result.of
        if id(source) not in self._done:
            started = time.perf_counter()
            value = self._evaluate(source) if isinstance(source, Evaluation) else self._operate(source)
            self.seconds += time.perf_counter() - started if isinstance(source, Evaluation) else 0.0
            self._done[id(source)] = (source, flat(value))
        return self._done[id(source)][1][result.index]

    def _operate(self, operation: Operation) -> Any:
        space, packet, overload = operation.name.split(".")
        assert space == "aten"
        function = getattr(getattr(torch.ops.aten, packet), overload)

        def real(value: Any) -> Any:
            if isinstance(value, Result):
                return self.tensor(value)
            return self._device if isinstance(value, _Here) else value

        args, kwargs = cfg.mapped(operation.args, real), cfg.mapped(operation.kwargs, real)
        if operation.writes:
            # others may mean the tensor as it was before
            args = (args[0].clone(), *args[1:])
        return function(*args, **kwargs)


@dataclass(frozen=True)
class _Here:
    """In place of a device among positional arguments: where the workers compute."""


def _itself(result: Result) -> Result:
    return result


def _refuse(func: Any, why: str) -> Any:
    raise UnsupportedError(
        "A node needs the values of what a ControlNet on the workers computes",
        f"{func} cannot be put off: {why}",
        "Use ComfyUI's Load ControlNet Model in place of Load ControlNet (Ray), or remove the node",
    )


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _noted(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.result
    return _Here() if isinstance(value, torch.device) else value
