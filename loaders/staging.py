"""From the file to the device: reader threads, two page-locked buffers and a copy stream behind one small interface."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .source import Source, read_into

BUFFER_BYTES = 32 << 20
"""Size of each of the two buffers: all the host memory an upload takes beyond the page cache."""
READ_THREADS = 8
"""That fill a buffer: from the page cache one thread copies a few GB/s, a bus of 16 lanes takes 50."""
PART_BYTES = 1 << 20
"""What one of them copies at the least."""


class Engine(Protocol):
    """What an upload needs of a device. Times are the device's own: `after` orders a copy before a later reuse."""

    @property
    def buffers(self) -> Sequence[torch.Tensor]:
        """Two times BUFFER_BYTES of host memory (uint8) that the device can copy from, the same at every call."""

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
        return [torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(2)]

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
        return [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

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
    error and not in a signal. While one buffer travels the other is filled. What is yielded may be used by
    work that is queued after it; no buffer is left in use when the iteration ends.

    Raises:
        LoadError: the file changed.
    """
    source.check()
    buffers = _Buffers(engine)
    with ThreadPoolExecutor(READ_THREADS) as readers:
        for piece in pieces:
            raw = engine.allocate(piece.tensor.nbytes)
            done = 0
            while done < raw.numel():
                room = buffers.room(raw.numel() - done)
                if piece.offset is None:
                    room.copy_(_bytes(piece.tensor)[done : done + room.numel()])
                else:
                    _read(readers, source, piece.offset + done, room)
                buffers.sent(engine.copy(raw[done : done + room.numel()], room))
                done += room.numel()
            engine.finish()
            tensor = raw.view(piece.tensor.dtype).view(piece.tensor.shape) if done else piece.tensor.to(raw.device)
            yield tensor if tensor.dtype == piece.dtype else tensor.to(piece.dtype)
        buffers.drain()
    source.check()


class _Buffers:
    """Two host buffers, filled from front to back in turn."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffers = engine.buffers
        self._marks: list[Any] = [None, None]
        self._turn, self._used = 0, 0

    def room(self, wanted: int) -> torch.Tensor:
        """Up to `wanted` bytes that no copy reads any more."""
        if self._used == BUFFER_BYTES:
            self._turn, self._used = 1 - self._turn, 0
            self._engine.wait(self._marks[self._turn])
        start, self._used = self._used, min(BUFFER_BYTES, self._used + wanted)
        return self._buffers[self._turn][start : self._used]

    def sent(self, mark: Any) -> None:
        """A copy of the room given last is under way."""
        self._marks[self._turn] = mark

    def drain(self) -> None:
        for mark in self._marks:
            self._engine.wait(mark)


def _read(readers: ThreadPoolExecutor, source: Source, offset: int, buffer: torch.Tensor) -> None:
    """Fill a buffer from the file, every thread a part of it."""
    step = max(PART_BYTES, -(-buffer.numel() // READ_THREADS))
    parts: list[Future[None]] = [
        readers.submit(read_into, source.fd, source.path, offset + begin, buffer[begin : begin + step])
        for begin in range(0, buffer.numel(), step)
    ]
    for part in parts:
        part.result()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    )
