"""Open files: views of the map, other readers, refs between processes, cold files, and the way to a device."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.loaders import prefetch, staging
from comfy_raylight.loaders.files import opened, read_tensor
from comfy_raylight.loaders.source import OpenFiles, Source
from comfy_raylight.loaders.staging import HostEngine, Piece, upload
from comfy_raylight.raylight.errors import LoadError
from comfy_raylight.tests.weights.memory import private
from safetensors.torch import save_file


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(1500, 1024, generator=generator),
        "half": torch.randn(33, 7, generator=generator).half(),
        "none": torch.empty(0, 4),
        "one": torch.tensor(3.0),
        "bytes": torch.arange(251, dtype=torch.uint8),
        "after": torch.randn(5, generator=generator).to(torch.bfloat16),
    }


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> str:
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, {"format": "pt"})
    return str(file)


@pytest.mark.parametrize("reader", ["map", "private"])
def test_tensors_are_the_files(path: str, tensors: dict[str, torch.Tensor], reader: str) -> None:
    source = Source(path, reader=reader)
    assert set(source.tensors) == set(tensors)
    data = Path(path).read_bytes()
    for name, wanted in tensors.items():
        found = source.tensors[name]
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype
        offset = source.offset(found)
        if offset is not None:
            raw = found.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert data[offset : offset + found.nbytes] == raw
    assert source.offset(source.tensors["large"]) == source.header.entries["large"].start
    assert source.offset(source.tensors["large"][3]) == source.header.entries["large"].start + 3 * 4096
    assert source.offset(source.tensors["large"][:, 3]) is None, "not contiguous"
    assert source.offset(torch.ones(4)) is None


def test_only_the_map_is_shared(path: str) -> None:
    def mapped(source: Source) -> bool:
        address = source.tensors["large"].data_ptr()
        with open("/proc/self/maps") as file:
            for line in file:
                first, last = (int(part, 16) for part in line.split()[0].split("-"))
                if first <= address < last:
                    return path in line and line.split()[1] == "rw-p"
        raise AssertionError("not in any mapping")

    assert mapped(Source(path))
    assert not mapped(Source(path, reader="private"))


def test_one_tensor_without_the_rest(path: str, tensors: dict[str, torch.Tensor]) -> None:
    source = Source(path)
    for name in ("half", "one", "after"):
        assert torch.equal(read_tensor(source.header, source.files[0].fd, source.header.entries[name]), tensors[name])


@pytest.mark.parametrize("reader", ["map", "private"])
def test_who_writes_gets_a_copy(path: str, tensors: dict[str, torch.Tensor], reader: str) -> None:
    before = Path(path).read_bytes()
    source, other = Source(path, reader=reader), Source(path)
    large = source.tensors["large"]
    source.writing(large[2:4])
    large[2:4] = 5.0
    assert Path(path).read_bytes() == before and torch.equal(other.tensors["large"], tensors["large"])
    source.check()
    assert source.offset(large) is None and source.offset(large[3]) is None, "those bytes are not the file's"
    assert source.offset(large[1]) is not None and source.offset(source.tensors["half"]) is not None
    assert source.holds(large) and not source.holds(torch.ones(4))
    pieces = [Piece(tensor, source.offset(tensor), tensor.dtype) for tensor in (large, source.tensors["half"])]
    for got, wanted in zip(
        upload(source, pieces, HostEngine(torch.device("cpu"))), (large, tensors["half"]), strict=True
    ):
        assert torch.equal(got, wanted), "the device gets what was written"
    source.writing(large[:, 3])
    assert source.offset(large[7]) is None, "one column of every row"


def test_memory_of_a_map_that_was_written_into(tmp_path: Path) -> None:
    """By the kernel's count: what is written is this process's own, and nothing else."""
    file, me, mib = tmp_path / "large.safetensors", [os.getpid()], 1 << 20
    save_file({"weight": torch.ones(96, mib, dtype=torch.uint8)}, file)
    weight = Source(str(file)).tensors["weight"]
    before = private(me)
    assert all(bool((row == 1).all()) for row in weight)
    assert private(me) - before <= 4 * mib, "what is read is the page cache's"
    before = private(me)
    weight[40:56] = 2
    assert 15 * mib <= private(me) - before <= 18 * mib


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_a_change_is_noticed(path: str, how: str) -> None:
    source = Source(path)
    source.check()
    if how == "truncated":
        os.truncate(path, 5000)
    else:
        os.utime(path, ns=(1, 1))
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
    with pytest.raises(LoadError, match="changed while it was in use"):
        source.check()


def test_other_processes_find_tensors_by_place(path: str, tensors: dict[str, torch.Tensor]) -> None:
    files, ref = OpenFiles(), Source(path).ref("half")
    found = files.tensor(ref)
    assert torch.equal(found, tensors["half"])
    assert files.tensor(ref).data_ptr() == found.data_ptr(), "the file is opened once"
    save_file({"half": tensors["half"]}, path + ".new")
    os.replace(path + ".new", path)
    assert torch.equal(files.tensor(ref), found), "the old file is still the one that was named"
    with pytest.raises(LoadError, match="replaced"):
        OpenFiles().tensor(ref)
    with pytest.raises(LoadError, match="cannot be read"):
        OpenFiles().tensor(dataclasses.replace(ref, path=path + ".gone"))


def drop(fd: int, size: int, start: int, length: int) -> None:
    """Take a part of the file out of the page cache."""
    chunk = start // prefetch.CHUNK_BYTES * prefetch.CHUNK_BYTES
    for _ in range(50):  # pages that were written or read just now stay for a moment
        os.fsync(fd)
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
        if prefetch._cold(fd, size, chunk):
            return
        time.sleep(0.05)
    pytest.skip("this filesystem keeps its pages")


def test_cold_file_is_read_once_by_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CHUNK_BYTES", 1 << 20)
    file = tmp_path / "cold"
    size = (9 << 20) + 12345
    file.write_bytes(os.urandom(size))
    with opened(str(file)) as fd:
        drop(fd, size, 0, size)
        # a third of the ten chunks each, at most, and together all of them; readahead may bring in neighbours
        shares = [prefetch.prefetch(fd, size, index=index, count=3) for index in range(3)]
        assert 0 < sum(shares) <= size and max(shares) <= 4 << 20
        assert not any(prefetch._cold(fd, size, start) for start in range(0, size, 1 << 20))
        assert prefetch.prefetch(fd, size, index=0, count=1) == 0, "a warm file is left alone"


def test_what_is_missing_of_a_warm_file_is_read(tmp_path: Path) -> None:
    file, size = tmp_path / "part", 3 * prefetch.CHUNK_BYTES
    file.write_bytes(os.urandom(size))
    with opened(str(file)) as fd:
        # the second half of the second chunk: the kernel drops pages in runs of several megabytes
        drop(fd, size, size // 2, prefetch.CHUNK_BYTES // 2)
        assert prefetch.prefetch(fd, size, index=0, count=1) == prefetch.CHUNK_BYTES


@pytest.mark.parametrize("part", [1000, 4 << 20])
def test_upload(path: str, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """In order, whatever the parts; from the file and from memory; converted where that is asked for."""
    monkeypatch.setattr(staging, "PART_BYTES", part)
    source = Source(path)
    private = torch.randn(100, 3)
    pieces = [Piece(value, source.offset(value), value.dtype) for value in source.tensors.values()]
    pieces += [Piece(private, None, torch.bfloat16), Piece(source.tensors["half"], None, torch.float32)]
    found = list(upload(source, pieces, HostEngine(torch.device("cpu"))))
    wanted = [*source.tensors.values(), private.bfloat16(), tensors["half"].float()]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and one.shape == other.shape
        assert source.offset(one) is None, "a copy"


def test_an_upload_that_is_given_up_leaves_its_buffers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PART_BYTES", 1 << 16)
    source, engine = Source(path), HostEngine(torch.device("cpu"))
    large = source.tensors["large"]
    pieces = [Piece(large, source.offset(large), large.dtype)] * 50
    for _ in range(3):
        copies: Any = upload(source, pieces, engine)
        assert torch.equal(next(copies), large)
        copies.close()
    assert all(torch.equal(copy, large) for copy in upload(source, pieces[:3], engine))


def test_upload_of_a_truncated_file_is_an_error(path: str) -> None:
    """Reads of the file are short where a touch of the map would end the process."""
    source = Source(path)
    large = source.tensors["large"]
    pieces = [Piece(large, source.offset(large), large.dtype)] * 3
    copies = upload(source, pieces, HostEngine(torch.device("cpu")))
    assert torch.equal(next(copies), large)
    os.truncate(path, 10000)
    with pytest.raises(LoadError, match="changed while it was in use"):
        list(copies)


def test_an_upload_within_another_has_buffers_of_its_own(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is patched as it comes may ask for others; buffers are used again later."""
    monkeypatch.setattr(staging, "PART_BYTES", 1 << 16)
    source, engine = Source(path), HostEngine(torch.device("cpu"))
    pieces = [Piece(value, source.offset(value), value.dtype) for value in source.tensors.values()]
    for _ in range(2):
        outer = upload(source, pieces, engine)
        for wanted, copy in zip(source.tensors.values(), outer, strict=True):
            assert torch.equal(copy, wanted)
            assert all(map(torch.equal, upload(source, pieces, engine), source.tensors.values()))
        assert len(engine.idle) == len(set(map(id, engine.idle))) <= 2 * staging.THREADS
