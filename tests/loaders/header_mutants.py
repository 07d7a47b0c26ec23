"""Weight files changed at random, by a given generator: as bytes, and as what the bytes mean."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from . import header_cases_gguf, header_cases_safetensors
from .header_files import (
    BOOL,
    F16,
    F32,
    Q4_0,
    Q4_K,
    TEXT,
    UINT32,
    Part,
    array,
    field,
    gguf,
    info,
    integers,
    parts,
    safetensors,
    tensor,
    text,
)

LONGEST = 1 << 14
"""Bytes of a seed: longer hand-made files have tests of their own."""
POWERS = (8, 15, 16, 31, 32, 33, 40, 62, 63, 64)
NUMBERS = (*range(20), 27, 30, 64, 256, 1024, *((1 << power) + more for power in POWERS for more in (-8, -1, 0, 1)))

Pair = tuple[str, Any]
Marks = Sequence[tuple[int, int]]
Item = list[Part]


def safetensors_mutants(rng: Random) -> Iterator[bytes]:
    """The hand-made files, and then changed ones without end."""
    cases = header_cases_safetensors
    seeds = [*cases.ACCEPTED.values(), *(blob for blob, _ in cases.REFUSED.values() if len(blob) <= LONGEST)]
    yield from seeds
    while True:
        pairs = _pairs()
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            rng.choice(PAIR_CHANGES)(rng, pairs)
        raw = _dump(rng, pairs)
        data = bytes(DATA_BYTES)
        how = rng.random()
        if how < 0.7:
            yield safetensors(raw, data)
        elif how < 0.85:
            # the length agrees, the JSON may not be any
            yield safetensors(change_bytes(rng, raw, (), seeds), data)
        else:
            yield change_bytes(rng, rng.choice((safetensors(raw, data), rng.choice(seeds))), ((0, 8),), seeds)


def gguf_mutants(rng: Random) -> Iterator[bytes]:
    """The hand-made files, and then changed ones without end."""
    cases = header_cases_gguf
    seeds = [*cases.ACCEPTED.values(), *(blob for blob, _ in cases.REFUSED.values() if len(blob) <= LONGEST)]
    yield from seeds
    while True:
        fields, infos, alignment = _tree(rng)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            rng.choice(ITEM_CHANGES)(rng, rng.choice((fields, infos, infos)))
        header = parts(fields, infos, version=rng.choice((2, 3)))
        blob = gguf(header, bytes(1024), alignment=alignment)
        how = rng.random()
        if how < 0.6:
            yield blob
        elif how < 0.9:
            yield change_bytes(rng, blob, integers(header), seeds)
        else:
            yield change_bytes(rng, rng.choice(seeds), (), seeds)


def change_bytes(rng: Random, blob: bytes, marks: Marks, others: Sequence[bytes]) -> bytes:
    """One to four changes that know nothing of the format but where its integers are (`marks`: offset, size)."""
    changed = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(BYTE_CHANGES)(rng, changed, marks, others)
    return bytes(changed)


def _flip(rng: Random, blob: bytearray, marks: Marks, others: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8)) if blob else 0):
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)


def _boundary(rng: Random, blob: bytearray, marks: Marks, others: Sequence[bytes]) -> None:
    at, size = rng.choice(marks) if marks else (rng.randrange(len(blob) + 1), rng.choice((1, 2, 4, 8)))
    blob[at : at + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")


def _splice(rng: Random, blob: bytearray, marks: Marks, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    start, at = rng.randrange(len(other) + 1), rng.randrange(len(blob) + 1)
    taken = other[start : start + rng.randrange(1, 65)]
    blob[at : at + rng.choice((0, len(taken), len(blob)))] = taken


def _truncate(rng: Random, blob: bytearray, marks: Marks, others: Sequence[bytes]) -> None:
    del blob[rng.randrange(len(blob) + 1) :]


def _duplicate(rng: Random, blob: bytearray, marks: Marks, others: Sequence[bytes]) -> None:
    start, at = rng.randrange(len(blob) + 1), rng.randrange(len(blob) + 1)
    blob[at:at] = blob[start : start + rng.randrange(1, 65)] * rng.choice((1, 1, 3))


def _insert(rng: Random, blob: bytearray, marks: Marks, others: Sequence[bytes]) -> None:
    at = rng.randrange(len(blob) + 1)
    blob[at:at] = rng.randbytes(rng.randrange(1, 17))


def _delete(rng: Random, blob: bytearray, marks: Marks, others: Sequence[bytes]) -> None:
    at = rng.randrange(len(blob) + 1)
    del blob[at : at + rng.randrange(1, 33)]


BYTE_CHANGES = (_flip, _flip, _boundary, _boundary, _splice, _truncate, _duplicate, _insert, _delete)


DATA_BYTES = 79
NAMES = (
    "a",
    "a.b",
    "",
    "\0",
    "\ud800",
    "\u00e9",
    "x" * 1024,
    "x" * 1025,
    "__metadata__",
    "dtype",
    "\u202e",
    "a b",
    "b",
)
WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    float("nan"),
    "x",
    "\udfff",
    [],
    {},
    [[[[]]]],
    {"k": [1, {"k": 2}]},
    ["F32", [4], [0, 16]],
)
DTYPES = ("F32", "I32", "U8", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "BF16", "BOOL", "F64", "C64", "U16", "f32", "")
PARTS = ("dtype", "shape", "data_offsets")


def _pairs() -> list[Pair]:
    """An honest safetensors header over DATA_BYTES bytes."""
    return [
        ("__metadata__", {"format": "pt", "workflow": '{"nodes": [1, "\u00e9\\n"]}'}),
        ("a.weight", tensor("F32", (2, 3), (0, 24))),
        ("a.bias", tensor("F16", (2,), (24, 28))),
        ("empty", tensor("BF16", (0, 3), (28, 28))),
        ("b.weight", tensor("F8_E4M3", (3, 1), (28, 31))),
        ("b.scale", tensor("F32", (), (31, 35))),
        ("c.weight", tensor("I64", (1, 1, 1, 4), (35, 67))),
        ("c.packed", tensor("F4", (3, 4), (67, 73))),
        ("c.flags", tensor("BOOL", (6,), (73, 79))),
    ]


def _dump(rng: Random, pairs: Sequence[Pair]) -> bytes:
    ascii_only = rng.random() < 0.7
    items = (f"{json.dumps(key)}:{json.dumps(value, ensure_ascii=ascii_only)}" for key, value in pairs)
    raw = ("{" + ",".join(items) + "}").encode("utf-8", "surrogatepass")
    return rng.choice((b"", b"", b" ")) + raw + b" " * rng.choice((0, 0, 3))


def _any(rng: Random, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What some tensor is described by, where any is left."""
    found = [value for key, value in pairs if key != "__metadata__" and type(value) is dict]
    return rng.choice(found) if found else {}


def _set_number(rng: Random, pairs: list[Pair]) -> None:
    numbers = _any(rng, pairs).get(rng.choice(PARTS[1:]))
    if type(numbers) is list and numbers:
        at = rng.randrange(len(numbers))
        near = type(numbers[at]) is int and rng.random() < 0.5
        numbers[at] = numbers[at] + rng.choice((-4, -1, 1, 4)) if near else rng.choice((*NUMBERS, *WRONG[:5]))


def _resize(rng: Random, pairs: list[Pair]) -> None:
    value = _any(rng, pairs)
    shape = value.get("shape")
    if type(shape) is list:
        change: Callable[[], object] = rng.choice(
            (
                shape.reverse,
                shape.clear,
                lambda: shape.append(1),
                lambda: shape.insert(0, 1),
                lambda: shape.extend(shape),
            )
        )
        change()


def _set_dtype(rng: Random, pairs: list[Pair]) -> None:
    _any(rng, pairs)["dtype"] = rng.choice(DTYPES)


def _swap_parts(rng: Random, pairs: list[Pair]) -> None:
    one, other = _any(rng, pairs), _any(rng, pairs)
    part = rng.choice(PARTS)
    if part in one and part in other:
        one[part], other[part] = other[part], one[part]


def _set_part(rng: Random, pairs: list[Pair]) -> None:
    _any(rng, pairs)[rng.choice((*PARTS, "further", "further", ""))] = copy.deepcopy(rng.choice(WRONG))


def _drop_part(rng: Random, pairs: list[Pair]) -> None:
    _any(rng, pairs).pop(rng.choice(PARTS), None)


def _rename(rng: Random, pairs: list[Pair]) -> None:
    at = rng.randrange(len(pairs))
    name = rng.choice((*NAMES, f"layer.{rng.randrange(10**6)}"))
    pairs[at] = (name, pairs[at][1])


def _repeat(rng: Random, pairs: list[Pair]) -> None:
    name, value = copy.deepcopy(rng.choice(pairs))
    pairs.insert(rng.randrange(len(pairs) + 1), (rng.choice((name, name + "2")), value))


def _drop(rng: Random, pairs: list[Pair]) -> None:
    if len(pairs) > 1:
        del pairs[rng.randrange(len(pairs))]


def _add_empty(rng: Random, pairs: list[Pair]) -> None:
    at = rng.choice((0, 24, 28, 31, 79, 79, rng.randrange(80)))
    value = tensor(rng.choice(DTYPES), rng.choice(((0,), (2, 0), (0, 1 << 40), (0, 1 << 62))), (at, at))
    pairs.append((f"empty.{rng.randrange(1000)}", value))


def _set_metadata(rng: Random, pairs: list[Pair]) -> None:
    value = rng.choice(WRONG) if rng.random() < 0.3 else "".join(rng.choices('\\"{}[],:\0\n\u00e9\U0001f600ab', k=9))
    key = rng.choice(("x", "", "\u00e9", "\udc00"))
    pairs.append(("__metadata__", {key: value}))
    if rng.random() < 0.8:
        pairs[:] = [pairs[-1], *(pair for pair in pairs if pair[0] != "__metadata__")]


PAIR_CHANGES: tuple[Callable[[Random, list[Pair]], None], ...] = (
    *(_set_number, _set_number, _resize, _resize, _set_dtype, _swap_parts, _set_part, _drop_part),
    *(_rename, _rename, _repeat, _drop, _add_empty, _add_empty, _set_metadata, _set_metadata),
    lambda rng, pairs: rng.shuffle(pairs),
)


def _tree(rng: Random) -> tuple[list[Item], list[Item], int]:
    """Fields, tensors and alignment of an honest GGUF file with up to a kilobyte of data."""
    alignment = rng.choice((32, 64))
    words = [part for word in (b"a", b"", b"\xff\xfe", b"longer") for part in text(word)]
    fields = [
        field(b"general.architecture", TEXT, *text(b"wan")),
        field(b"config", TEXT, *text(b'{"transformer": {}}')),
        field(b"general.file_type", UINT32, (7, 4)),
        field(b"general.scale", 12, b"\0\0\0\0\0\0\xf0?"),
        field(b"general.flag", BOOL, (1, 1)),
        array(b"general.sizes", 3, [(1, 2), (2, 2), (3, 2)]),
        array(b"general.words", TEXT, words),
        array(b"comfy.gguf.orig_shape.a", 5, [(2, 4), (1, 4), (2, 4), (2, 4), (2, 4)]),
    ]
    if alignment != 32 or rng.random() < 0.5:
        fields.append(field(b"general.alignment", UINT32, (alignment, 4)))
    infos = [
        info(b"a", (4, 4), F32, 0),
        info(b"a.bias", (5,), F16, 64),
        info(b"b.weight", (32, 2), Q4_0, 128),
        info(b"c.weight", (256, 1, 2), Q4_K, 192),
        info(b"d", (1, 1, 1, 3), 24, 512),
    ]
    return fields, infos, alignment


def _change_integer(rng: Random, items: list[Item]) -> None:
    item = rng.choice(items)
    where = [at for at, part in enumerate(item) if not isinstance(part, bytes)]
    if where:
        at = rng.choice(where)
        value, size = item[at]
        assert isinstance(value, int)
        near = rng.choice((-32, -1, 1, 32, 64))
        item[at] = (value + near if rng.random() < 0.3 else rng.choice(NUMBERS), size)


def _change_name(rng: Random, items: list[Item]) -> None:
    name = rng.choice(NAMES) if rng.random() < 0.3 else f"layer.{rng.randrange(10**6)}"
    items[rng.randrange(len(items))][:2] = text(name.encode("utf-8", "surrogatepass"))


def _change_last(rng: Random, items: list[Item]) -> None:
    """Of a tensor its offset, of a field its value."""
    item = rng.choice(items)
    if not isinstance(item[-1], bytes):
        item[-1] = (rng.choice((0, 32, 64, 640, 768, 896, 960, 1024)), item[-1][1])


def _change_dims(rng: Random, items: list[Item]) -> None:
    item = rng.choice(items)
    if len(item) > 5 and not isinstance(item[3], bytes):
        item[3] = (rng.choice((1, 2, 3, 4, 8, 16, 32, 64, 256)), 8)


def _repeat_item(rng: Random, items: list[Item]) -> None:
    items.insert(rng.randrange(len(items) + 1), list(rng.choice(items)))


def _drop_item(rng: Random, items: list[Item]) -> None:
    if len(items) > 1:
        del items[rng.randrange(len(items))]


ITEM_CHANGES: tuple[Callable[[Random, list[Item]], None], ...] = (
    *(_change_integer, _change_name, _change_name, _change_last, _change_dims, _repeat_item, _drop_item),
    lambda rng, items: rng.shuffle(items),
)
