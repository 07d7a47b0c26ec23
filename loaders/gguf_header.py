"""The header of a GGUF file, read with a cursor that cannot leave the file: the gguf package trusts what it reads."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .header import COUNT, NAME_CHARS, RANK, Entry, RawFile, Split, in_file_order, quoted

HEADER_BYTES = 512 << 20
WINDOW_BYTES = 64 << 10
"""What is read first; each further read is twice as large, up to MAX_WINDOW_BYTES."""
MAX_WINDOW_BYTES = 16 << 20
MAX_ITEMS = 1 << 18
"""Tensors or fields of a file: the largest models have some ten thousand."""
MAX_STRINGS = 1 << 24
"""Elements of all arrays of strings together: the largest vocabularies have a million."""
TEXT_BYTES = 100_000_000
"""Of one text field, such as a workflow: as much as a whole safetensors header may have."""

VERSIONS = (2, 3)
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of one size, with struct's codes."""
SIZES = {kind: struct.calcsize(f"<{code}") for kind, code in VALUES.items()}
INTEGERS = tuple("BbHhIiQq")
UINT32, BOOL, TEXT, ARRAY = 4, 7, 8, 9
FIELD_BYTES = 8 + 1 + 4 + 1
"""The smallest field: a name of one character, its type, and a value of one byte."""
TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
"""The smallest description of a tensor: a name of one character, rank, one dim, type and offset."""
MAX_RANK = 4

ALIGNMENT = "general.alignment"
MAX_ALIGNMENT = 1 << 16
SPLIT = {"split.no": 0, "split.count": 1, "split.tensors.count": 0}
"""Fields of a part of a model, with what holds where they are not there."""
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")
"""Of diffusion models' tensors in files that may hold more."""

PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
"""Types whose blocks are single values."""


def parse(file: RawFile) -> tuple[list[Entry], dict[str, str], Split]:
    """The tensors of a GGUF file, in file order, its text fields, and which part of a model it is.

    The format (ggml's docs/gguf.md): magic, version, numbers of tensors
    and fields, the fields, what describes the tensors, and from the next multiple of the alignment on their data.
    A field `comfy.gguf.orig_shape.<tensor>`, which converters for ComfyUI write, is the shape of a tensor that
    GGUF's four dims could not hold, outermost dim first.

    Raises:
        LoadError: something in it is not as the format says.
        OSError: the file cannot be read.
    """
    cursor = _Cursor(file)
    cursor.skip(4)
    _check_version(file, cursor.integer(4))
    tensors, count = cursor.integer(8), cursor.integer(8)
    if max(tensors, count) > MAX_ITEMS or tensors * TENSOR_BYTES + count * FIELD_BYTES > cursor.left:
        raise file.refuse(f"{tensors} tensors and {count} fields do not fit into {file.size} bytes, or into any model")
    fields = _fields(file, cursor, count)
    infos = [_info(file, cursor) for _ in range(tensors)]
    start = -(-cursor.position // fields.alignment) * fields.alignment
    types = _types(file)
    entries = in_file_order(_entry(info, file=file, fields=fields, types=types, data=start) for info in infos)
    _check_places(file, entries)
    return entries, fields.text, Split(*(fields.split.get(key, default) for key, default in SPLIT.items()))


class _Cursor:
    """A place in the header, which moves forward only; each byte is read once at most."""

    def __init__(self, file: RawFile) -> None:
        self._file = file
        self._limit = min(file.size, HEADER_BYTES)
        self._window = b""
        self._base = 0
        self._step = WINDOW_BYTES
        self._texts = 0
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes from here to where the header must have ended."""
        return self._limit - self.position

    def skip(self, count: int) -> None:
        """Go on by some bytes, without reading them."""
        if count > self.left:
            end = "is longer than any header" if self._limit < self._file.size else "is cut off, or counts too much"
            raise self._file.refuse(
                f"its header {end}: {count} bytes from {self.position} on, and {self.left} are left"
            )
        self.position += count

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start = self.position
        self.skip(count)
        self._load(start, count)
        return self._window[start - self._base : start - self._base + count]

    def integer(self, size: int) -> int:
        """An unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def text(self, limit: int) -> str:
        """A string of at most `limit` bytes."""
        length = self.integer(8)
        if length > limit:
            raise self._file.refuse(f"a string at {self.position} has {length} bytes, more than {limit}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self._file.refuse(f"a string before byte {self.position} is not UTF-8: {error.reason}") from None

    def skip_texts(self, count: int) -> None:
        """Go past an array of strings, at the speed of its lengths: there may be millions."""
        self._texts += count
        if self._texts > MAX_STRINGS or 8 * count > self.left:
            raise self._file.refuse(f"an array at {self.position} has {count} strings, more than there can be")
        unpack = struct.Struct("<Q").unpack_from
        while count:
            self._load(self.position, min(8, self.left))
            window, last = self._window, len(self._window) - 8
            begin = at = self.position - self._base
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            # nothing could be counted where fewer than 8 bytes are left
            self.skip(at - begin or 8)

    def _load(self, start: int, count: int) -> None:
        if start + count <= self._base + len(self._window):
            return
        have = self._window[start - self._base :]
        after = start + len(have)
        more = max(count - len(have), min(self._step, self._limit - after))
        self._window = have + self._file.read(after, more)
        self._base = start
        self._step = min(2 * self._step, MAX_WINDOW_BYTES)


def _check_version(file: RawFile, version: int) -> None:
    if version in VERSIONS:
        return
    remedy = "Convert the model again with a current converter"
    if version & 0xFFFF == 0 and version:
        raise file.refuse("it is a GGUF file of a big-endian machine", remedy)
    raise file.refuse(f"it is GGUF of version {version}, and {VERSIONS[0]} and {VERSIONS[1]} are known", remedy)


@dataclass
class _Fields:
    """What is used of the fields: the text ones, the alignment of the data in bytes, shapes by tensor, and those of
    `SPLIT`."""

    text: dict[str, str] = field(default_factory=dict)
    alignment: int = 32
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    split: dict[str, int] = field(default_factory=dict)

    def noted(self, name: str, count: int) -> tuple[int, ...] | None:
        """The shape of a tensor of `count` values that is noted under the name without its prefix, or with one."""
        for prefix in PREFIXES:
            for other in (name.removeprefix(prefix), prefix + name):
                shape = self.shapes.get(other)
                if shape is not None and math.prod(shape) == count:
                    return shape
        return None


def _fields(file: RawFile, cursor: _Cursor, count: int) -> _Fields:
    fields = _Fields()
    seen: set[str] = set()
    limit = NAME_CHARS + len(ORIGINAL_SHAPE)
    for _ in range(count):
        key = file.check_name(cursor.text(4 * limit), limit=limit)
        if key in seen:
            raise file.refuse(f"field {quoted(key)} is there twice")
        seen.add(key)
        kind = cursor.integer(4)
        if key == ALIGNMENT:
            fields.alignment = _alignment(file, cursor, kind)
        elif key.startswith(ORIGINAL_SHAPE):
            fields.shapes[key.removeprefix(ORIGINAL_SHAPE)] = _original_shape(file, cursor, key, kind)
        elif key in SPLIT:
            fields.split[key] = _count(file, cursor, key, kind)
        elif kind == TEXT:
            fields.text[key] = cursor.text(TEXT_BYTES)
        else:
            _skip_value(file, cursor, key, kind)
    return fields


def _alignment(file: RawFile, cursor: _Cursor, kind: int) -> int:
    value = cursor.integer(4) if kind == UINT32 else 0
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise file.refuse(f"{ALIGNMENT} is no uint32 that is a power of two up to {MAX_ALIGNMENT}")
    return value


def _count(file: RawFile, cursor: _Cursor, key: str, kind: int) -> int:
    code = VALUES.get(kind)
    value: int = struct.unpack(f"<{code}", cursor.take(SIZES[kind]))[0] if code in INTEGERS else -1
    if not 0 <= value <= MAX_ITEMS:
        raise file.refuse(f"field {quoted(key)} is no integer from 0 to {MAX_ITEMS}")
    return value


def _original_shape(file: RawFile, cursor: _Cursor, key: str, kind: int) -> tuple[int, ...]:
    element, length = (cursor.integer(4), cursor.integer(8)) if kind == ARRAY else (kind, 0)
    code = VALUES.get(element)
    if code not in INTEGERS or not 0 < length <= RANK:
        raise file.refuse(f"field {quoted(key)} is no array of 1 to {RANK} integers")
    shape = struct.unpack(f"<{length}{code}", cursor.take(length * SIZES[element]))
    if min(shape) < 1:
        raise file.refuse(f"field {quoted(key)} is {quoted(shape)}, and a size is at least 1")
    return shape


def _skip_value(file: RawFile, cursor: _Cursor, key: str, kind: int) -> None:
    if kind == BOOL:
        if cursor.integer(1) > 1:
            raise file.refuse(f"field {quoted(key)} is a bool that is neither 0 nor 1")
    elif kind in SIZES:
        cursor.skip(SIZES[kind])
    elif kind != ARRAY:
        raise file.refuse(f"field {quoted(key)} has the unknown type {kind}")
    else:
        element, length = cursor.integer(4), cursor.integer(8)
        if element in SIZES:
            cursor.skip(length * SIZES[element])
        elif element != TEXT:
            raise file.refuse(f"field {quoted(key)} is an array of arrays, or of the unknown type {element}")
        else:
            cursor.skip_texts(length)


@dataclass(frozen=True, slots=True)
class _Info:
    """A tensor as the header describes it: `dims` innermost first, `offset` from the start of the data."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


def _info(file: RawFile, cursor: _Cursor) -> _Info:
    name = file.check_name(cursor.text(4 * NAME_CHARS))
    rank = cursor.integer(4)
    if not 1 <= rank <= MAX_RANK:
        raise file.refuse(f"tensor {name!r} has {rank} dims, not 1 to {MAX_RANK}")
    dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
    return _Info(name, dims, cursor.integer(4), cursor.integer(8))


def _types(file: RawFile) -> dict[int, tuple[str, int, int]]:
    """Name, values and bytes of a block by type number.

    Raises:
        LoadError: the gguf package is not there.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise file.refuse(
            f"the package gguf cannot be imported: {error}",
            "Install it where ComfyUI's Python is (pip install gguf)",
        ) from error
    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _entry(
    info: _Info, *, file: RawFile, fields: _Fields, types: Mapping[int, tuple[str, int, int]], data: int
) -> Entry:
    """A tensor with its place in the file; `data` is where its data section starts."""
    if info.kind not in types:
        raise file.refuse(
            f"tensor {info.name!r} has the unknown type {info.kind}", "Update the package gguf, or choose another file"
        )
    quant, values, size = types[info.kind]
    count = math.prod(info.dims)
    if not 1 <= count < COUNT or info.dims[0] % values:
        raise file.refuse(f"tensor {info.name!r} of {quant} has the dims {info.dims}, which cannot be")
    if info.offset % fields.alignment:
        raise file.refuse(f"tensor {info.name!r} is at {info.offset}, no multiple of {fields.alignment}")
    shape = fields.shapes.get(info.name) or fields.noted(info.name, count) or info.dims[::-1]
    if math.prod(shape) != count:
        raise file.refuse(f"tensor {info.name!r} has {count} values, and its original shape {shape} does not")
    start = data + info.offset
    dtype = PLAIN.get(quant)
    return Entry(
        name=info.name,
        dtype=torch.uint8 if dtype is None else dtype,
        shape=shape,
        start=start,
        stop=start + count // values * size,
        quant=quant if dtype is None else "",
    )


def _check_places(file: RawFile, entries: list[Entry]) -> None:
    """No tensor may share bytes with another, or its name, or end after the file; padding between them is usual."""
    end = 0
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise file.refuse(f"tensor {entry.name!r} is there twice")
        names.add(entry.name)
        if entry.start < end:
            raise file.refuse(f"tensor {entry.name!r} starts at byte {entry.start}, inside the one that ends at {end}")
        end = entry.stop
        if end > file.size:
            raise file.refuse(
                f"tensor {entry.name!r} ends at byte {end} of a file of {file.size}",
                "The download is not complete: get the file again from its source",
            )
