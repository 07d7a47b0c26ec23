"""From the file to the device: reader threads, page-locked buffers and a copy stream behind one small interface."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from .source import Source

PART_BYTES = 8 << 20
"""What one thread reads at a time, into a buffer of that size."""
THREADS = 12
"""Read and start copies: from the page cache one thread copies 4 GB/s, a bus of 16 lanes takes 50."""
AHEAD = 4 * THREADS
"""Parts that are begun before what comes before them is asked for."""


class Lane(Protocol):
    """What one thread of an upload reads into and copies from."""

    def buffer(self) -> torch.Tensor:
        """PART_BYTES of host memory (uint8) that no copy reads any more."""

    def copy(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Begin to copy parts of the last buffer to the device: (target, part). For threads that end with the
        upload: their stream may change."""

    def wait(self) -> None:
        """Return when every copy has read its buffer."""


class Engine(Protocol):
    """What an upload needs of a device."""

    idle: list[Lane]
    """Those that no upload uses."""

    def lane(self) -> Lane:
        """Another one."""

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes (uint8) on the device, for copies of lanes alone until `finish`."""

    def finish(self) -> None:
        """Make what the device does from now on see everything that was copied."""


class HostEngine:
    """The engine of a device whose memory is the host's: copies are done when they return."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.idle: list[Lane] = []

    def lane(self) -> Lane:
        return _HostLane()

    def allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def finish(self) -> None:
        """Nothing is under way."""


class _HostLane:
    def __init__(self) -> None:
        self._buffer = torch.empty(PART_BYTES, dtype=torch.uint8)

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def copy(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for target, part in copies:
            target.copy_(part)

    def wait(self) -> None:
        """Nothing is under way."""


class StreamEngine:
    """The engine of an accelerator with streams: page-locked buffers, copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.idle: list[Lane] = []
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream(device=device)

    def lane(self) -> Lane:
        return _StreamLane(self._module, self._stream)

    def allocate(self, size: int) -> torch.Tensor:
        target = torch.empty(size, dtype=torch.uint8, device=self.device)
        # work that is queued may still use what the allocator gave
        self._stream.wait_stream(self._module.current_stream(self.device))
        return target

    def finish(self) -> None:
        self._module.current_stream(self.device).wait_stream(self._stream)


class _StreamLane:
    """Two buffers, in turns: while one is filled the other is on its way. What a part costs in Python is what limits
    an upload, since one thread at a time runs Python; buffers, marks and the stream are made once."""

    def __init__(self, module: Any, stream: Any) -> None:
        self._module = module
        self._stream = stream
        self._turn = 0
        # page-locking takes longer than a small model does to load: once for all uploads
        self._places = [(torch.empty(PART_BYTES, dtype=torch.uint8, pin_memory=True), module.Event()) for _ in range(2)]

    def buffer(self) -> torch.Tensor:
        self._turn = 1 - self._turn
        buffer, copied = self._places[self._turn]
        copied.synchronize()
        return buffer

    def copy(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._module.set_stream(self._stream)
        for target, part in copies:
            target.copy_(part, non_blocking=True)
        self._places[self._turn][1].record(self._stream)

    def wait(self) -> None:
        for _, copied in self._places:
            copied.synchronize()


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


@dataclass(frozen=True)
class _Part:
    """What one lane brings at a time: as many bytes of pieces that follow each other as its buffer holds.

    Attributes:
        spans: of a piece, from where in it, to where on the device.
        ends: the pieces that are whole with this part and those before it, and what they are on the device.
        done: is told of its end: None, or what went wrong.
    """

    spans: list[tuple[Piece, int, torch.Tensor]] = field(default_factory=list)
    ends: list[tuple[Piece, torch.Tensor]] = field(default_factory=list)
    done: SimpleQueue[BaseException | None] = field(default_factory=SimpleQueue)


def upload(source: Source, pieces: Iterable[Piece], engine: Engine) -> Iterator[torch.Tensor]:
    """Copies of host tensors on the engine's device, in the order of `pieces`; use file order.

    Bytes of the file are read into the lanes' buffers, not through the map: a file that was truncated ends in an
    error and not in a signal. What is yielded may be used by work that is queued after it; no buffer is in use
    when the iteration ends.

    Raises:
        LoadError: the file changed.
    """
    source.check()
    todo: SimpleQueue[_Part | None] = SimpleQueue()
    begun: deque[_Part] = deque()
    lanes: list[Lane] = []
    threads = ThreadPoolExecutor(THREADS, "raylight-upload")

    def land() -> Iterator[torch.Tensor]:
        part = begun.popleft()
        if error := part.done.get():
            raise error
        if part.ends:
            engine.finish()
        for piece, whole in part.ends:
            yield _finished(piece, whole)

    try:
        for part in _parts(pieces, engine):
            if len(lanes) < THREADS:
                lanes.append(engine.idle.pop() if engine.idle else engine.lane())
                threads.submit(_work, source, lanes[-1], todo)
            begun.append(part)
            todo.put(part)
            if len(begun) > AHEAD:
                yield from land()
        while begun:
            yield from land()
    finally:
        _empty(todo)
        for _ in lanes:
            todo.put(None)
        threads.shutdown()
        for lane in lanes:
            lane.wait()
        engine.idle += lanes
    source.check()


def _parts(pieces: Iterable[Piece], engine: Engine) -> Iterator[_Part]:
    """Pieces, divided; every part but the last is full."""
    part, room = _Part(), PART_BYTES
    for piece in pieces:
        whole, start = engine.allocate(piece.tensor.nbytes), 0
        while start < whole.numel():
            if not room:
                yield part
                part, room = _Part(), PART_BYTES
            target = whole[start : start + room]
            part.spans.append((piece, start, target))
            start, room = start + target.numel(), room - target.numel()
        part.ends.append((piece, whole))
    if part.ends:
        yield part


def _work(source: Source, lane: Lane, todo: SimpleQueue[_Part | None]) -> None:
    """Bring parts until there is None."""
    # in which tensors of any mode may be written
    with torch.inference_mode():
        for part in iter(todo.get, None):
            try:
                _bring(source, lane, part)
            except BaseException as error:
                part.done.put(error)
            else:
                part.done.put(None)


def _bring(source: Source, lane: Lane, part: _Part) -> None:
    rest = lane.buffer()
    copies = []
    for piece, start, target in part.spans:
        read, rest = rest[: target.numel()], rest[target.numel() :]
        if piece.offset is None:
            read.copy_(_bytes(piece.tensor)[start : start + target.numel()])
        else:
            source.fill(piece.offset + start, memoryview(read.numpy()))  # type: ignore[arg-type]
        copies.append((target, read))
    lane.copy(copies)


def _empty(queue: SimpleQueue[Any]) -> None:
    """Take out what nobody has taken."""
    try:
        while True:
            queue.get_nowait()
    except Empty:
        return


def _finished(piece: Piece, raw: torch.Tensor) -> torch.Tensor:
    """The tensor that these bytes are."""
    if not raw.numel():
        return piece.tensor.to(device=raw.device, dtype=piece.dtype)
    tensor = raw.view(piece.tensor.dtype).view(piece.tensor.shape)
    return tensor if tensor.dtype == piece.dtype else tensor.to(piece.dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    )
