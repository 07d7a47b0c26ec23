"""From the file to the device: reader threads, page-locked buffers and a copy stream behind one small interface."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .source import Source, read_into

PART_BYTES = 8 << 20
"""What one thread reads at a time, into a buffer of that size."""
READS = 16
"""Under way at once: from the page cache one thread copies a few GB/s, a bus of 16 lanes takes 50."""
BUFFERS = 24
"""More than reads: the others are on their way to the device. All the host memory an upload takes: 192 MiB."""


class Engine(Protocol):
    """What an upload needs of a device."""

    @property
    def buffers(self) -> Sequence[torch.Tensor]:
        """BUFFERS times PART_BYTES of host memory (uint8) that the device can copy from, the same at every call."""

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes (uint8) on the device."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin to copy host bytes to the device; returns a mark for `wait`."""

    def wait(self, mark: Any) -> None:
        """Return when the copy of the mark has read its source; None is no copy."""

    def finish(self) -> None:
        """Make what the device does from now on see everything that was copied."""


class HostEngine:
    """The engine of a device whose memory is the host's: copies are done when they return."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @functools.cached_property
    def buffers(self) -> Sequence[torch.Tensor]:
        return [torch.empty(PART_BYTES, dtype=torch.uint8) for _ in range(BUFFERS)]

    def allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, mark: Any) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is under way."""


class StreamEngine:
    """The engine of an accelerator with streams: page-locked buffers, copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream(device=device)

    @functools.cached_property
    def buffers(self) -> Sequence[torch.Tensor]:
        # page-locking takes longer than a small model does to load: once for all uploads
        return [torch.empty(PART_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]

    def allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        # work that is queued may still use what the allocator gave for the target
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            mark = self._module.Event()
            mark.record(self._stream)
        return mark

    def wait(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()

    def finish(self) -> None:
        self._module.current_stream(self.device).wait_stream(self._stream)


def engine_for(device: torch.device) -> Engine:
    """The engine of a device."""
    return HostEngine(device) if device.type == "cpu" else StreamEngine(device)


@dataclass(frozen=True)
class Piece:
    """One tensor to bring to the device.

    Attributes:
        tensor: contiguous, on the host.
        offset: where its bytes are in the source's file, None where they are only in memory.
        dtype: what it becomes on the device.
    """

    tensor: torch.Tensor
    offset: int | None
    dtype: torch.dtype


def upload(source: Source, pieces: Iterable[Piece], engine: Engine) -> Iterator[torch.Tensor]:
    """Copies of host tensors on the engine's device, in the order of `pieces`; use file order.

    Bytes of the file are read into the buffers, not through the map: a file that was truncated ends in an
    error and not in a signal. Some buffers are filled while others travel. What is yielded may be used by
    work that is queued after it; no buffer is in use when the iteration ends.

    Raises:
        LoadError: the file changed.
    """
    source.check()
    marks: list[Any] = [None] * BUFFERS
    under_way: deque[_Part] = deque()

    def land() -> Iterator[torch.Tensor]:
        part = under_way.popleft()
        part.read.result()
        marks[part.number] = engine.copy(part.target, part.buffer)
        if part.ends is not None:
            engine.finish()
            yield part.ends()

    with ThreadPoolExecutor(READS) as readers:
        for number, (piece, target, start) in enumerate(_parts(pieces, engine)):
            if len(under_way) == READS:
                yield from land()
            turn = number % BUFFERS
            engine.wait(marks[turn])
            buffer = engine.buffers[turn][: target.numel()]
            ends = None
            if start + target.numel() == piece.tensor.nbytes:
                ends = functools.partial(_finished, piece, target, start)
            read = readers.submit(_read, source, piece, start, buffer)
            under_way.append(_Part(turn, read, buffer, target, ends))
        while under_way:
            yield from land()
    for mark in marks:
        engine.wait(mark)
    source.check()


@dataclass(frozen=True)
class _Part:
    """A read that is under way: into which buffer, from there to where, and what makes the tensor of the last part."""

    number: int
    read: Future[None]
    buffer: torch.Tensor
    target: torch.Tensor
    ends: Callable[[], torch.Tensor] | None


def _parts(pieces: Iterable[Piece], engine: Engine) -> Iterator[tuple[Piece, torch.Tensor, int]]:
    """Every piece in parts: bytes on the device from `start` of the piece on. An empty piece is one empty part."""
    for piece in pieces:
        whole = engine.allocate(piece.tensor.nbytes)
        for start in range(0, max(1, whole.numel()), PART_BYTES):
            yield piece, whole[start : start + PART_BYTES], start


def _finished(piece: Piece, last: torch.Tensor, start: int) -> torch.Tensor:
    """The tensor whose last part this is; parts are views of one storage."""
    size = piece.tensor.nbytes
    raw = last.as_strided((size,), (1,), last.storage_offset() - start)
    tensor = raw.view(piece.tensor.dtype).view(piece.tensor.shape) if size else piece.tensor.to(last.device)
    return tensor if tensor.dtype == piece.dtype else tensor.to(piece.dtype)


def _read(source: Source, piece: Piece, start: int, buffer: torch.Tensor) -> None:
    if piece.offset is None:
        buffer.copy_(_bytes(piece.tensor)[start : start + buffer.numel()])
    else:
        read_into(source.fd, source.path, piece.offset + start, buffer)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    )
