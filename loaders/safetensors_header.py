"""The header of a safetensors file, stricter than the format's own reader: what this accepts, that one accepts."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import torch

from .header import COUNT, RANK, Entry, RawFile, Split, in_file_order, quoted

HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_VALUES = 1 << 22
"""Half a million tensors: each has eight brackets, braces and commas. A list takes twenty times its text's memory."""
MAX_STRINGS = 1 << 20
"""Two hundred thousand tensors: each has five texts. Short texts take thirty times the memory of what they say."""
TEXT_BYTES = 1 << 27
"""What the whole header may take as a str, twice, with what comes of it; beyond Latin-1, four bytes are a character."""
EXTRA_LEVELS = 8
"""How deep a field that is not ours may be nested; the format's own reader stops at 128 for the whole header."""

NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, ours) for name, ours in NAMES.items() if hasattr(torch, ours)}
"""The format's names of what this torch has."""


def parse(file: RawFile) -> tuple[list[Entry], dict[str, str], Split]:
    """The tensors of a safetensors file, in file order, and its metadata; a part does not say that it is one.

    The format (safetensors' README, "Format"): the header's length as a little-endian uint64, that
    many bytes of JSON, and the tensors' bytes without gaps.

    Raises:
        LoadError: something in it is not as the format says.
        OSError: the file cannot be read.
    """
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= length <= min(HEADER_BYTES, file.size - 8):
        raise file.refuse(
            f"a header of {length} bytes does not fit into a file of {file.size}, or into the format's "
            f"{HEADER_BYTES}: it is not safetensors, or its end is missing"
        )
    fields = _json(file, file.read(8, length))
    metadata = _metadata(file, fields.pop("__metadata__", {}))
    entries = in_file_order(_entry(file, name, value, 8 + length) for name, value in fields.items())
    _check_cover(file, entries, 8 + length)
    return entries, metadata, Split()


def _json(file: RawFile, raw: bytes) -> dict[str, Any]:
    if sum(raw.count(mark) for mark in (b"[", b"{", b",")) > MAX_VALUES:
        raise file.refuse("its header has more values than any model has")
    unescaped = raw.replace(b"\\\\", b"") if b"\\" in raw else raw
    if unescaped.count(b'"') - unescaped.count(b'\\"') > 2 * MAX_STRINGS:
        raise file.refuse(f"its header has more than {MAX_STRINGS} texts, which no model has")
    del unescaped
    wide = not raw.isascii() or b"\\u" in raw
    if len(raw) * (4 if wide else 1) > TEXT_BYTES:
        raise file.refuse(f"its header of {len(raw) >> 20} MiB would take several times as much memory")
    try:
        text = raw.decode()
        del raw
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_integer,
            parse_constant=_integer,
        )
    except ValueError as error:
        raise file.refuse(f"its header is not the JSON it should be: {error}") from None
    except RecursionError:
        raise file.refuse("its header is JSON that is nested too deeply") from None
    if type(value) is not dict:
        raise file.refuse(f"its header is {quoted(value)}, not an object of tensors")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{quoted(twice)} is there twice")
    for key in found:
        if not _is_text(key):
            raise ValueError(f"{quoted(key)} is not Unicode text")
    return found


def _integer(text: str) -> int:
    # 19 digits hold every number below 2^63, and converting many more takes quadratic time
    if len(text) <= 19 and text.isdigit() and int(text) < COUNT:
        return int(text)
    raise ValueError(f"{quoted(text)} is not an integer from 0 to 2^63 - 1")


def _is_text(value: object) -> bool:
    """Whether a value is a string that UTF-8 can write: JSON's escapes can also make halves of a character."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _metadata(file: RawFile, value: object) -> dict[str, str]:
    if type(value) is not dict:
        raise file.refuse(f"its __metadata__ is {quoted(value)}, not an object")
    for key, text in value.items():
        if not _is_text(text):
            raise file.refuse(f"its metadata {quoted(key)} is {quoted(text)}, not text")
    return value


def _entry(file: RawFile, name: str, value: object, data: int) -> Entry:
    """A tensor from its part of the JSON; `data` is where in the file the offsets count from."""
    file.check_name(name)
    if type(value) is not dict:
        raise file.refuse(f"tensor {name!r} is described by {quoted(value)}, not by an object")
    extra = value.keys() - {"dtype", "shape", "data_offsets"}
    if not all(_is_harmless(value[key], EXTRA_LEVELS) for key in extra):
        raise file.refuse(f"tensor {name!r} has a further field that is nested too deeply or not Unicode text")
    dtype, shape = _tensor(file, name, value.get("dtype"), value.get("shape"))
    offsets: Any = value.get("data_offsets")
    if not _is_integers(offsets) or len(offsets) != 2:
        raise file.refuse(f"tensor {name!r} lies at {quoted(offsets)}, not from one offset to another")
    start, stop = offsets
    size = math.prod(shape) * dtype.itemsize
    if stop - start != size:
        raise file.refuse(f"tensor {name!r} lies at {start}:{stop}, and {dtype} of {shape} takes {size} bytes")
    return Entry(name, dtype, shape, data + start, data + stop)


def _tensor(file: RawFile, name: str, kind: object, shape: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """A tensor's dtype and shape as torch has them."""
    dtype = DTYPES.get(kind) if type(kind) is str else None
    if dtype is None:
        raise file.refuse(
            f"tensor {name!r} is of dtype {quoted(kind)}, which torch {torch.__version__} does not have",
            "Update torch, or choose a file in another dtype",
        )
    if not _is_integers(shape) or len(shape) > RANK:
        raise file.refuse(f"tensor {name!r} has the shape {quoted(shape)}, not a list of up to {RANK} sizes")
    # a size of 0 hides the others from the product, not from torch, which makes strides of them
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= COUNT:
        raise file.refuse(f"tensor {name!r} has the shape {quoted(shape)}, more than there can be")
    if kind != "F4":
        return dtype, tuple(shape)
    # torch has two values to the byte in the last dim
    if not shape or shape[-1] % 2:
        raise file.refuse(f"tensor {name!r} of F4 has the shape {quoted(shape)}, whose last size is not even")
    return dtype, (*shape[:-1], shape[-1] // 2)


def _is_integers(value: object) -> bool:
    return type(value) is list and all(type(item) is int for item in value)


def _is_harmless(value: object, levels: int) -> bool:
    if type(value) is str:
        return _is_text(value)
    if type(value) is dict:
        value = list(value.values())
    return type(value) is not list or (levels > 0 and all(_is_harmless(item, levels - 1) for item in value))


def _check_cover(file: RawFile, entries: list[Entry], data: int) -> None:
    """The tensors must cover the data from its first to its last byte, each byte once."""
    end = data
    for entry in entries:
        if entry.start != end:
            raise file.refuse(
                f"tensor {entry.name!r} starts at {entry.start - data}, and the one before it ends at {end - data}"
            )
        end = entry.stop
    if end != file.size:
        raise file.refuse(f"its tensors end at byte {end} of the file, which has {file.size}")
