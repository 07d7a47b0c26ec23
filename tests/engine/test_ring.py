"""Attention over ring and Ulysses ranks equals attention over the whole: tables that `ring_cases` fills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_raylight.raylight.sequence.ring import merge
from comfy_raylight.tests.host.reports import reporter

from .ring_cases import GRIDS, LIMITS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every rank of every grid found."""
    return reporter("engine.ring_cases", tmp_path_factory.mktemp("ring"), timeout=500)(None)


@pytest.mark.parametrize("name", [*(f"{u}x{r}" for u, r in GRIDS), "2x2 twice"])
def test_grid(found: dict[str, Any], name: str) -> None:
    for rank, numbers in found[name].items():
        assert isinstance(numbers, dict), numbers
        for what, number in numbers.items():
            least, most = LIMITS[what.split()[0]]
            assert least <= number <= most, (rank, what, number)
    first = next(iter(found[name].values()))
    ring = not name.endswith("x1") and "twice" not in name
    assert any(what.startswith("error") for what in first)
    assert ("wrong merge by plain averages" in first) == ring


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_as_good_as_one_process(found: dict[str, Any], dtype: torch.dtype) -> None:
    for u, r in GRIDS:
        numbers = found[f"{u}x{r}"]["0"]
        # each block is rounded once, and so is their sum
        assert numbers[f"half {dtype}"] <= numbers[f"half plain {dtype}"] * (1.0 if r == 1 else 1.5)


def part(scores: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


def test_merged_parts_are_the_whole() -> None:
    scores, v = torch.randn(2, 3, 5, 12) * 20, torch.randn(2, 3, 12, 4)
    whole, lse = part(scores, v)
    total = None
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        total = merge(total, part(scores[..., start:stop], v[:, :, start:stop]))
    assert total is not None
    assert torch.allclose(total[0], whole, atol=1e-5) and torch.allclose(total[1], lse, atol=1e-5)


@pytest.mark.parametrize("first", (True, False))
def test_a_part_without_keys_changes_nothing(first: bool) -> None:
    scores, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4, 5)
    some = part(scores, v)
    none = (torch.zeros(1, 2, 3, 5), torch.full((1, 2, 3), -torch.inf))
    out, lse = merge(none, some) if first else merge((some[0].clone(), some[1]), none)
    assert torch.equal(out, some[0]) and torch.equal(lse, some[1])
