"""Safetensors headers: each check by a file that breaks it, and honest files as their own library reads them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from comfy_raylight.loaders.header import read_header
from comfy_raylight.raylight.errors import LoadError
from safetensors import safe_open
from safetensors.torch import save_file

from .header_cases_safetensors import ACCEPTED, REFUSED
from .header_files import Reads, Scratch, must_hold, safetensors, tensor

NAME = "model.safetensors"


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, scratch: Scratch, reads: Reads) -> None:
    blob, reason = REFUSED[case]
    with pytest.raises(LoadError) as caught:
        scratch.read(blob, NAME)
    error = caught.value
    assert NAME in error.what and reason in error.why and error.remedy
    assert len(str(error)) < 1000 and str(error).isprintable()
    assert reads.end <= len(blob)


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts_what_the_library_accepts(case: str, scratch: Scratch) -> None:
    header = scratch.read(ACCEPTED[case], NAME)
    must_hold(header, len(ACCEPTED[case]))
    with safe_open(scratch.path, "pt") as theirs:
        assert set(theirs.keys()) == header.entries.keys()
        assert (theirs.metadata() or {}) == header.metadata
        for name, entry in header.entries.items():
            value = theirs.get_tensor(name)
            assert (value.dtype, tuple(value.shape)) == (entry.dtype, entry.shape)


def test_reads_what_save_file_wrote(tmp_path: Path) -> None:
    dtypes = (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    )
    tensors = {f"block.{i}": torch.arange(i, i + 15).view(3, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 7)
    path = tmp_path / NAME
    save_file(tensors, path, {"modelspec.title": "x", "workflow": "{\n}"})
    with path.open("rb") as file:
        header = read_header(str(path), file.fileno())
        assert file.tell() == 0
        raw = file.read()
    must_hold(header, len(raw))
    assert (header.path, header.format) == (str(path), "safetensors")
    assert header.metadata == {"modelspec.title": "x", "workflow": "{\n}"}
    assert header.entries.keys() == tensors.keys()
    for name, entry in header.entries.items():
        assert (entry.dtype, entry.shape, entry.quant) == (tensors[name].dtype, tuple(tensors[name].shape), "")
        if entry.nbytes:
            stored = torch.frombuffer(bytearray(raw[entry.start : entry.stop]), dtype=torch.uint8)
            assert torch.equal(stored, tensors[name].reshape(-1).view(torch.uint8))


def test_entries_are_in_file_order(scratch: Scratch) -> None:
    header = scratch.read(ACCEPTED["not in order"], NAME)
    assert list(header.entries) == ["a", "b"]
    assert header.entries["a"].stop == header.entries["b"].start
    empty = scratch.read(ACCEPTED["empty tensors at one offset"], NAME)
    assert list(empty.entries) == ["b", "c", "a", "d"]


def test_aligned_tells_what_can_be_viewed_in_place(scratch: Scratch) -> None:
    entries = scratch.read(safetensors(b'{"a":%s} ' % b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}', b"1"), NAME)
    assert entries.entries["a"].aligned
    for pad in range(8):
        header = {"u": tensor("U8", (1,), (0, 1)), "a": tensor(offsets=(1, 17)), "pad": tensor("U8", (0,), (17, 17))}
        header["x" * (pad + 1)] = tensor("U8", (0,), (17, 17))
        entry = scratch.read(safetensors(header, bytes(17)), NAME).entries["a"]
        assert entry.aligned == (entry.start % 4 == 0)


def test_long_metadata(scratch: Scratch) -> None:
    workflow = '{"nodes": [1, 2, "\u00e9\u4e16"]}' * 100_000
    header = scratch.read(safetensors({"__metadata__": {"workflow": workflow}}), NAME)
    assert header.metadata == {"workflow": workflow}


def test_many_tensors_are_read_at_once(scratch: Scratch, reads: Reads) -> None:
    header = {f"blocks.{i}.weight": tensor("U8", (1,), (i, i + 1)) for i in range(10_000)}
    blob = safetensors(header, bytes(10_000))
    assert list(scratch.read(blob, NAME).entries) == list(header)
    assert reads.end == len(blob) - 10_000
    assert reads.total <= reads.end + 8


def test_a_dtype_of_another_torch_is_refused_by_name(scratch: Scratch) -> None:
    with pytest.raises(LoadError, match="dtype 'F6_E3M2', which torch .* does not have.*Update torch"):
        scratch.read(safetensors({"a": tensor("F6_E3M2", (4,), (0, 3))}, bytes(3)), NAME)


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.pth", "m.bin", "m.PT", "m.pkl"])
def test_names_of_pickles_are_refused(name: str, scratch: Scratch) -> None:
    with pytest.raises(LoadError, match=f"{name} cannot be loaded.*can run code.*Convert it to safetensors"):
        scratch.read(ACCEPTED["one tensor"], name)


@pytest.mark.parametrize("name", ["m.safetensors", "m.sft", "m", "m.gguf", "m.txt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_another_name_are_refused(name: str, legacy: bool, scratch: Scratch) -> None:
    torch.save({"a": torch.zeros(3)}, scratch.path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(LoadError, match="can run code"):
        scratch.read(scratch.path.read_bytes(), name)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_refused(protocol: int, scratch: Scratch) -> None:
    with pytest.raises(LoadError, match="can run code"):
        scratch.read(pickle.dumps({"state_dict": [1, 2, 3]}, protocol), NAME)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_header_length_like_a_pickle_is_none(protocol: int, scratch: Scratch) -> None:
    blob = safetensors(b"{}".ljust(0x80 + (protocol << 8)))
    assert blob[:2] == bytes((0x80, protocol))
    assert scratch.read(blob, NAME).entries == {}


@pytest.mark.parametrize("name", ["m.safetensors", "m.sft", "m.SafeTensors"])
def test_names_of_safetensors(name: str, scratch: Scratch) -> None:
    assert scratch.read(ACCEPTED["one tensor"], name).format == "safetensors"


@pytest.mark.parametrize(
    "name,reason", [("m", "neither GGUF nor"), ("m.onnx", "neither GGUF nor"), ("m.gguf", "does not begin with GGUF")]
)
@pytest.mark.parametrize("blob", [b"", b"PK", ACCEPTED["one tensor"]])
def test_other_files_are_refused(name: str, reason: str, blob: bytes, scratch: Scratch) -> None:
    with pytest.raises(LoadError, match=reason):
        scratch.read(blob, name)


def test_a_file_that_shrinks_meanwhile_is_refused(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, start: pread(fd, count, start) if start < 8 else b"")
    with pytest.raises(LoadError, match="became shorter"):
        scratch.read(ACCEPTED["one tensor"], NAME)


def test_short_reads_are_continued(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, start: pread(fd, min(count, 3), start))
    assert list(scratch.read(ACCEPTED["one tensor"], NAME).entries) == ["a"]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(LoadError, match=NAME):
            read_header(f"somewhere/{NAME}", fd)
    finally:
        os.close(fd)
    with pytest.raises(LoadError, match=f"{NAME} cannot be read"):
        read_header(f"somewhere/{NAME}", fd)


def test_a_want_of_memory_is_told(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, count: int, start: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr(os, "pread", full)
    with pytest.raises(LoadError, match="more memory than there is"):
        scratch.read(ACCEPTED["one tensor"], NAME)
