"""Rows of a picture that a model halves: strips, the rules on them, and who shares what."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfy_raylight.raylight.errors import UnsupportedError
from comfy_raylight.raylight.layout import Layout, Segment
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.rows.row_hooks import ranks_for
from comfy_raylight.raylight.rows.row_rules import RowParallel
from comfy_raylight.raylight.rows.strips import Rows, Strips

from .case import Case
from .conftest import comfy_roots
from .families import unet
from .test_parity import results


def halved(rows: int, times: int) -> int:
    for _ in range(times):
        rows = (rows + 1) // 2
    return rows


@pytest.mark.parametrize("halvings", range(4))
def test_strips_of_every_level_are_the_whole(halvings: int) -> None:
    for total in range(1, 70):
        most = Strips.most(total, halvings=halvings)
        for ranks in range(1, most + 1):
            strips = [Strips.of(total, ranks=ranks, rank=rank, halvings=halvings) for rank in range(ranks)]
            sizes = strips[0].sizes
            assert sum(sizes) == total and all(size % 2**halvings == 0 for size in sizes[:-1])
            for level in range(halvings + 1):
                whole = torch.arange(halved(total, level))[:, None]
                parts = [strip.own(whole) for strip in strips]
                assert torch.equal(torch.cat(parts), whole)
                for strip, part in zip(strips, parts, strict=True):
                    if ranks > 1:
                        assert strip.heights(len(part)) == tuple(map(len, parts))
                        assert strip.least(len(part)) == min(map(len, parts))


def test_a_short_rest_is_no_strip() -> None:
    """Else one row could be that of several levels."""
    assert Strips.of(36, ranks=4, rank=0, halvings=3).sizes == (8, 8, 8, 12)
    assert Strips.of(37, ranks=5, rank=0, halvings=3).sizes == (8, 8, 8, 8, 5)
    assert Strips.of(32, ranks=3, rank=0, halvings=3).sizes == (16, 8, 8)


def test_rows_of_no_level_are_refused() -> None:
    strips = Strips.of(32, ranks=2, rank=0, halvings=3)
    for rows in (3, 5, 12, 17):
        with pytest.raises(UnsupportedError):
            strips.heights(rows)
    with pytest.raises(UnsupportedError):
        strips.own(torch.zeros(1, 1, 7, 3))


def test_a_picture_is_shared_by_as_many_as_it_has_strips_for() -> None:
    assert [ranks_for(rows, halvings=3, size=8) for rows in (128, 64, 61, 60, 32, 13, 12, 1)] == [
        8,
        8,
        8,
        4,
        4,
        2,
        1,
        1,
    ]
    assert [ranks_for(rows, halvings=3, size=3) for rows in (24, 21, 20)] == [3, 3, 1]


def test_shares_that_are_not_even() -> None:
    layouts = [Layout(segments=(Segment("x", 7, shares=(4, 1, 2)),), rank=rank, size=3) for rank in range(3)]
    x = torch.arange(7)
    parts = [layout.split(x, dim=0, over=("x",)) for layout in layouts]
    assert [len(part) for part in parts] == [4, 1, 2] and torch.equal(torch.cat(parts), x)
    assert torch.equal(layouts[1].join(parts, dim=0, over=("x",)), x)
    assert not Layout(segments=(Segment("x", 2, shares=(1, 1)),), rank=0, size=2).replicated("x")


CONTROLS = [case for case in unet.CASES if case.wrong]


@pytest.mark.timeout(2000)  # it may be the first to want the ranks' results
@pytest.mark.parametrize("root", comfy_roots())
@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_the_self_test_measures_what_a_missing_rule_does(run_ranks: Any, root: str, case: Case) -> None:
    (result,) = results(run_ranks, root, case, "u2").values()
    found = re.search(r"UNetModel gives another result .* differs by (\S+) of its largest value", result["text"])
    assert found and float(found[1]) > 0.1


X = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(1))
RULES = {
    "strided": lambda: F.conv2d(X, torch.ones(2, 4, 3, 3), stride=2, padding=1),
    "to one row less": lambda: F.interpolate(F.conv2d(X, torch.ones(2, 4, 3, 3), stride=2, padding=1), size=(5, 6)),
}
REFUSED = {
    "other size": lambda: F.interpolate(X, size=(10, 12)),
    "by a factor": lambda: F.interpolate(X, scale_factor=2.0),
    "strided, rounding down": lambda: F.conv2d(X, torch.ones(2, 4, 4, 4), stride=2, padding=1),
    "patch means of odd rows": lambda: F.avg_pool2d(X, 2),
    "spectrum": lambda: torch.fft.fft2(X),
}


def mode() -> RowParallel:
    strips = Strips.of(5, ranks=1, rank=0, halvings=1)
    return RowParallel(Rows(Mesh.single().axis("world"), strips, model="This UNet", remedy="Use one"))


@pytest.mark.parametrize("call", RULES.values(), ids=RULES)
def test_rules_of_odd_rows(call: Callable[[], torch.Tensor]) -> None:
    expected = call()
    with mode():
        found = call()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refused_by_name(call: Callable[[], torch.Tensor]) -> None:
    call()
    rules = mode()
    with pytest.raises(UnsupportedError, match="This UNet calls .* by rows.*Use one"), rules:
        call()
    with rules, rules.suspended():
        call()
