"""Safetensors files that must be refused, each with a part of the reason, and some that must not."""

from __future__ import annotations

import json

from .header_files import safetensors, tensor

DATA = bytes(16)
ONE = json.dumps(tensor()).encode()
NESTED = 200_000


def _named(name: object) -> bytes:
    return safetensors(b"{%s:%s}" % (json.dumps(name).encode(), ONE), DATA)


def _extra(value: bytes) -> bytes:
    return safetensors(b'{"a":%s,"x":%s}}' % (ONE[:-1], value), DATA)


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "header of 0 bytes"),
    "seven bytes": (bytes(7), "header of 0 bytes"),
    "length 0": (bytes(8), "header of 0 bytes"),
    "length 1": (safetensors(b"1"), "header of 1 bytes"),
    "length 2^63": (safetensors({}, length=1 << 63), "does not fit"),
    "length over the limit": (safetensors({}, length=100_000_001), "does not fit"),
    "length past the end": (safetensors({"a": tensor()}, DATA, length=4000), "does not fit"),
    "length one more than there is": (safetensors(b"{}", length=3), "does not fit"),
    "length one less than there is": (safetensors(b"{} ", length=1), "header of 1 bytes"),
    "no JSON": (safetensors(b"hello there"), "not the JSON"),
    "no UTF-8": (safetensors(b'{"\xff\xfe":1}'), "not the JSON"),
    "UTF-16": (safetensors("{}".encode("utf-16")), "not the JSON"),
    "byte order mark": (safetensors(b"\xef\xbb\xbf{}"), "not the JSON"),
    "padded with NUL": (safetensors(b"{}\0"), "not the JSON"),
    "two objects": (safetensors(b"{}{}"), "not the JSON"),
    "a list": (safetensors([1, 2]), "not an object"),
    "a string": (safetensors("ab"), "not an object"),
    "null": (safetensors(None), "not an object"),
    "deep lists": (safetensors(b'{"a":' + b"[" * NESTED + b"]" * NESTED + b"}"), "too deeply"),
    "deep objects": (safetensors(b'{"__metadata__":' + b'{"a":' * NESTED + b"1" + b"}" * (NESTED + 1)), "too deeply"),
    "deep and open": (safetensors(b'{"a":' + b"[" * NESTED), "too deeply"),
    "lists without end": (_extra(b"[" + b"[]," * (1 << 22) + b"0]"), "more values"),
    "texts without end": (
        safetensors(b'{"__metadata__":{%s"x":"y"}}' % (b'"a":"b\\\\",' * (1 << 20))),
        "1048576 texts",
    ),
    "a text that is wide in memory": (
        safetensors(b'{"__metadata__":{"a":"\\u4e2d%s"}}' % (b"x" * (1 << 25))),
        "memory",
    ),
    "control character in a string": (safetensors(b'{"__metadata__":{"a":"\x01"}}'), "not the JSON"),
    "NaN": (_extra(b"NaN"), "'NaN' is not an integer"),
    "Infinity": (safetensors(b'{"a":-Infinity}'), "not an integer"),
    "a million digits": (_extra(b"9" * 1_000_000), "not an integer"),
    "float out of range": (_extra(b"1e999"), "not an integer"),
    "a tensor that is a list": (safetensors(b'{"a":["U8",[4],[0,4]]}', bytes(4)), "not by an object"),
    "a tensor that is null": (safetensors({"a": None}), "not by an object"),
    "hole before the first": (safetensors({"a": tensor(offsets=(16, 32))}, bytes(32)), "starts at 16"),
    "hole between": (
        safetensors({"a": tensor(), "b": tensor(offsets=(20, 36))}, bytes(36)),
        "starts at 20, and the one before it ends at 16",
    ),
    "hole after the last": (safetensors({"a": tensor()}, bytes(17)), "tensors end at"),
    "bytes without tensors": (safetensors({}, bytes(1)), "tensors end at"),
    "overlap": (safetensors({"a": tensor(), "b": tensor(offsets=(8, 24))}, bytes(24)), "starts at 8"),
    "the same bytes twice": (safetensors({"a": tensor(), "b": tensor()}, DATA), "starts at 0"),
    "one inside another": (
        safetensors({"a": tensor(), "b": tensor("U8", (4,), (4, 8))}, DATA),
        "starts at 4",
    ),
    "empty tensor inside another": (
        safetensors({"a": tensor(), "b": tensor("U8", (0,), (4, 4))}, DATA),
        "starts at 4",
    ),
    "empty tensor outside": (safetensors({"a": tensor("U8", (0,), (1, 1))}), "starts at 1"),
    "end before start": (safetensors({"a": tensor(offsets=(16, 0))}, DATA), "lies at 16:0"),
    "negative offset": (safetensors({"a": tensor(offsets=(-16, 0))}, DATA), "'-16' is not an integer"),
    "minus zero": (safetensors(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}', bytes(4)), "'-0' is not"),
    "float offset": (safetensors({"a": tensor(offsets=(0.0, 16))}, DATA), "'0.0' is not an integer"),
    "bool offset": (safetensors({"a": tensor("U8", (1,), (False, True))}, bytes(1)), "not from one offset"),
    "text offset": (safetensors({"a": tensor(offsets=("0", 16))}, DATA), "not from one offset"),
    "offset 2^63": (safetensors({"a": tensor(offsets=(0, 1 << 63))}, DATA), "not an integer"),
    "offset 2^63 - 1": (safetensors({"a": tensor(offsets=(0, (1 << 63) - 1))}, DATA), "takes 16 bytes"),
    "three offsets": (safetensors({"a": tensor(offsets=(0, 8, 16))}, DATA), "not from one offset"),
    "no offsets": (safetensors({"a": {"dtype": "F32", "shape": [4]}}, DATA), "lies at None"),
    "negative dim": (safetensors({"a": tensor(shape=(-4,))}, DATA), "'-4' is not an integer"),
    "two negative dims": (safetensors({"a": tensor(shape=(-2, -2))}, DATA), "'-2' is not an integer"),
    "float dim": (safetensors({"a": tensor(shape=(4.0,))}, DATA), "'4.0' is not an integer"),
    "bool dim": (safetensors({"a": tensor("U8", (True,), (0, 1))}, bytes(1)), "not a list of up to 8 sizes"),
    "null dim": (safetensors({"a": tensor(shape=(None,))}, DATA), "not a list of up to 8 sizes"),
    "shape is a number": (safetensors({"a": {**tensor(), "shape": 4}}, DATA), "not a list of up to 8 sizes"),
    "no shape": (safetensors({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, DATA), "shape None"),
    "nine dims": (safetensors({"a": tensor(shape=(1,) * 8 + (4,))}, DATA), "not a list of up to 8 sizes"),
    "shape does not match": (safetensors({"a": tensor(shape=(5,))}, DATA), "takes 20 bytes"),
    "product is 2^64": (safetensors({"a": tensor(shape=(1 << 32, 1 << 32), offsets=(0, 0))}), "more than"),
    "bytes are 2^64": (safetensors({"a": tensor(shape=(1 << 62,), offsets=(0, 0))}), "more than"),
    "zero hides an overflow": (safetensors({"a": tensor(shape=(1 << 40, 1 << 40, 0), offsets=(0, 0))}), "more than"),
    "zero before an overflow": (safetensors({"a": tensor(shape=(0, 1 << 62, 8), offsets=(0, 0))}), "more than"),
    "dim 2^64": (safetensors({"a": tensor(shape=(1 << 64,), offsets=(0, 0))}), "not an integer"),
    "truncated data": (safetensors({"a": tensor()}, bytes(15)), "tensors end at"),
    "unknown dtype": (safetensors({"a": tensor("F7")}, DATA), "dtype 'F7'"),
    "packed dtype torch has not": (safetensors({"a": tensor("F6_E2M3", (4,), (0, 3))}, bytes(3)), "dtype 'F6_E2M3'"),
    "dtype is a list": (safetensors({"a": {**tensor(), "dtype": ["F32"]}}, DATA), "dtype ['F32']"),
    "no dtype": (safetensors({"a": {"shape": [4], "data_offsets": [0, 16]}}, DATA), "dtype None"),
    "odd F4": (safetensors({"a": tensor("F4", (3,), (0, 2))}, bytes(2)), "not even"),
    "F4 without dims": (safetensors({"a": tensor("F4", (), (0, 0))}), "not even"),
    "F4 odd in the last dim": (safetensors({"a": tensor("F4", (2, 1), (0, 1))}, bytes(1)), "not even"),
    "duplicate tensor": (safetensors(b'{"a":%s,"a":%s}' % (ONE, ONE), DATA), "'a' is there twice"),
    "duplicate by escape": (safetensors(b'{"a":%s,"\\u0061":%s}' % (ONE, ONE), DATA), "'a' is there twice"),
    "duplicate dtype": (
        safetensors(b'{"a":{"dtype":"F32","dtype":"I32","shape":[4],"data_offsets":[0,16]}}', DATA),
        "'dtype' is there twice",
    ),
    "duplicate metadata": (safetensors(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' is there twice"),
    "duplicate in metadata": (safetensors(b'{"__metadata__":{"x":"1","x":"2"}}'), "'x' is there twice"),
    "duplicate in a further field": (_extra(b'{"k":1,"k":2}'), "'k' is there twice"),
    "metadata is a list": (safetensors({"__metadata__": [1]}), "not an object"),
    "metadata is null": (safetensors({"__metadata__": None}), "not an object"),
    "metadata is a number": (safetensors({"__metadata__": {"x": 1}}), "metadata 'x' is 1"),
    "metadata is an object": (safetensors({"__metadata__": {"x": {}}}), "metadata 'x' is {}"),
    "half a character in metadata": (safetensors({"__metadata__": {"x": "\ud800"}}), "not text"),
    "half a character in a key": (safetensors({"__metadata__": {"\udfff": "x"}}), "not Unicode"),
    "half a character in a further field": (_extra(b'["\\ud800"]'), "further field"),
    "half a character deep in a further field": (_extra(b'[{"k":[{"k":"\\ud800"}]}]'), "further field"),
    "further field of nested objects": (_extra(b'{"k":' * 9 + b"1" + b"}" * 9), "further field"),
    "further field, nested": (_extra(b"[" * 9 + b"]" * 9), "further field"),
    "empty name": (_named(""), "is no name"),
    "name with NUL": (_named("a\0b"), "is no name"),
    "name with an escape sequence": (_named("\x1b[31ma"), "is no name"),
    "name with a line end": (_named("a\nb"), "is no name"),
    "name that turns the direction": (_named("a\u202eb"), "is no name"),
    "long name": (_named("a" * 1025), "is no name"),
    "name of 5 MB": (_named("a" * 5_000_000), "is no name"),
}

ACCEPTED: dict[str, bytes] = {
    "nothing": safetensors({}),
    "one tensor": safetensors({"a": tensor()}, DATA),
    "no dims": safetensors({"a": tensor("F32", (), (0, 4))}, bytes(4)),
    "eight dims": safetensors({"a": tensor(shape=(1,) * 7 + (4,))}, DATA),
    "begins with a space": safetensors(b" {}"),
    "padded": safetensors(b'{"a":%s}   \n\t\r' % ONE, DATA),
    "metadata only": safetensors({"__metadata__": {"": "", "x": "1\n\0", "\u00e9": "\U0001f600"}}),
    "metadata last": safetensors({"a": tensor(), "__metadata__": {"x": "1"}}, DATA),
    "escaped pair": safetensors(b'{"__metadata__":{"x":"\\ud83d\\ude00"}}'),
    "not in order": safetensors({"b": tensor(offsets=(16, 32)), "a": tensor()}, bytes(32)),
    "misaligned": safetensors({"u": tensor("U8", (1,), (0, 1)), "a": tensor(offsets=(1, 17))}, bytes(17)),
    "empty tensors at one offset": safetensors(
        {
            "d": tensor("U8", (0,), (16, 16)),
            "a": tensor(),
            "b": tensor("F32", (0, 3), (0, 0)),
            "c": tensor("F32", (3, 0), (0, 0)),
        },
        DATA,
    ),
    "further fields": safetensors({"a": tensor(x=1, y=None, z=[{"k": [True, "s"]}])}, DATA),
    "further field, as deep as may be": _extra(b"[" * 8 + b"]" * 8),
    "packed": safetensors({"a": tensor("F4", (2, 4), (0, 4))}, bytes(4)),
    "scales": safetensors({"a": tensor("F8_E8M0", (4,), (0, 4))}, bytes(4)),
    "path-like name": safetensors({"../a": tensor()}, DATA),
    "long name": safetensors({"\u00e9" * 1024: tensor()}, DATA),
    "bools": safetensors({"a": tensor("BOOL", (4,), (0, 4))}, b"\7" * 4),
}
