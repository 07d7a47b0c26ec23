"""GGUF headers: each check by a file that breaks it, and honest files as the gguf package reads them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_raylight.loaders import gguf_header
from comfy_raylight.loaders.header import Header, Split, read_header
from comfy_raylight.raylight.errors import LoadError
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from .header_cases_gguf import ACCEPTED, REFUSED
from .header_files import (
    F32,
    Q4_K,
    Q8_0,
    TEXT,
    UINT32,
    Reads,
    Scratch,
    array,
    field,
    gguf,
    info,
    must_hold,
    parts,
    text,
)

NAME = "model.gguf"
U8, INT32 = 0, 5


def agrees(header: Header, path: Path) -> None:
    """The gguf package reads the same tensors from the same places."""
    reader = GGUFReader(path)
    assert {each.name for each in reader.tensors} == header.entries.keys()
    for each in reader.tensors:
        entry = header.entries[each.name]
        assert (entry.start, entry.nbytes) == (each.data_offset, each.n_bytes)
        assert math.prod(entry.shape) == each.n_elements
        assert entry.quant in ("", each.tensor_type.name)
        if f"comfy.gguf.orig_shape.{each.name}" not in reader.fields:
            assert entry.shape == tuple(int(dim) for dim in reversed(each.shape))
    for key, value in header.metadata.items():
        assert reader.fields[key].contents() == value


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, scratch: Scratch, reads: Reads) -> None:
    blob, reason = REFUSED[case]
    with pytest.raises(LoadError) as caught:
        scratch.read(blob, NAME)
    error = caught.value
    assert NAME in error.what and reason in error.why and error.remedy
    assert len(str(error)) < 2000 and str(error).isprintable()
    assert reads.end <= len(blob)


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts_what_the_package_accepts(case: str, scratch: Scratch) -> None:
    header = scratch.read(ACCEPTED[case], NAME)
    must_hold(header, len(ACCEPTED[case]))
    agrees(header, scratch.path)


def test_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    path = tmp_path / NAME
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    plain: dict[str, np.ndarray[Any, Any]] = {
        "f32": values,
        "f16": values.astype(np.float16),
        "f64": values.astype(np.float64),
        "i8": values.astype(np.int8),
        "i16": values.astype(np.int16),
        "i32": values.astype(np.int32),
        "i64": values.astype(np.int64),
    }
    writer = GGUFWriter(path, "wan")
    writer.add_string("config", '{"transformer": {}}')
    writer.add_uint32("general.file_type", 2)
    writer.add_float32("x.scale", 0.5)
    writer.add_bool("x.flag", True)
    writer.add_array("x.sizes", [1, 2, 3])
    writer.add_array("x.words", ["a", "bc", "\u00e9"])
    for name, value in plain.items():
        writer.add_tensor(name, value)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.BF16):
        writer.add_tensor(kind.name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with path.open("rb") as file:
        header = read_header(str(path), file.fileno())
    must_hold(header, path.stat().st_size)
    agrees(header, path)
    assert (header.path, header.format) == (str(path), "gguf")
    assert header.metadata == {"general.architecture": "wan", "config": '{"transformer": {}}'}
    entries = header.entries
    assert list(entries) == [*plain, "Q8_0", "Q4_0", "BF16"]
    assert {entry.shape for entry in entries.values()} == {(6, 64)}
    raw = path.read_bytes()
    for name, value in plain.items():
        entry = entries[name]
        assert (entry.dtype, entry.quant) == (torch.from_numpy(value).dtype, "")
        assert raw[entry.start : entry.stop] == value.tobytes()
    assert [(entries[name].dtype, entries[name].quant) for name in ("Q8_0", "Q4_0", "BF16")] == [
        (torch.uint8, "Q8_0"),
        (torch.uint8, "Q4_0"),
        (torch.bfloat16, ""),
    ]


@pytest.mark.parametrize("kind", GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_type_of_the_package(kind: GGMLQuantizationType, scratch: Scratch) -> None:
    values, size = GGML_QUANT_SIZES[kind]
    blob = gguf(parts(infos=[info(b"a", (2 * values, 3), int(kind))]), bytes(6 * size))
    header = scratch.read(blob, NAME)
    must_hold(header, len(blob))
    entry = header.entries["a"]
    assert (entry.shape, entry.nbytes) == ((3, 2 * values), 6 * size)
    assert entry.quant == ("" if values == 1 else kind.name)
    assert entry.dtype.itemsize == (size if values == 1 else 1)


@pytest.mark.parametrize("kind,size", [(0, 1), (1, 1), (2, 2), (3, 2), (UINT32, 4), (INT32, 4), (10, 8), (11, 8)])
def test_an_original_shape_of_any_integers(kind: int, size: int, scratch: Scratch) -> None:
    shape = array(b"comfy.gguf.orig_shape.a", kind, [(dim, size) for dim in (2, 1, 2, 2, 2)])
    header = scratch.read(gguf(parts([shape], [info(b"a", (4, 4))]), bytes(64)), NAME)
    assert header.entries["a"].shape == (2, 1, 2, 2, 2)


def test_an_original_shape_keeps_the_blocks(scratch: Scratch) -> None:
    fields = [
        array(b"comfy.gguf.orig_shape.a", INT32, [(dim, 4) for dim in (2, 3, 1, 4, 4)]),
        array(b"comfy.gguf.orig_shape.of nothing", INT32, [(7, 4)]),
    ]
    blob = gguf(parts(fields, [info(b"a", (32, 3), Q8_0), info(b"b", (32, 1), Q8_0, 128)]), bytes(162))
    entries = scratch.read(blob, NAME).entries
    assert (entries["a"].shape, entries["a"].nbytes) == ((2, 3, 1, 4, 4), 3 * 34)
    assert entries["b"].shape == (1, 32)


@pytest.mark.parametrize("noted,name", [("model.diffusion_model.a", "a"), ("a", "model.diffusion_model.a")])
def test_an_original_shape_under_a_name_with_another_prefix(noted: str, name: str, scratch: Scratch) -> None:
    fields = [array(f"comfy.gguf.orig_shape.{noted}".encode(), INT32, [(dim, 4) for dim in (2, 1, 2, 2, 2)])]
    infos = [info(name.encode(), (4, 4)), info(b"model.a", (4, 2), offset=64)]
    entries = scratch.read(gguf(parts(fields, infos), bytes(96)), NAME).entries
    assert entries[name].shape == (2, 1, 2, 2, 2)
    assert entries["model.a"].shape == (2, 4), "the note has another number of values"


def test_parts_say_what_they_are(scratch: Scratch) -> None:
    fields = [field(b"split.no", 2, (1, 2)), field(b"split.count", 2, (3, 2)), field(b"split.tensors.count", 5, (9, 4))]
    header = scratch.read(gguf(parts(fields, [info(b"a", (4, 4))]), bytes(64)), NAME)
    assert header.split == Split(number=1, count=3, tensors=9)
    assert scratch.read(gguf(parts(infos=[info(b"a", (4, 4))]), bytes(64)), NAME).split == Split()


@pytest.mark.parametrize("alignment", [1, 2, 8, 64, 4096, 1 << 16])
def test_alignment(alignment: int, scratch: Scratch) -> None:
    fields = [field(b"general.alignment", UINT32, (alignment, 4))]
    second = -(-12 // alignment) * alignment
    infos = [info(b"a", (3,)), info(b"b", (2,), offset=second)]
    blob = gguf(parts(fields, infos), bytes(second + 8), alignment=alignment)
    header = scratch.read(blob, NAME)
    agrees(header, scratch.path)
    assert header.entries["b"].stop == len(blob)


def test_entries_are_in_file_order_and_holes_may_be(scratch: Scratch) -> None:
    infos = [info(b"late", (8,), offset=4096), info(b"early", (8,))]
    header = scratch.read(gguf(parts(infos=infos), bytes(5000)), NAME)
    assert list(header.entries) == ["early", "late"]
    assert header.entries["late"].start - header.entries["early"].start == 4096


@pytest.mark.parametrize("name", ["model", "model.bin", "model.safetensors", "model.ckpt"])
def test_gguf_is_told_by_its_content(name: str, scratch: Scratch) -> None:
    assert scratch.read(ACCEPTED["one tensor"], name).format == "gguf"


def test_only_the_header_is_read(scratch: Scratch, reads: Reads) -> None:
    infos = [info(b"blocks.%d.weight" % i, (256, 256), Q4_K, 36864 * i) for i in range(3000)]
    blob = gguf(parts(infos=infos))
    header = scratch.read(blob, NAME, len(blob) + 36864 * 3000)
    assert len(header.entries) == 3000
    assert reads.end <= 2 * len(blob) + gguf_header.WINDOW_BYTES
    assert reads.total <= reads.end + 8


def test_a_header_without_end_is_refused(scratch: Scratch, reads: Reads) -> None:
    size = gguf_header.HEADER_BYTES + (1 << 30)
    with pytest.raises(LoadError, match="longer than any header"):
        scratch.read(gguf(parts([array(b"x", U8, [], gguf_header.HEADER_BYTES)])), NAME, size)
    assert reads.total < 1 << 20


def test_arrays_are_skipped_unread(scratch: Scratch, reads: Reads) -> None:
    skipped = 100 << 20
    head = gguf(parts([array(b"x", U8, [], skipped)], [info(b"a", (8,))], count=1), alignment=1)
    cut = len(head) - len(gguf(info(b"a", (8,)), alignment=1))
    scratch.write(b"", len(head) + skipped + 64)
    os.pwrite(scratch.fd, head[:cut], 0)
    os.pwrite(scratch.fd, head[cut:], cut + skipped)
    header = read_header(NAME, scratch.fd)
    assert header.entries["a"].start >= len(head) + skipped
    assert reads.total < 1 << 20


@pytest.mark.parametrize("window", [8, 9, 24, 64 << 10])
def test_strings_across_windows(window: int, scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "WINDOW_BYTES", window)
    monkeypatch.setattr(gguf_header, "MAX_WINDOW_BYTES", window)
    words = [part for i in range(200) for part in text(b"x" * (i % 37))]
    fields = [array(b"x", TEXT, words), field(b"y", TEXT, *text("\u00e9".encode() * 500)), array(b"z", TEXT, [])]
    header = scratch.read(gguf(parts(fields, [info(b"a", (16,))]), bytes(64)), NAME)
    assert header.metadata == {"y": "\u00e9" * 500}
    agrees(header, scratch.path)


def test_a_million_strings(scratch: Scratch) -> None:
    words = [*array(b"tokens", TEXT, [], 1_000_000), (b"\5" + bytes(7) + b"token") * 1_000_000]
    header = scratch.read(gguf(parts([words, field(b"y", TEXT, *text(b"z"))])), NAME)
    assert header.metadata == {"y": "z"}


def test_strings_are_counted_together(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", 5)
    two, three = ([part for _ in range(count) for part in text(b"")] for count in (2, 3))
    assert scratch.read(gguf(parts([array(b"x", TEXT, two), array(b"y", TEXT, three)])), NAME).entries == {}
    with pytest.raises(LoadError, match="more than there can be"):
        scratch.read(gguf(parts([array(b"x", TEXT, three), array(b"y", TEXT, three)])), NAME)


def test_text_is_limited(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "TEXT_BYTES", 10)
    assert scratch.read(gguf(parts([field(b"x", TEXT, *text(b"1234567890"))])), NAME).metadata
    with pytest.raises(LoadError, match="more than 10"):
        scratch.read(gguf(parts([field(b"x", TEXT, *text(b"12345678901"))])), NAME)


def test_the_package_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys; from comfy_raylight.loaders import header, gguf_header, safetensors_header\n"
        "sys.exit(bool({'gguf', 'safetensors'} & sys.modules.keys()))"
    )
    root = next(path for path in sys.path if path.endswith("import_root"))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, check=False)
    assert done.returncode == 0


def test_without_the_package(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(LoadError, match="pip install gguf"):
        scratch.read(gguf(parts(infos=[info(b"a", (16,), F32)]), bytes(64)), NAME)
