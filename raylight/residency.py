"""Blocks whose weights are only there while they compute: gathered from all ranks' parts, ahead of use."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .comm import Comm, Passing
from .errors import UnsupportedError
from .packing import Packing, arena_bytes

log = logging.getLogger(__name__)

LOOKS = frozenset({"__get__", "__set__", "size", "dim", "numel", "element_size", "stride", "is_floating_point"})
"""Names of what may be done with a weight that is not there: nothing of it is read."""


class Block(Protocol):
    """A module whose weights are views of the bytes that it is given while it computes."""

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def packing(self) -> Packing: ...

    def point(self, whole: torch.Tensor) -> None:
        """Weights are in `whole` [packing.total] from now on."""

    def release(self) -> None:
        """Weights are placeholders from now on: they have shape, dtype and device, but no memory."""

    def placeholders(self) -> Sequence[torch.Tensor]:
        """What the weights are then."""


class Parts(Protocol):
    """Where this rank's parts of the blocks come from."""

    def ahead(self, number: int) -> None:
        """Begin to make the part of a block ready; it is the next one to be taken, unless one is skipped."""

    def take(self, number: int) -> torch.Tensor:
        """The part [packing.part], uint8 on the device, unchanged until the second `ahead` or `take` from now."""

    def drop(self) -> None:
        """Whatever was begun is not wanted."""

    def close(self) -> None:
        """Give back what it holds."""


class Order:
    """Which block comes next: the one that did last time. What is never seen is guessed.

    Ranks that make the same calls learn the same, so it must live as long as the model does on each of them.
    """

    def __init__(self, count: int) -> None:
        self._after: list[int | None] = [*range(1, count), None]
        self._first: dict[str, int] = {}
        self._method = ""
        self._last: int | None = None

    def begin(self, method: str) -> int | None:
        """A call of `method` begins; the block it will begin with, None where that is not known."""
        self._method, self._last = method, None
        return self._first.get(method)

    def saw(self, number: int) -> int | None:
        """A block begins; the one after it, None for none."""
        if self._last is None:
            self._first[self._method] = number
        else:
            self._after[self._last] = number
        self._last = number
        return self._after[number]

    def after(self, number: int) -> int | None:
        """The one after a block."""
        return self._after[number]

    def end(self) -> None:
        """The call is over."""
        if self._last is not None:
            self._after[self._last] = None


@dataclass(frozen=True)
class _Flight:
    """A block that is being gathered."""

    number: int
    whole: torch.Tensor
    passing: Passing


class Rotation:
    """Has the blocks of a model gathered, one after the other, while it runs.

    A block lies at one end of a buffer that has room for the two largest, and the next one is gathered into the
    other end meanwhile. Between calls nothing is under way: ranks may load and unload their parts when they like.

    Args:
        comm: the ranks that have the parts.
        count: of blocks.

    Attributes:
        gathers: blocks gathered so far.
        wasted: those of them that were not used, since another block came.
        waited: seconds that blocks had to wait for their weights; on an accelerator, for queueing.
    """

    def __init__(self, comm: Comm, count: int) -> None:
        self._comm = comm
        self._order = Order(count)
        self._checked: set[str] = set()
        self._blocks: Sequence[Block] = ()
        self._handles: list[RemovableHandle] = []
        self._arena = torch.empty(0)
        self._low = False
        self._prefetch = False
        self._flight: _Flight | None = None
        self._current: int | None = None
        self._running = False
        self.gathers = 0
        self.wasted = 0
        self.waited = 0.0

    @property
    def bytes(self) -> int:
        """What the buffer occupies."""
        return self._arena.nbytes

    @property
    def opened(self) -> bool:
        return bool(self._handles)

    def open(self, blocks: Sequence[Block], parts: Parts, device: torch.device, *, prefetch: bool) -> None:
        """From now on the blocks' weights are where `parts` has them. Call it outside of inference mode."""
        assert not self.opened
        self._blocks, self._parts, self._prefetch = blocks, parts, prefetch
        self._arena = torch.empty(
            arena_bytes([block.packing for block in blocks], prefetch=prefetch), dtype=torch.uint8, device=device
        )
        for number, block in enumerate(blocks):
            block.release()
            # before other hooks, so that a gather starts before they exchange anything
            enter = functools.partial(self._enter, number)
            self._handles.append(block.module.register_forward_pre_hook(lambda *_, enter=enter: enter(), prepend=True))
            # also after an error, which would leave views of memory that another block takes
            leave = functools.partial(self._leave, number)
            self._handles.append(block.module.register_forward_hook(lambda *_, leave=leave: leave(), always_call=True))

    def resize(self) -> None:
        """The packing of some blocks has changed."""
        assert self._flight is None and self._current is None
        needed = arena_bytes([block.packing for block in self._blocks], prefetch=self._prefetch)
        if needed != self._arena.numel():
            device, self._arena = self._arena.device, torch.empty(0)
            self._arena = torch.empty(needed, dtype=torch.uint8, device=device)

    def close(self) -> None:
        """Take the hooks off and give the buffer back; weights stay placeholders."""
        assert self._flight is None and self._current is None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._arena = torch.empty(0)
        self._blocks = ()

    @contextlib.contextmanager
    def call(self, method: str, *, check: bool = True) -> Iterator[None]:
        """The model runs inside. Every rank that has parts must run the same.

        Args:
            method: what is called: each begins with a block of its own.
            check: look, in the first call of a method, whether weights are read while they are not there.

        Raises:
            UnsupportedError: they are, or a block runs inside of another one.
        """
        first = self._order.begin(method) if self.opened else None
        if first is not None and self._prefetch:
            self._flight = self._start(first)
        self._running = True
        try:
            if check and self.opened and method not in self._checked:
                with _Reads(self._blocks):
                    yield
                self._checked.add(method)
            else:
                yield
            self._order.end()
        except BaseException:
            try:
                self._drain()
            except RuntimeError as error:  # another rank is gone, which is reported by itself
                log.debug("a gather did not end: %s", error)
                self._flight = None
            raise
        finally:
            self._running = False
            if self._current is not None:  # an error that hooks are not called after
                self._leave(self._current)
        self._drain()

    def _enter(self, number: int) -> None:
        if not self._running:
            raise UnsupportedError(
                f"The block {self._blocks[number].name} was called outside of the model's forward",
                "its weights are divided over the workers",
                "Switch FSDP and FSDP_CPU_OFFLOAD off for this workflow",
            )
        if self._current is not None:
            inside = self._blocks[self._current].name
            raise UnsupportedError(
                f"The block {self._blocks[number].name} runs inside of the block {inside}",
                "only one block's weights are there at a time",
                "Switch FSDP and FSDP_CPU_OFFLOAD off for this model",
            )
        # every rank skips the same blocks, so every rank has gathered the same in vain
        if self._flight is not None and self._flight.number != number:
            self._drain()
        began = time.perf_counter()
        flight, self._flight = self._flight or self._start(number), None
        flight.passing.wait()
        self.waited += time.perf_counter() - began
        self._current = number
        with torch.inference_mode(False):
            self._blocks[number].point(flight.whole)
        after = self._order.saw(number)
        if self._prefetch and after is not None and after != number:
            self._flight = self._start(after)

    def _leave(self, number: int) -> None:
        if self._current == number:
            self._current = None
            with torch.inference_mode(False):
                self._blocks[number].release()

    def _start(self, number: int) -> _Flight:
        part = self._parts.take(number)
        size = self._blocks[number].packing.total
        # the other end is the block's that computes now, or whose kernels are queued
        self._low = not self._low or not self._prefetch
        whole = self._arena[:size] if self._low else self._arena[self._arena.numel() - size :]
        self.gathers += 1
        flight = _Flight(number, whole, self._comm.start_gather(part, whole))
        after = self._order.after(number)
        if self._prefetch and after is not None:
            self._parts.ahead(after)
        return flight

    def _drain(self) -> None:
        """What is under way ends unused; on every rank that shares it."""
        flight, self._flight = self._flight, None
        self._parts.drop()
        if flight is not None:
            self.wasted += 1
            flight.passing.wait()


class _Reads(torch.overrides.TorchFunctionMode):
    """Raises where a placeholder's values are asked for: as zeros or NaN they would end in a wrong picture."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self._names = {
            tensor.untyped_storage().data_ptr(): block.name for block in blocks for tensor in block.placeholders()
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") not in LOOKS:
            for value in (*args, *(kwargs or {}).values()):
                found = self._block_of(value)
                if found:
                    raise UnsupportedError(
                        f"The model reads a weight of the block {found} while that does not run",
                        f"in {getattr(func, '__name__', func)}; its weights are divided over the workers",
                        "Switch FSDP and FSDP_CPU_OFFLOAD off for this model",
                    )
        return func(*args, **(kwargs or {}))

    def _block_of(self, value: Any) -> str | None:
        if type(value) not in (torch.Tensor, nn.Parameter) or value.device.type == "meta":
            return None
        with torch._C.DisableTorchFunction():
            return self._names.get(value.untyped_storage().data_ptr())


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights can come and go as one, by name: members of the outermost lists that are called.

    A list or dict is not called itself, and some models call the members of a Sequential by themselves.
    """
    yield from _units(model, "", inside=False)


def _units(module: nn.Module, name: str, *, inside: bool) -> Iterator[tuple[str, nn.Module]]:
    holder = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    if inside and not holder:
        yield name, module
        return
    inside = inside or isinstance(module, (nn.ModuleList, nn.ModuleDict))
    for key, child in module.named_children():
        yield from _units(child, f"{name}.{key}" if name else key, inside=inside)
