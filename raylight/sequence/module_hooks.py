"""Hooks of modules beside blocks and attention: what needs all tokens, a part of what is whole, or leads out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..cuts import Entry, Split, Stretch
from ..layout import Layout
from ..plan import Called, Head, Part, Whole
from .slots import Slot

if TYPE_CHECKING:
    from ..comm import Comm
    from .hooks import Forward, Installation


class Shared:
    """The arguments of one module that come whole and are needed in their local form."""

    def __init__(
        self, owner: object, module: nn.Module, shared: Mapping[str, Entry], optional: tuple[str, ...]
    ) -> None:
        self._owner = owner
        self._entries: list[tuple[str, Slot, Entry]] = []
        for name, entry in shared.items():
            slot = Slot.find(module.forward, name) if name in optional else Slot.need(module, name)
            if slot is not None:
                self._entries.append((name, slot, entry))

    def cut(self, forward: Forward, layout: Layout, args: list[Any], kwargs: dict[str, Any]) -> None:
        for name, slot, entry in self._entries:
            value = slot.read(args, kwargs)
            if value is not None:
                slot.write(args, kwargs, forward.cut(self._owner, name, entry, value, layout))


def several(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


class Functions:
    """The arguments of one block that are functions of its tokens."""

    def __init__(self, module: nn.Module, called: Mapping[str, Called]) -> None:
        found = [(Slot.find(module.forward, name), each) for name, each in called.items()]
        self._called = [
            (slot, each, {name: Slot.need(module, name) for name in each.shared})
            for slot, each in found
            if slot is not None
        ]

    def widen(self, layout: Layout, comm: Comm, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Have them called with all tokens; the block's arguments are still whole."""
        for slot, called, shared in self._called:
            function = slot.read(args, kwargs)
            if function is not None:
                given = {name: each.read(args, kwargs) for name, each in shared.items()}
                slot.write(args, kwargs, _on_all(function, called.stream, given, layout, comm))


def _on_all(
    function: Callable[..., torch.Tensor], stream: Split, given: Mapping[str, Any], layout: Layout, comm: Comm
) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        whole = {name: value for name, value in given.items() if name in kwargs}
        return stream(function(stream.join(x, layout, comm), *args, **{**kwargs, **whole}), layout)

    return call


class WholeHook:
    """Joins the argument of a module that needs all tokens, and cuts its output; nothing where tokens are whole."""

    def __init__(self, owner: Installation, index: int, whole: Whole, module: nn.Module) -> None:
        self._owner = owner
        self._index = index
        self._whole = whole
        self._slot = Slot.need(module, whole.arg)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        layout = self._owner.inside(self._index)
        if layout is None:
            return None
        args, kwargs = list(args), dict(kwargs)
        joined = self._whole.stream.join(self._slot.read(args, kwargs), layout, self._owner.mesh.sequence)
        self._slot.write(args, kwargs, joined)
        return tuple(args), kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        layout = self._owner.inside(self._index)
        if layout is None:
            return None
        cut = tuple(self._whole.stream(value, layout) for value in several(output))
        return cut if isinstance(output, tuple) else cut[0]


class PartHook:
    """Cuts what a module inside a block gets whole; nothing where tokens are whole."""

    def __init__(self, owner: Installation, index: int, part: Part, module: nn.Module) -> None:
        self._owner = owner
        self._index = index
        self._shared = Shared(part.at, module, part.shared, ())

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        layout = self._owner.inside(self._index)
        if layout is None:
            return None
        assert self._owner.forward is not None
        args, kwargs = list(args), dict(kwargs)
        self._shared.cut(self._owner.forward, layout, args, kwargs)
        return tuple(args), kwargs


class HeadHook:
    """Joins the output of the module after the last block; does nothing where blocks join their own."""

    def __init__(self, owner: Installation, index: int, head: Head, module: nn.Module) -> None:
        self._owner = owner
        self._index = index
        self._head = head
        self._shared = Shared(head.at, module, head.shared, head.optional)
        self._says = {out: Slot.need(module, out.arg) for out in head.outputs if isinstance(out, Stretch)}
        self._said: dict[Stretch, Any] = {}

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = self._owner.forward
        if forward is None or self._owner.per_block(self._index):
            return None
        args, kwargs = list(args), dict(kwargs)
        self._said = {stretch: slot.read(args, kwargs) for stretch, slot in self._says.items()}
        self._shared.cut(forward, self._owner.layout(self._index), args, kwargs)
        return tuple(args), kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._owner.forward
        if forward is None or self._owner.per_block(self._index):
            return None
        layout, comm = self._owner.layout(self._index), self._owner.mesh.sequence
        forward.layouts[self._index] = None
        joined = tuple(
            out.join(value, self._said[out], layout, comm)
            if isinstance(out, Stretch)
            else out.join(value, layout, comm)
            for value, out in zip(several(output), self._head.outputs, strict=True)
        )
        return joined if isinstance(output, tuple) else joined[0]
