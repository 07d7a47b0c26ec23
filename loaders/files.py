"""Files that are read by bytes: opening, reading, and what is said where one changed meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from ..raylight.errors import LoadError
from .header import Entry, Header

CHUNK_BYTES = 16 << 20
"""What one thread reads at a time: large enough for a disk or a network filesystem, small enough to share out."""
READ_THREADS = 4


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of the file for the length of a block.

    Raises:
        LoadError: it cannot be opened.
    """
    fd = open_file(path)
    try:
        yield fd
    finally:
        os.close(fd)


def open_file(path: str) -> int:
    """A descriptor of the file.

    Raises:
        LoadError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise LoadError(
            f"The model file {path} cannot be read", str(error), "Check the file name and its permissions"
        ) from error


def changed(path: str, how: str) -> LoadError:
    """The error for a file that is not what it was when it was opened."""
    return LoadError(
        f"{os.path.basename(path)} changed while it was in use",
        how,
        "Wait until the file is complete, then queue the prompt again: it is loaded anew",
    )


def fill(fd: int, path: str, start: int, target: memoryview) -> None:
    """Fill a buffer from `start` of a file.

    Raises:
        LoadError: the file ends before the buffer does: it was truncated.
    """
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done:]], start + done)
        if not count:
            raise changed(path, f"it ends at {start + done}")
        done += count


def read_into(fd: int, path: str, start: int, target: torch.Tensor) -> None:
    """Fill a contiguous uint8 CPU tensor from `start` of a file, by several threads in file order.

    Raises:
        LoadError: as `fill`.
    """
    view = memoryview(target.numpy())  # type: ignore[arg-type]

    def read(begin: int) -> None:
        fill(fd, path, start + begin, view[begin : begin + CHUNK_BYTES])

    begins = range(0, len(view), CHUNK_BYTES)
    if len(begins) <= 1:
        fill(fd, path, start, view)
        return
    with ThreadPoolExecutor(min(READ_THREADS, len(begins))) as pool:
        for _ in pool.map(read, begins):
            pass


def read_tensor(header: Header, fd: int, entry: Entry) -> torch.Tensor:
    """A private copy of one tensor, for small ones that are wanted without the rest of the file."""
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    read_into(fd, header.path, entry.start, raw)
    return raw if entry.quant else raw.view(entry.dtype).view(entry.shape)
