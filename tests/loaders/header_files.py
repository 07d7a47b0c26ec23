"""Small weight files made by hand, and what must hold of every header that is accepted."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_raylight.loaders.header import Entry, Header, read_header

Part = bytes | tuple[int, int]
"""Bytes as they are, or an unsigned integer and its size in bytes."""
UINT32, BOOL, TEXT, ARRAY = 4, 7, 8, 9
F32, F16, Q4_0, Q8_0, Q4_K, BF16 = 0, 1, 2, 8, 12, 30


class Scratch:
    """One file that is written anew for each header, to read it under any name."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "scratch"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT)

    def write(self, blob: bytes, size: int | None = None) -> None:
        """Make `blob` the file's contents, and zeros up to `size` bytes."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, blob, 0)
        if size is not None:
            os.ftruncate(self.fd, size)

    def read(self, blob: bytes, name: str, size: int | None = None) -> Header:
        """The header of `blob`, read as that of a file called `name`."""
        self.write(blob, size)
        return read_header(str(self.path.with_name(name)), self.fd)

    def bytes_of(self, entry: Entry) -> bytes:
        """What the file has where an entry says it is."""
        return os.pread(self.fd, entry.nbytes, entry.start)


class Reads:
    """Stands for os.pread and remembers what was asked of it."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self._pread = os.pread

    def __call__(self, fd: int, count: int, start: int) -> bytes:
        self.ranges.append((start, start + count))
        return self._pread(fd, count, start)

    @property
    def total(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    @property
    def end(self) -> int:
        return max((stop for _, stop in self.ranges), default=0)


def must_hold(header: Header, size: int) -> None:
    """Every entry lies in the file, agrees with its shape, and shares no byte with another."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    assert header.size == size
    end = 0
    for name, entry in header.entries.items():
        assert name == entry.name and name.isprintable()
        assert end <= entry.start <= entry.stop <= size
        end = entry.stop
        assert all(type(dim) is int and dim >= 0 for dim in entry.shape)
        count = math.prod(entry.shape)
        if entry.quant:
            values, block = GGML_QUANT_SIZES[GGMLQuantizationType[entry.quant]]
            assert count % values == 0 and entry.dtype.itemsize == 1
            assert entry.nbytes == count // values * block
        else:
            assert entry.nbytes == count * entry.dtype.itemsize
    for key, text in header.metadata.items():
        assert (key + text).encode().decode() == key + text


def tensor(
    dtype: str = "F32", shape: Sequence[Any] = (4,), offsets: Sequence[Any] = (0, 16), **extra: Any
) -> dict[str, Any]:
    """What a safetensors header says of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file; `header` is JSON already where it is bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def text(value: bytes, length: int | None = None) -> list[Part]:
    """A GGUF string."""
    return [(len(value) if length is None else length, 8), value]


def field(key: bytes, kind: int, *value: Part) -> list[Part]:
    """A GGUF field of any type."""
    return [*text(key), (kind, 4), *value]


def array(key: bytes, kind: int, items: Sequence[Part], length: int | None = None) -> list[Part]:
    """A GGUF field that is an array; each string is two parts."""
    count = len(items) // 2 if kind == TEXT else len(items)
    return field(key, ARRAY, (kind, 4), (count if length is None else length, 8), *items)


def info(name: bytes, dims: Sequence[int], kind: int = F32, offset: int = 0, rank: int | None = None) -> list[Part]:
    """What a GGUF header says of one tensor."""
    ranks = len(dims) if rank is None else rank
    return [*text(name), (ranks, 4), *((dim, 8) for dim in dims), (kind, 4), (offset, 8)]


def parts(
    fields: Sequence[list[Part]] = (),
    infos: Sequence[list[Part]] = (),
    *,
    version: int = 3,
    tensors: int | None = None,
    count: int | None = None,
) -> list[Part]:
    """A GGUF header; `tensors` and `count` are what it says of how many there are."""
    return [
        b"GGUF",
        (version, 4),
        (len(infos) if tensors is None else tensors, 8),
        (len(fields) if count is None else count, 8),
        *(part for each in (*fields, *infos) for part in each),
    ]


def integers(header: Sequence[Part]) -> list[tuple[int, int]]:
    """Offset and size of each integer of a GGUF header."""
    found, at = [], 0
    for part in header:
        if isinstance(part, bytes):
            at += len(part)
        else:
            found.append((at, part[1]))
            at += part[1]
    return found


def gguf(header: Sequence[Part], data: bytes = b"", *, alignment: int = 32) -> bytes:
    """A GGUF file."""
    raw = b"".join(
        part if isinstance(part, bytes) else (part[0] % (1 << 8 * part[1])).to_bytes(part[1], "little")
        for part in header
    )
    return raw + b"\0" * (-len(raw) % alignment) + data
