"""How the bytes of a model's blocks are divided over ranks, and what each rank then holds: pure arithmetic."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

ALIGN = 256
"""Where a tensor may start, in bytes: a multiple of what any dtype or kernel wants; it costs less per tensor."""
RESIDENCIES = ("resident", "sharded", "streamed")
"""Where the weights of blocks are between their uses: on every rank's device, 1/N on each, or in the file's map."""


@dataclass(frozen=True)
class Span:
    """Bytes start:stop of tensor number `index`; they are at byte `at` of the part that has them."""

    index: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Packing:
    """The tensors of one block in one flat run of bytes, divided into equal parts, one per rank.

    Attributes:
        sizes: bytes of each tensor.
        ranks: among which the run is divided.
    """

    sizes: tuple[int, ...]
    ranks: int

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each tensor is in the run."""
        return tuple(itertools.accumulate((_padded(size, ALIGN) for size in self.sizes[:-1]), initial=0))

    @functools.cached_property
    def part(self) -> int:
        """Bytes of one rank's part."""
        used = self.starts[-1] + self.sizes[-1]
        return _padded(used, self.ranks * ALIGN) // self.ranks

    @property
    def total(self) -> int:
        """Bytes of the run with its padding."""
        return self.part * self.ranks

    def spans(self, rank: int) -> Iterator[Span]:
        """What a rank's part consists of; every bound is a multiple of ALIGN or the end of a tensor."""
        low, high = rank * self.part, (rank + 1) * self.part
        for index, (at, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            start, stop = max(low, at), min(high, at + size)
            if start < stop:
                yield Span(index, start - at, stop - at, start - low)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one rank's weights, once they are in use.

    Attributes:
        shards: its parts of all blocks.
        buffers: where blocks are gathered, and what is read ahead of that.
        outside: what it holds whole.
    """

    shards: int = 0
    buffers: int = 0
    outside: int = 0

    @property
    def total(self) -> int:
        return self.shards + self.buffers + self.outside

    def __str__(self) -> str:
        if not self.buffers:
            return f"{gigabytes(self.total)} per worker"
        return (
            f"{gigabytes(self.total)} per worker: {gigabytes(self.shards)} of parts, {gigabytes(self.buffers)} of "
            f"buffers, {gigabytes(self.outside)} whole"
        )


def footprint(residency: str, packings: Sequence[Packing], *, outside: int, prefetch: bool) -> Footprint:
    """What a rank holds of blocks packed like this, and of `outside` bytes beside them.

    Args:
        residency: one of RESIDENCIES.
        prefetch: whether the next block is gathered while one computes.
    """
    if residency == "resident":
        return Footprint(outside=outside + sum(sum(packing.sizes) for packing in packings))
    shards = sum(packing.part for packing in packings) if residency == "sharded" else 0
    ahead = 2 if prefetch else 1
    buffers = arena_bytes(packings, prefetch=prefetch)
    if residency == "streamed":
        buffers += ahead * max(packing.part for packing in packings)
    return Footprint(shards=shards, buffers=buffers, outside=outside)


def arena_bytes(packings: Sequence[Packing], *, prefetch: bool) -> int:
    """Bytes that hold any block, or any two of them at once."""
    largest = sorted((packing.total for packing in packings), reverse=True)
    return sum(largest[: 2 if prefetch else 1])


def advice(needs: Mapping[str, Footprint], *, room: int, activations: int) -> str:
    """What to switch on where resident weights do not fit; "" where they do.

    Args:
        needs: of each residency that is possible.
        room: bytes of the device.
        activations: an estimate of what a call needs beside weights.
    """
    whole = needs["resident"].total
    if whole + activations <= room:
        return ""
    switches = {"sharded": "FSDP", "streamed": "FSDP_CPU_OFFLOAD"}
    fitting = [
        f"{switch} ({gigabytes(needs[name].total)} per worker)"
        for name, switch in switches.items()
        if name in needs and needs[name].total + activations <= room
    ]
    return (
        f"The weights take {gigabytes(whole)} per worker, a call about {gigabytes(activations)} more, and the device "
        f"has {gigabytes(room)}: they would be loaded in part, and the rest brought at every step. "
        + (f"Switch on {' or '.join(fitting)} in the Ray Init Actor node" if fitting else "Use more workers, or fp8")
    )


def gigabytes(count: int) -> str:
    """A number of bytes for a message."""
    return f"{count / 1e9:.2f} GB"


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
