"""Strips equal the undivided result for ComfyUI's own VAE classes, and tiles have the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.host.large import LARGE

from .conftest import Table
from .families import FAMILIES, LOCAL, NOISY, TALL, TILED

CLOSE = 1e-5
FAR = 0.1
"""What strips without exchanges are off by, at least."""
SIZES = ("1", "2", "3", "5")
OnRanks = Callable[[Path], Table]


def checks(table: Table, part: str, name: str) -> Iterator[tuple[str, str, Any]]:
    """Every result of a family: number of ranks with the rank, check, value."""
    for size, ranks in table[part].items():
        for rank, found in ranks.items():
            assert isinstance(found, dict), f"rank {rank} of {size}:\n{found}"
            for check, value in found.items():
                family, _, what = check.partition(", ") if check.startswith(f"{name}, ") else ("", "", "")
                if family or what:
                    yield f"{rank} of {size}", check.removeprefix(f"{name}, "), value


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.every or LARGE])
def test_strips_equal_the_whole(on_ranks: OnRanks, comfy_root: Path, name: str) -> None:
    found = list(checks(on_ranks(comfy_root), "strips", name))
    if not found:
        assert next(family for family in FAMILIES if family.name == name).newer
        pytest.skip("this ComfyUI has no such VAE")
    errors = {(where, check): value for where, check, value in found if check.endswith(" rows")}
    assert {where.split()[-1] for where, _ in errors} == set(SIZES)
    assert max(errors.values()) <= CLOSE, errors
    alone = [value for _, check, value in found if check == "without exchanges"]
    assert alone and (max(alone) > FAR or name in LOCAL), "a comparison that cannot fail would also pass here"
    assert all(value for _, check, value in found if check == "as before")


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_exchange_alike(on_ranks: OnRanks, comfy_root: Path, size: str) -> None:
    """Equal counts tell the driver that nobody waits for anybody."""
    ranks = list(on_ranks(comfy_root)["strips"][size].values())
    counts = [{check: value for check, value in rank.items() if check.endswith("collectives")} for rank in ranks]
    assert counts[0] and all(count == counts[0] for count in counts)
    assert len({rank["collectives"] for rank in on_ranks(comfy_root)["tiles"][size].values()}) == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [family.name for family in FAMILIES] if LARGE else TILED)
def test_tiles_have_the_same_bits(on_ranks: OnRanks, comfy_root: Path, name: str, size: str) -> None:
    ranks = on_ranks(comfy_root)["tiles"][size]
    first = ranks["0"]
    assert isinstance(first, dict), first
    if f"{name}, owners" not in first:
        assert next(family for family in FAMILIES if family.name == name).newer
        pytest.skip("this ComfyUI has no such VAE")
    assert first[f"{name}, same bits"] is True
    assert [rank[f"{name}, drew"] for rank in ranks.values()] == [name in NOISY] * int(size)
    owners = first[f"{name}, owners"]
    assert set(owners) == set(range(int(size))), "every rank decodes some tile"
    told = first[f"{name}, told"]
    assert told == sorted(told) and len(owners) - int(size) <= told[-1] <= len(owners)


def test_a_rank_needs_its_part(on_ranks: OnRanks, comfy_root: Path) -> None:
    """Of the memory: its rows, a neighbour's beside them, and one activation twice while those are put together."""
    peaks = {int(size): max(ranks.values()) for size, ranks in on_ranks(comfy_root)["memory"].items()}
    assert set(peaks) == set(map(int, SIZES)) and peaks[1] > 10e6
    for size, peak in peaks.items():
        part = -(-TALL[-2] // size) / TALL[-2]
        assert peak <= (1.2 if size > 1 else 1) * part * peaks[1], f"{peak / peaks[1]:.2f} of one rank's on {size}"
