"""The bytes of blocks whose weights are divided over ranks: how they lie in a block, and where a rank's part is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..raylight.packing import Packing
from ..raylight.residency import units

Read = Callable[[Sequence[tuple[torch.Tensor, torch.dtype]]], Iterable[torch.Tensor]]
"""Brings flat host tensors to the device, each in a dtype, in their order; out of the file's map or by its bytes."""
SMALL = 256
"""A block of less than this part of the largest one stays whole: gathering it would cost more than it frees."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of a block.

    Attributes:
        host: its values, on the host and contiguous.
        dtype: what it is on the device.
        put: makes the module use a tensor in its place.
        shape: what it is on the device, which a patch may have made another one than on the host.
    """

    host: torch.Tensor
    dtype: torch.dtype
    put: Callable[[torch.Tensor], None]
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.shape.numel() * self.dtype.itemsize


class PackedBlock:
    """A module some of whose weights are views of a flat run of bytes, or placeholders.

    A placeholder is one element, expanded to the weight's shape: NaN where the dtype has it, so that a stray read
    shows. Writing to it raises. Never move it to another device or dtype: it would become full size.

    Args:
        leaves: the weights, at least one and none of them empty.
        ranks: among which the bytes are divided.
    """

    def __init__(
        self, name: str, module: nn.Module, leaves: Sequence[Leaf], *, ranks: int, device: torch.device
    ) -> None:
        self.name = name
        self.module = module
        self.leaves = tuple(leaves)
        self.packing = Packing(tuple(leaf.nbytes for leaf in leaves), ranks)
        self._device = device

    @functools.cached_property
    def _stubs(self) -> tuple[torch.Tensor, ...]:
        return tuple(_placeholder(leaf, self._device) for leaf in self.leaves)

    def placeholders(self) -> Sequence[torch.Tensor]:
        return self._stubs

    def point(self, whole: torch.Tensor) -> None:
        for leaf, start, size in zip(self.leaves, self.packing.starts, self.packing.sizes, strict=True):
            leaf.put(whole[start : start + size].view(leaf.dtype).view(leaf.shape))

    def release(self) -> None:
        for leaf, stub in zip(self.leaves, self._stubs, strict=True):
            leaf.put(stub)

    def fill(self, out: torch.Tensor, rank: int, read: Read, changed: Mapping[int, torch.Tensor] | None = None) -> None:
        """Write a rank's part into `out` [packing.part].

        Args:
            changed: tensors to take in place of what the host has, by number of their leaf, in the leaf's dtype.
        """
        changed = changed or {}
        spans = list(self.packing.spans(rank))
        slices = []
        for span in spans:
            leaf = self.leaves[span.index]
            flat = changed[span.index].reshape(-1) if span.index in changed else leaf.host.view(-1)
            slices.append((flat[span.start // leaf.dtype.itemsize : span.stop // leaf.dtype.itemsize], leaf.dtype))
        given = iter(read([item for item, span in zip(slices, spans, strict=True) if span.index not in changed]))
        for (flat, _), span in zip(slices, spans, strict=True):
            tensor = flat if span.index in changed else next(given)
            out[span.at : span.at + span.stop - span.start].copy_(tensor.view(torch.uint8))
        for _ in given:  # lets go of its buffers
            raise AssertionError("more tensors than were asked for")


def pack(
    model: nn.Module,
    leaf: Callable[[nn.Module, str, nn.Parameter], Leaf | None],
    *,
    ranks: int,
    device: torch.device,
) -> list[PackedBlock]:
    """The blocks of a model, as they are divided over ranks; every other weight stays whole.

    Args:
        leaf: describes a weight, by its module and name; None for one that is to stay whole. Then all weights of
            its module do, as those of modules that share one.
    """
    owners: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), set()).add((id(module), name))
    found: dict[nn.Module, PackedBlock] = {}
    for name, unit in units(model):
        leaves: list[Leaf] = []
        for module in unit.modules() if unit not in found else ():
            own = list(module.named_parameters(recurse=False))
            made = [leaf(module, key, parameter) for key, parameter in own if len(owners[id(parameter)]) == 1]
            whole = [item for item in made if item is not None and item.nbytes]
            if len(whole) == len(own):
                leaves += whole
        if leaves:
            found[unit] = PackedBlock(name, unit, leaves, ranks=ranks, device=device)
    largest = max((block.packing.total for block in found.values()), default=0)
    return [block for block in found.values() if block.packing.total * SMALL >= largest]


class Shards:
    """Every block's part, kept on the device.

    Args:
        rank: whose parts.
        read: gives the bytes.
    """

    def __init__(self, blocks: Sequence[PackedBlock], rank: int, read: Read, device: torch.device) -> None:
        self._rank = rank
        self._read = read
        self._device = device
        self._parts: list[torch.Tensor] = []
        for block in blocks:
            self._parts.append(self._part(block, {}))

    @property
    def bytes(self) -> int:
        """What they occupy."""
        return sum(part.nbytes for part in self._parts)

    def write(self, number: int, block: PackedBlock, changed: Mapping[int, torch.Tensor]) -> None:
        """Make a block's part anew; see PackedBlock.fill."""
        self._parts[number] = self._part(block, changed)

    def ahead(self, number: int) -> None:
        """It is there."""

    def take(self, number: int) -> torch.Tensor:
        return self._parts[number]

    def drop(self) -> None:
        """Nothing is begun ahead."""

    def close(self) -> None:
        self._parts.clear()

    def _part(self, block: PackedBlock, changed: Mapping[int, torch.Tensor]) -> torch.Tensor:
        # padding is sent as well, and sends nothing of what was there before
        part = torch.zeros(block.packing.part, dtype=torch.uint8, device=self._device)
        block.fill(part, self._rank, self._read, changed)
        return part


class Streams:
    """Parts that are read when they are asked for, ahead of that by a thread.

    Args:
        rank: whose parts.
        read: gives the bytes; called in another thread where they are read ahead.
        ahead: whether there is a second buffer to read into while the first is in use.
    """

    def __init__(
        self, blocks: Sequence[PackedBlock], rank: int, read: Read, device: torch.device, *, ahead: bool
    ) -> None:
        self._blocks = blocks
        self._rank = rank
        self._read = read
        size = max(block.packing.part for block in blocks)
        self._buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2 if ahead else 1)]
        self._turn = 0
        self._device = device
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        # what is read ahead must not hold up what computes: on an accelerator it has a stream of its own
        self._stream = None if self._module is None else self._module.Stream(device=device)
        self._thread = ThreadPoolExecutor(1, "raylight-weights")
        self._begun: tuple[int, Future[Any]] | None = None

    @property
    def bytes(self) -> int:
        """What the buffers occupy."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def ahead(self, number: int) -> None:
        self.drop()
        # the buffer's last part has been gathered where this rank's work has come to now
        begin = None if self._stream is None else self._module.current_stream(self._device).record_event()
        self._begun = (number, self._thread.submit(self._fill_beside, number, self._next(), begin))

    def take(self, number: int) -> torch.Tensor:
        if self._begun is not None and self._begun[0] == number:
            (_, begun), self._begun = self._begun, None
            self._after(begun.result())
            return self._part(number, self._buffers[self._turn % len(self._buffers)])
        self.drop()
        buffer = self._next()
        self._fill(number, buffer)
        return self._part(number, buffer)

    def drop(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            # its error is nobody's: what it read is not used
            if begun[1].exception() is None:
                self._after(begun[1].result())
            self._turn -= 1

    def close(self) -> None:
        self.drop()
        self._thread.shutdown()
        self._buffers.clear()

    def _next(self) -> torch.Tensor:
        self._turn += 1
        return self._buffers[self._turn % len(self._buffers)]

    def _after(self, end: Any) -> None:
        """What is done with the buffer from now on comes after an event; None is none."""
        if end is not None:
            self._module.current_stream(self._device).wait_event(end)

    def _part(self, number: int, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[: self._blocks[number].packing.part]

    def _fill(self, number: int, buffer: torch.Tensor) -> None:
        self._blocks[number].fill(self._part(number, buffer), self._rank, self._read)

    def _fill_beside(self, number: int, buffer: torch.Tensor, begin: Any) -> Any:
        """In the thread: fill after an event on the device; the event after which it is done."""
        if self._stream is None:
            self._fill(number, buffer)
            return None
        with self._module.stream(self._stream):
            self._stream.wait_event(begin)
            self._fill(number, buffer)
            return self._stream.record_event()


def from_map(slices: Sequence[tuple[torch.Tensor, torch.dtype]]) -> Iterable[torch.Tensor]:
    """A Read for a device whose memory is the host's."""
    return (flat.to(dtype) for flat, dtype in slices)


def _placeholder(leaf: Leaf, device: torch.device) -> torch.Tensor:
    # one byte has no room for a NaN that every kernel knows
    empty = float("nan") if leaf.dtype.is_floating_point and leaf.dtype.itemsize > 1 else 0
    with torch.inference_mode(False):
        return torch.full((), empty, device=device).to(leaf.dtype).expand(leaf.shape)
