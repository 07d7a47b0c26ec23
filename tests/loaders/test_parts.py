"""Models in parts: any of them names all, the bytes of each are its own file's, and what is missing has a name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy_raylight.loaders.content import content_key
from comfy_raylight.loaders.parts import spec_of
from comfy_raylight.loaders.source import Source
from comfy_raylight.loaders.staging import HostEngine, Piece, upload
from comfy_raylight.raylight.errors import LoadError
from comfy_raylight.tests.weights.files import split, write_gguf
from safetensors.torch import save_file

Parts = Callable[..., list[Path]]
STATE = {f"blocks.{n}.weight": torch.randn(64, 32 + n, generator=torch.Generator().manual_seed(n)) for n in range(7)}
KINDS = ("safetensors", "with an index", "gguf")


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """Writes a model in three parts."""

    def write(kind: str) -> list[Path]:
        whole = tmp_path / "model.safetensors"
        save_file(STATE, whole)
        if kind != "gguf":
            return split(whole, 3, index=kind == "with an index")
        paths = [tmp_path / f"model-{number + 1:05}-of-00003.gguf" for number in range(3)]
        for number, path in enumerate(paths):
            write_gguf(whole, path, "Q8_0", quantised=lambda *_: False, part=(number, 3))
        return paths

    return write


@pytest.mark.parametrize("reader", ["map", "private"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_part_is_the_model(parts: Parts, kind: str, reader: str) -> None:
    paths = parts(kind)
    specs = {spec_of(str(path), reader=reader) for path in paths}
    assert len(specs) == 1
    (spec,) = specs
    assert spec.paths == tuple(map(str, paths)) and spec.now() == spec
    source = Source.of(spec)
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == {n: t.shape for n, t in STATE.items()}
    pieces = [Piece(tensor, source.offset(tensor), tensor.dtype) for tensor in source.tensors.values()]
    assert all(piece.offset is not None for piece in pieces)
    for name, got in zip(source.tensors, upload(source, pieces, HostEngine(torch.device("cpu"))), strict=True):
        assert torch.equal(source.tensors[name], STATE[name]) and torch.equal(got, STATE[name])
        assert source.header.entries[name].start == source.offset(source.tensors[name])
    at = [paths.index(Path(source.ref(name).path)) for name in source.tensors]
    assert at == sorted(at) and set(at) == {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_part_is_named(parts: Parts, kind: str) -> None:
    paths = parts(kind)
    paths[1].unlink()
    for path in (paths[0], paths[2]):
        with pytest.raises(
            LoadError, match=f"is a part of a model in 3 files, and {re.escape(paths[1].name)} is missing"
        ):
            spec_of(str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_changes_is_another_model(parts: Parts, kind: str) -> None:
    paths = parts(kind)
    spec = spec_of(str(paths[0]))
    source, key = Source.of(spec), content_key(spec.paths)
    os.utime(paths[2], ns=(1, 1))
    assert spec_of(str(paths[0])) != spec
    with pytest.raises(LoadError, match=f"{paths[2].name} changed while it was in use"):
        source.check()
    with pytest.raises(LoadError, match="not the file that was chosen"):
        Source.of(spec)
    with paths[2].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert content_key(spec.paths) != key


def test_links_by_other_names(parts: Parts, tmp_path: Path) -> None:
    """As a cache of downloads has them."""
    folder = tmp_path / "links"
    folder.mkdir()
    for number, path in enumerate(parts("safetensors")):
        path.rename(tmp_path / f"blob{number}.safetensors")
        (folder / path.name).symlink_to(tmp_path / f"blob{number}.safetensors")
    spec = spec_of(str(folder / "model-00002-of-00003.safetensors"))
    assert set(Source.of(spec).tensors) == set(STATE)


def test_what_does_not_belong_together(parts: Parts, tmp_path: Path) -> None:
    paths = parts("with an index")
    save_file({"other": torch.ones(4)}, paths[1])
    with pytest.raises(LoadError, match="00002-of-00003.safetensors is not the part that the model's index means"):
        spec_of(str(paths[0]))
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"blocks.0.weight": torch.ones(4)}, paths[1])
    with pytest.raises(LoadError, match="'blocks.0.weight' is in another part as well"):
        Source.of(spec_of(str(paths[0])))


def test_an_index_cannot_lead_elsewhere(parts: Parts, tmp_path: Path) -> None:
    paths = parts("with an index")
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text(encoding="utf-8"))
    found["weight_map"]["blocks.0.weight"] = "../model.safetensors"
    index.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(LoadError, match="no file beside it"):
        spec_of(str(paths[2]))


def test_gguf_says_what_it_is(parts: Parts, tmp_path: Path) -> None:
    paths = parts("gguf")
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(paths[1].read_bytes())
    with pytest.raises(LoadError, match=r"it is part 2 of 3 .* end in -00002-of-00003.gguf"):
        Source.of(spec_of(str(alone)))
    first, second = (path.read_bytes() for path in paths[:2])
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(LoadError, match="it says that it is part 2 of 3, and its name that it is 1 of 3"):
        Source.of(spec_of(str(paths[0])))


def test_a_whole_model_named_like_a_part(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file(STATE, path)
    assert spec_of(str(path)).paths == (str(path),)
