"""From the file to the device: reader threads, page-locked buffers and a copy stream behind one small interface."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from .source import Source, read_into

PART_BYTES = 8 << 20
"""What one thread reads at a time, into a buffer of that size."""
THREADS = 12
"""Read and start copies: from the page cache one thread copies 4 GB/s, a bus of 16 lanes takes 50."""
BUFFERS = 2 * THREADS
"""While one is filled, another is on its way to the device. All the host memory an upload takes: 192 MiB."""
AHEAD = 2 * BUFFERS
"""Parts, about, that are begun before what comes before them is asked for."""


class Engine(Protocol):
    """What an upload needs of a device."""

    @property
    def buffers(self) -> Sequence[torch.Tensor]:
        """BUFFERS times PART_BYTES of host memory (uint8) that the device can copy from, the same at every call."""

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes (uint8) on the device, for `copy` alone until `finish`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin to copy host bytes to the device, from any thread; returns a mark for `wait`."""

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
        target = torch.empty(size, dtype=torch.uint8, device=self.device)
        # work that is queued may still use what the allocator gave
        self._stream.wait_stream(self._module.current_stream(self.device))
        return target

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
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
    # those whose copies were begun first come first
    free: SimpleQueue[tuple[torch.Tensor, Any]] = SimpleQueue()
    for buffer in engine.buffers:
        free.put((buffer, None))

    def bring(piece: Piece, start: int, target: torch.Tensor) -> None:
        buffer, mark = free.get()
        try:
            engine.wait(mark)
            part = buffer[: target.numel()]
            _read(source, piece, start, part)
            # in which tensors of any mode may be written
            with torch.inference_mode():
                mark = engine.copy(target, part)
        finally:
            free.put((buffer, mark))

    threads = ThreadPoolExecutor(THREADS)
    begun: deque[tuple[Piece, torch.Tensor, list[Future[None]]]] = deque()

    def land() -> torch.Tensor:
        piece, whole, parts = begun.popleft()
        for part in parts:
            part.result()
        engine.finish()
        return _finished(piece, whole)

    try:
        for piece in pieces:
            whole = engine.allocate(piece.tensor.nbytes)
            starts = range(0, whole.numel(), PART_BYTES)
            parts = [threads.submit(bring, piece, start, whole[start : start + PART_BYTES]) for start in starts]
            begun.append((piece, whole, parts))
            while sum(len(parts) for *_, parts in begun) > AHEAD:
                yield land()
        while begun:
            yield land()
    finally:
        threads.shutdown(cancel_futures=True)
        for _ in engine.buffers:
            engine.wait(free.get()[1])
    source.check()


def _finished(piece: Piece, raw: torch.Tensor) -> torch.Tensor:
    """The tensor that these bytes are."""
    if not raw.numel():
        return piece.tensor.to(device=raw.device, dtype=piece.dtype)
    tensor = raw.view(piece.tensor.dtype).view(piece.tensor.shape)
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
