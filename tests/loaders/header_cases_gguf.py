"""GGUF files that must be refused, each with a part of the reason, and some that must not."""

from __future__ import annotations

from .header_files import (
    ARRAY,
    BOOL,
    F32,
    Q4_K,
    TEXT,
    UINT32,
    array,
    field,
    gguf,
    info,
    parts,
    text,
)

U8, INT32, FLOAT32 = 0, 5, 6
A = info(b"a", (16,))
BIG = bytes(64)
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, INT32: 4, FLOAT32: 4, BOOL: 1, 10: 8, 11: 8, 12: 8}


def _field(*value: tuple[int, int] | bytes, kind: int = UINT32, key: bytes = b"x") -> bytes:
    return gguf(parts([field(key, kind, *value)], [A]), BIG)


def _infos(*infos: list[bytes | tuple[int, int]], data: bytes = BIG) -> bytes:
    return gguf(parts((), infos), data)


def _shaped(kind: int, sizes: list[tuple[int, int]], key: bytes = b"comfy.gguf.orig_shape.a") -> bytes:
    return gguf(parts([array(key, kind, sizes)], [A]), BIG)


REFUSED: dict[str, tuple[bytes, str]] = {
    "magic only": (b"GGUF", "cut off"),
    "version only": (b"GGUF\3\0\0\0", "cut off"),
    "version 0": (gguf(parts(version=0)), "version 0"),
    "version 1": (gguf(parts(version=1)), "version 1"),
    "version 4": (gguf(parts(version=4)), "version 4"),
    "swapped version": (gguf(parts(version=0x03000000)), "big-endian"),
    "fields 2^63": (gguf(parts(count=1 << 63)), "do not fit"),
    "tensors 2^63": (gguf(parts(tensors=1 << 63)), "do not fit"),
    "tensors 2^40": (gguf(parts(infos=[A], tensors=1 << 40), BIG), "do not fit"),
    "fields 10^7 in a small file": (gguf(parts(count=10**7), BIG), "do not fit"),
    "one field more than fits": (gguf(parts(count=5), bytes(5 * 14 - 1 - 8)), "do not fit"),
    "one tensor more than fits": (gguf(parts(tensors=2), bytes(57)), "do not fit"),
    "both more than fit together": (gguf(parts(tensors=1, count=3), bytes(56)), "do not fit"),
    "more fields than any": (gguf(parts(count=(1 << 18) + 1), bytes(1 << 22)), "do not fit"),
    "padding as fields": (gguf(parts(count=3), BIG), "is no name"),
    "key of 2^63 bytes": (gguf(parts([[*text(b"x", 1 << 63), (UINT32, 4), (1, 4)]])), "more than"),
    "key of 2^64 - 1 bytes": (gguf(parts([[*text(b"x", -1), (UINT32, 4), (1, 4)]])), "more than"),
    "key past the end": (gguf(parts([[*text(b"x", 4000), (UINT32, 4), (1, 4)]])), "cut off"),
    "key not UTF-8": (_field((1, 4), key=b"\xff"), "not UTF-8"),
    "key with NUL": (_field((1, 4), key=b"a\0b"), "is no name"),
    "text of 2^63 bytes": (_field(*text(b"x", 1 << 63), kind=TEXT), "more than"),
    "text past the end": (_field(*text(b"x", 5000), kind=TEXT), "cut off"),
    "text not UTF-8": (_field(*text(b"\xed\xa0\x80"), kind=TEXT), "not UTF-8"),
    "unknown value type": (_field((1, 4), kind=99), "unknown type 99"),
    "value cut off": (gguf(parts([field(b"long.enough.key", 10, b"\1")]), alignment=1), "cut off"),
    "bool 7": (_field((7, 1), kind=BOOL), "neither 0 nor 1"),
    "array of 2^60": (gguf(parts([array(b"x", U8, [], 1 << 60)])), "cut off"),
    "array of 2^64 - 1": (gguf(parts([array(b"x", 10, [], -1)])), "cut off"),
    "array one longer than the file": (gguf(parts([array(b"x", U8, [b"\1"], 2)]), alignment=1), "cut off"),
    "array of arrays": (gguf(parts([array(b"x", ARRAY, [(U8, 4), (1, 8), (1, 1)], 1)])), "array of arrays"),
    "empty array of arrays": (gguf(parts([array(b"x", ARRAY, [])])), "array of arrays"),
    "arrays 3000 deep": (
        gguf(parts([field(b"x", ARRAY, *([(ARRAY, 4), (1, 8)] * 3000), (U8, 4), (1, 8))])),
        "of arrays",
    ),
    "array of an unknown type": (gguf(parts([array(b"x", 99, [b"\1"])])), "unknown type 99"),
    "strings 2^60": (gguf(parts([array(b"x", TEXT, [], 1 << 60)])), "more than there can be"),
    "strings that do not fit": (gguf(parts([array(b"x", TEXT, [], 10)]), BIG), "more than there can be"),
    "strings that end too early": (
        gguf(parts([array(b"x", TEXT, text(b"abcdefgh"), 2)]), bytes(4), alignment=1),
        "cut off",
    ),
    "string past the end in an array": (gguf(parts([array(b"x", TEXT, text(b"abc", 1 << 62))]), BIG), "cut off"),
    "string of 2^64 - 1 in an array": (gguf(parts([array(b"x", TEXT, text(b"abc", -1))]), BIG), "cut off"),
    "alignment 0": (_field((0, 4), key=b"general.alignment"), "power of two"),
    "alignment 3": (_field((3, 4), key=b"general.alignment"), "power of two"),
    "alignment 2^17": (_field((1 << 17, 4), key=b"general.alignment"), "power of two"),
    "alignment 2^31": (_field((1 << 31, 4), key=b"general.alignment"), "power of two"),
    "alignment as text": (_field(*text(b"32"), kind=TEXT, key=b"general.alignment"), "power of two"),
    "alignment as int32": (_field((32, 4), kind=INT32, key=b"general.alignment"), "power of two"),
    "alignment as an array": (gguf(parts([array(b"general.alignment", UINT32, [(32, 4)])])), "power of two"),
    "duplicate field": (gguf(parts([field(b"x", UINT32, (1, 4)), field(b"x", TEXT, *text(b"1"))])), "there twice"),
    "original shape of another size": (_shaped(INT32, [(2, 4), (9, 4)]), "original shape (2, 9)"),
    "negative original shape": (_shaped(INT32, [(-2, 4), (-8, 4)]), "at least 1"),
    "zero in an original shape": (_shaped(INT32, [(16, 4), (0, 4)]), "at least 1"),
    "original shape of floats": (_shaped(FLOAT32, [(16, 4)]), "no array of 1 to 8 integers"),
    "original shape of bools": (_shaped(BOOL, [(1, 1)]), "no array of 1 to 8 integers"),
    "original shape of strings": (
        gguf(parts([array(b"comfy.gguf.orig_shape.a", TEXT, text(b"16"))], [A]), BIG),
        "no array of 1 to 8 integers",
    ),
    "original shape without dims": (_shaped(INT32, []), "no array of 1 to 8 integers"),
    "original shape of nine dims": (_shaped(INT32, [(16, 4)] + [(1, 4)] * 8), "no array of 1 to 8 integers"),
    "original shape as a number": (_field((16, 4), key=b"comfy.gguf.orig_shape.a"), "no array of 1 to 8 integers"),
    "original shape as text": (
        _field(*text(b"16"), kind=TEXT, key=b"comfy.gguf.orig_shape.a"),
        "no array of 1 to 8 integers",
    ),
    "original shape that overflows": (_shaped(10, [(1 << 63, 8), (32, 8)]), "original shape"),
    "original shape cut off": (gguf(parts([array(b"comfy.gguf.orig_shape.a", 10, [], 8)])), "cut off"),
    "duplicate tensor": (_infos(A, info(b"a", (8,), offset=64), data=bytes(96)), "there twice"),
    "the same bytes twice": (_infos(A, info(b"b", (16,))), "inside the one"),
    "overlap": (_infos(A, info(b"b", (16,), offset=32), data=bytes(96)), "inside the one"),
    "offset past the end": (_infos(info(b"a", (16,), offset=1 << 20)), "of a file of"),
    "offset 2^63": (_infos(info(b"a", (16,), offset=1 << 63)), "of a file of"),
    "offset that wraps to 0": (_infos(info(b"a", (16,), offset=-32)), "of a file of"),
    "offset -8": (_infos(info(b"a", (16,), offset=-8)), "no multiple of 32"),
    "offset 1": (_infos(info(b"a", (8,), offset=1)), "no multiple of 32"),
    "offset 32 where 64 is the alignment": (
        gguf(parts([field(b"general.alignment", UINT32, (64, 4))], [info(b"a", (8,), offset=32)]), BIG, alignment=64),
        "no multiple of 64",
    ),
    "product is 2^64": (_infos(info(b"a", (1 << 32, 1 << 32))), "cannot be"),
    "bytes are 2^66": (_infos(info(b"a", (1 << 62, 4))), "cannot be"),
    "product wraps to 16": (_infos(info(b"a", ((1 << 63) + 8, 2))), "cannot be"),
    "bytes wrap to 64": (_infos(info(b"a", ((1 << 62) + 16,))), "of a file of"),
    "rank 10^9": (_infos(info(b"a", (16,), rank=10**9)), "has 1000000000 dims"),
    "rank 0": (_infos(info(b"a", ())), "has 0 dims"),
    "rank 5": (_infos(info(b"a", (1, 1, 1, 1, 16))), "has 5 dims"),
    "dim 0": (_infos(info(b"a", (0,))), "cannot be"),
    "unknown tensor type": (_infos(info(b"a", (16,), 250)), "unknown type 250"),
    "removed tensor type": (_infos(info(b"a", (32,), 4)), "unknown type 4"),
    "row of half a block": (_infos(info(b"a", (128,), Q4_K), data=bytes(200)), "of Q4_K has the dims (128,)"),
    "rows of no whole blocks": (_infos(info(b"a", (128, 2), Q4_K), data=bytes(200)), "of Q4_K has the dims (128, 2)"),
    "truncated data": (_infos(info(b"a", (64,)), data=bytes(100)), "of a file of"),
    "one byte missing": (_infos(A, data=bytes(63)), "of a file of"),
    "infos cut off": (gguf(parts(infos=[info(b"a" * 40, (16,))] * 3))[:200], "cut off"),
    "tensor not UTF-8": (_infos(info(b"\xff\xfe", (16,))), "not UTF-8"),
    "tensor without a name": (_infos(info(b"", (16,))), "is no name"),
    "tensor with a line end": (_infos(info(b"a\n", (16,))), "is no name"),
    "tensor with a long name": (_infos(info(b"a" * 1025, (16,))), "is no name"),
    "tensor name of 2^63 bytes": (
        gguf(parts(infos=[[*text(b"a", 1 << 63), (1, 4), (16, 8), (F32, 4), (0, 8)]])),
        "more",
    ),
}

WORDS = [part for word in (b"a", b"", b"\xff not UTF-8") for part in text(word)]
ACCEPTED: dict[str, bytes] = {
    "nothing": gguf(parts()),
    "one tensor": _infos(A),
    "version 2": gguf(parts([field(b"x", TEXT, *text(b"y"))], [A], version=2), BIG),
    "every type of value": gguf(
        parts(
            [
                *(field(b"value.%d" % kind, kind, bytes(size)) for kind, size in SIZES.items()),
                *(array(b"array.%d" % kind, kind, [bytes(size)] * 3) for kind, size in SIZES.items()),
                *(array(b"empty.%d" % kind, kind, []) for kind in SIZES),
                field(b"text", TEXT, *text("\u00e9".encode())),
                field(b"no text", TEXT, *text(b"")),
                array(b"texts", TEXT, WORDS),
                array(b"no texts", TEXT, []),
            ],
            [A],
        ),
        BIG,
    ),
    "four dims": _infos(info(b"a", (2, 1, 2, 4))),
    "quantised": _infos(info(b"a", (256, 3), Q4_K), data=bytes(432)),
    "not in order": _infos(info(b"b", (8,), offset=64), info(b"a", (16,)), data=bytes(96)),
    "hole": _infos(A, info(b"b", (8,), offset=1024), data=bytes(1056)),
    "bytes after the last": _infos(A, data=bytes(100)),
    "long name": _infos(info("\u00e9".encode() * 1024, (16,))),
    "original shape": _shaped(INT32, [(2, 4), (1, 4), (2, 4), (2, 4), (2, 4)]),
}
