"""Blocks' weights divided over ranks: the bits are those of resident weights, for every family and whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.loaders.residency import Leaf, PackedBlock, from_map
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.errors import ConfigError
from comfy_raylight.raylight.packing import ALIGN, Footprint, Packing, advice, arena_bytes, footprint
from comfy_raylight.raylight.residency import units
from comfy_raylight.tests.host import documents
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.reports import reporter

from . import tables
from .conftest import TIMEOUT_S, comfy_roots
from .families import CASES
from .residency_ranks import MESHES, SPECIAL, ranks_of

pytestmark = pytest.mark.timeout(2000)
FAMILIES = {case.family: case for case in reversed(CASES) if not (case.wrong or case.raises or case.half)}
ROOTS = comfy_roots()
TABLE = Path(__file__).resolve().parents[2] / "docs" / "residency.md"
INTRODUCTION = """# Divided weights of every model family

A small member of every family, with the weights of its blocks divided over ranks ([weights.md](weights.md)), against
itself with resident weights: how many calls of all ranks were compared, sharded + streamed. Every one gives the same
bits, in fp32 on a CPU; with prefetch and without, each rank computing all of it, and sharing the sequence (or the rows)
cut once and around every block. `u2` is Ulysses on 2 ranks, `u2r2` with a ring on 4. An empty cell: this ComfyUI does
not have the family. Written by
`RAYLIGHT_TEST_LARGE=1 python tests/run.py tests/engine/test_residency.py --write-tables`.
"""
RUNS = [
    pytest.param(case.family, mesh, id=f"{case.family}-{mesh}")
    for case in sorted(FAMILIES.values(), key=lambda case: case.family)
    for mesh in ranks_of(case)
]


@pytest.fixture(scope="session")
def residency(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Results of `residency_ranks.main` for a ComfyUI root, computed once each."""
    report = reporter("engine.residency_ranks", tmp_path_factory.mktemp("residency"), timeout=TIMEOUT_S)
    return lambda root: report(Path(root))


def test_table_is_written(request: pytest.FixtureRequest, residency: Any) -> None:
    if not request.config.getoption("--write-tables"):
        pytest.skip("only with --write-tables")
    assert LARGE, "the table has every mesh: set RAYLIGHT_TEST_LARGE=1"
    text = TABLE.read_text(encoding="utf-8")
    for root in ROOTS:
        (path,) = root.values
        text = documents.with_section(text, INTRODUCTION, str(root.id), tables.residency_table(residency(path)))
    TABLE.write_text(text, encoding="utf-8", newline="\n")


def of_all_ranks(results: dict[str, Any], mesh: str, name: str) -> list[dict[str, Any]]:
    tables = list(results[mesh].values())
    for table in tables:
        assert isinstance(table, dict), table
    found = [table[name] for table in tables if name in table]
    for result in found:
        assert "broke" not in result, result["broke"]
    return found


def check(results: list[dict[str, Any]]) -> None:
    for variants in results:
        assert variants
        for name, result in variants.items():
            assert all(result["equal"]), (name, result)
            assert result["after"], f"{name}: the weights did not come home"
            assert result["wasted"][-1] == 0, f"{name}: the order was not learned, {result}"
            assert result["blocks"] > 1


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("family, mesh", RUNS)
def test_family(residency: Any, root: str, family: str, mesh: str) -> None:
    found = residency(root)
    first = next(
        (case.name for case in CASES if case.family == family and case.name in next(iter(found[mesh].values()))), None
    )
    if first is None:
        pytest.skip("this ComfyUI does not have it")
    check(of_all_ranks(found, mesh, first))


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name, mesh", [(case.name, mesh) for case in SPECIAL for mesh in ranks_of(case)])
def test_special(residency: Any, root: str, name: str, mesh: str) -> None:
    """Several dtypes in a block and a weight in two blocks, and a block that is left out."""
    check(of_all_ranks(residency(root), mesh, name))


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("mesh", MESHES)
def test_change_of_path(residency: Any, root: str, mesh: str) -> None:
    """Blocks that are left out, and come back: one gather in vain each time."""
    for result in of_all_ranks(residency(root), mesh, "changes of path"):
        assert result == {"equal": [True] * 5, "wasted": [0, 1, 0, 1, 0]}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("mesh", MESHES)
def test_errors(residency: Any, root: str, mesh: str) -> None:
    for result in of_all_ranks(residency(root), mesh, "goes wrong"):
        stray, nested, failed, write = result["said"]
        assert "reads a weight of the block blocks.2 while that does not run" in stray
        assert "blocks.0 runs inside of the block blocks.1" in nested
        assert failed == "ValueError: in a block"
        assert "single memory location" in write
        assert result["equal"], "the call after the errors"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("sizes", [(1,), (7, 2048, 34 * 5, 3 << 20), (256, 256), (100000, 1)])
def test_packing(ranks: int, sizes: tuple[int, ...]) -> None:
    """Every byte of every tensor is in exactly one part, at a place where any dtype may start."""
    packing = Packing(sizes, ranks)
    assert packing.total == ranks * packing.part and packing.part % ALIGN == 0
    assert packing.total < sum(sizes) + ALIGN * (len(sizes) + ranks)
    seen = [0] * len(sizes)
    for rank in range(ranks):
        for span in packing.spans(rank):
            assert span.start == seen[span.index] and span.start % ALIGN == 0
            assert rank * packing.part + span.at == packing.starts[span.index] + span.start
            seen[span.index] = span.stop
    assert tuple(seen) == sizes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parts_make_the_block(ranks: int) -> None:
    tensors = [torch.randn(5, 7), torch.arange(34, dtype=torch.uint8), torch.randn(300).to(torch.float8_e4m3fn)]
    tensors += [torch.randn(1000, 3).bfloat16(), torch.tensor(2.5)]
    kept: dict[int, torch.Tensor] = {}
    leaves = [
        Leaf(tensor, tensor.dtype, partial(kept.__setitem__, i), tensor.shape) for i, tensor in enumerate(tensors)
    ]
    leaves[0] = Leaf(tensors[0], torch.float64, leaves[0].put, tensors[0].shape)
    block = PackedBlock("block", torch.nn.Identity(), leaves, ranks=ranks, device=torch.device("cpu"))
    whole = torch.full((block.packing.total,), 255, dtype=torch.uint8)
    other = torch.randn(300).to(torch.float8_e4m3fn)
    for rank in range(ranks):
        part = whole[rank * block.packing.part : (rank + 1) * block.packing.part]
        block.fill(part, rank, from_map, {2: other})
    block.point(whole)
    assert kept[0].dtype == torch.float64 and torch.equal(kept[0].float(), tensors[0])
    assert torch.equal(kept[2].view(torch.uint8), other.view(torch.uint8))
    assert all(torch.equal(kept[i], tensors[i]) for i in (1, 3, 4))
    block.release()
    for tensor, stub in zip(tensors[1:], list(kept.values())[1:], strict=True):
        assert (stub.shape, stub.dtype, stub.untyped_storage().nbytes()) == (
            tensor.shape,
            tensor.dtype,
            tensor.itemsize,
        )


def test_units_are_what_is_called() -> None:
    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleList([torch.nn.Linear(1, 1)])

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([Called(), torch.nn.ModuleList([Called()])])
    model.levels = torch.nn.ModuleDict({"a": torch.nn.Sequential(Called(), Called())})
    model.head = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert [name for name, _ in units(model)] == ["blocks.0", "blocks.1.0", "levels.a.0", "levels.a.1"]


def test_footprint() -> None:
    packings = [Packing((1000 * ALIGN,), 4), Packing((400 * ALIGN,), 4), Packing((600 * ALIGN,), 4)]
    assert arena_bytes(packings, prefetch=True) == 1600 * ALIGN
    sharded = footprint("sharded", packings, outside=7, prefetch=True)
    assert sharded == Footprint(shards=500 * ALIGN, buffers=1600 * ALIGN, outside=7)
    assert footprint("sharded", packings, outside=7, prefetch=False).buffers == 1000 * ALIGN
    assert footprint("streamed", packings, outside=7, prefetch=True).buffers == (1600 + 500) * ALIGN
    assert footprint("resident", packings, outside=7, prefetch=True).total == 2000 * ALIGN + 7


def test_advice() -> None:
    needs = {name: Footprint(outside=size << 30) for name, size in (("resident", 28), ("sharded", 9), ("streamed", 3))}
    assert advice(needs, room=32 << 30, activations=2 << 30) == ""
    both = advice(needs, room=24 << 30, activations=2 << 30)
    assert "30.06 GB per worker" in both and "has 25.77 GB" in both
    assert "Switch on FSDP (9.66 GB per worker) or FSDP_CPU_OFFLOAD (3.22 GB per worker)" in both
    assert "on FSDP_CPU_OFFLOAD" in advice(needs, room=8 << 30, activations=2 << 30)
    assert "Use more workers" in advice(needs, room=4 << 30, activations=2 << 30)


def test_nothing_to_divide_among() -> None:
    with pytest.raises(ConfigError, match="FSDP_CPU_OFFLOAD on"):
        ParallelConfig(world=2, ulysses=1, ring=1, cfg=2, residency="sharded")
    assert ParallelConfig(world=2, ulysses=1, ring=1, cfg=2, residency="streamed").sequence == 1
