"""What a weight file says of its tensors: read from its header and checked, without looking at the data."""

from __future__ import annotations

import dataclasses
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..raylight.errors import LoadError

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")
PICKLE_MAGIC = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]", re.DOTALL)
"""How a zip archive, which torch.save writes, and a pickle of protocol 2 to 5 begin."""
GGUF_MAGIC = b"GGUF"

NAME_CHARS = 1024
RANK = 8
COUNT = 1 << 63
"""Numbers of elements and bytes must stay below it: torch counts in int64."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: bytes start:stop, absolute offsets in the file.

    Attributes:
        dtype: of the stored values; torch.uint8 for quantised blocks.
        shape: as torch has it, outermost dim first; of quantised blocks the logical shape.
        quant: name of the GGUF quantisation ("Q4_K"), "" for plain values.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    quant: str = ""

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.stop - self.start

    @property
    def aligned(self) -> bool:
        """Whether it can be viewed in place as its dtype."""
        return self.start % self.dtype.itemsize == 0


@dataclass(frozen=True)
class Split:
    """What a GGUF file says of the model that it is a part of: its number from 0, how many there are, and how many
    tensors all of them have (0 where it does not say)."""

    number: int = 0
    count: int = 1
    tensors: int = 0


@dataclass(frozen=True)
class Header:
    """A header that has been checked: every entry lies in the file, agrees with its shape and overlaps no other.

    Attributes:
        size: of the file, in bytes.
        entries: by name, in file order.
        metadata: safetensors' __metadata__, or GGUF's text fields; {} where there is none.
        format: "safetensors" or "gguf".
        split: of a GGUF file that is a part.
    """

    path: str
    size: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    format: str
    split: Split = Split()


def reshaped(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> Header:
    """The header with other shapes for some of the tensors, of as many values."""
    if not shapes:
        return header
    entries = {
        name: dataclasses.replace(entry, shape=shapes.get(name, entry.shape)) for name, entry in header.entries.items()
    }
    return dataclasses.replace(header, entries=entries)


def prefixed(header: Header, prefix: str) -> Header:
    """The header with a prefix before all names."""
    if not prefix:
        return header
    entries = {prefix + name: dataclasses.replace(entry, name=prefix + name) for name, entry in header.entries.items()}
    return dataclasses.replace(header, entries=entries)


def read_header(path: str, fd: int) -> Header:
    """Read and check the header of a weight file; GGUF is told by its content, safetensors by the file's name.

    Only the header is read, and from the descriptor alone.

    Args:
        path: the file's name, for its extension and for messages.
        fd: the file, open for reading; its position is left alone.

    Raises:
        LoadError: the file cannot be read, is of another format, or is not what its format says.
    """
    # they need Entry, from here
    from . import gguf_header, safetensors_header

    try:
        file = RawFile(path, fd, os.fstat(fd).st_size)
        kind = _format(file)
        entries, metadata, split = (gguf_header if kind == "gguf" else safetensors_header).parse(file)
    except OSError as error:
        raise LoadError(
            f"{os.path.basename(path)} cannot be read", str(error), "Check the file, its permissions and its disk"
        ) from error
    except MemoryError as error:
        raise LoadError(
            f"{os.path.basename(path)} cannot be loaded",
            "its header needs more memory than there is",
            "Free memory, or get the file again from its source: an honest header takes a few megabytes",
        ) from error
    return Header(path, file.size, {entry.name: entry for entry in entries}, metadata, kind, split)


@dataclass(frozen=True, slots=True)
class RawFile:
    """The file behind a descriptor, and the errors that name it."""

    path: str
    fd: int
    size: int

    def read(self, start: int, count: int) -> bytes:
        """Bytes start : start + count, all of them.

        Raises:
            LoadError: the file ends before they do.
            OSError: it cannot be read.
        """
        parts = []
        while count:
            part = os.pread(self.fd, count, start)
            if not part:
                raise self.refuse("it became shorter while it was read")
            parts.append(part)
            start += len(part)
            count -= len(part)
        return b"".join(parts)

    def refuse(self, why: str, remedy: str = "Get the file again from its source: this copy is damaged") -> LoadError:
        """The error for a file that is not loaded."""
        return LoadError(f"{os.path.basename(self.path)} cannot be loaded", why, remedy)

    def check_name(self, name: str, *, limit: int = NAME_CHARS) -> str:
        """The name of a tensor or field, which must be short enough for a message and safe to print in one.

        Raises:
            LoadError: it is empty, longer than `limit` characters, or has some that cannot be printed.
        """
        if not name or len(name) > limit or not name.isprintable():
            raise self.refuse(f"{quoted(name)} is no name: it must be 1 to {limit} printable characters")
        return name


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Sorted by place; those without bytes before the one that starts where they are."""
    return sorted(entries, key=lambda entry: (entry.start, entry.stop))


def quoted(value: object) -> str:
    """A value out of a file for a message: one short line, whatever the value is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    return brief.repr(value)


def _format(file: RawFile) -> str:
    head = file.read(0, min(8, file.size))
    suffix = os.path.splitext(file.path)[1].lower()
    if head.startswith(GGUF_MAGIC):
        return "gguf"
    # a safetensors file may begin like a pickle, with the length of its header; a pickle makes no length that fits
    fits = suffix in SAFETENSORS and int.from_bytes(head, "little") <= file.size - 8
    pickled = PICKLE_MAGIC.match(head) and not fits
    if pickled or suffix in PICKLED:
        raise file.refuse(
            "it is a pickled checkpoint: unpickling one can run code, and it has no header that could be checked",
            "Convert it to safetensors, or choose a safetensors or GGUF file of the model",
        )
    if suffix in SAFETENSORS:
        return "safetensors"
    if suffix == ".gguf":
        raise file.refuse(f"it does not begin with GGUF but with {quoted(head)}")
    raise file.refuse(
        "it is neither GGUF nor, by its name, safetensors",
        f"Choose a GGUF file or one that ends in {' or '.join(SAFETENSORS)}",
    )
