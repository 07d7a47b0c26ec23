"""What is sent is what must be sent: counted by the collectives, computed from the shapes."""

from __future__ import annotations

from typing import Any

import pytest

from . import row_bytes, verdicts
from .conftest import comfy_roots
from .families import even
from .meshes import MESHES
from .test_parity import results

pytestmark = pytest.mark.timeout(2000)  # it may be the first to want the ranks' results
DIVIDING = ("u2", "r2", "u2r2", "u8", "u4r2")
"""Meshes over which 8 heads and the tokens of these cases divide evenly."""


@pytest.mark.parametrize("root", comfy_roots())
@pytest.mark.parametrize("mesh", DIVIDING)
@pytest.mark.parametrize("case", even.CASES, ids=lambda case: case.name)
def test_attention_sends_the_least(run_ranks: Any, root: str, case: Any, mesh: str) -> None:
    """Ulysses and ring traffic is the closed form, so cross-attention to replicated text moves nothing."""
    for mode, result in results(run_ranks, root, case, mesh).items():
        sent = result["sent"].get("all_to_all", 0) + result["sent"].get("ring", 0)
        assert sent == result["least"]["attention"], mode


@pytest.mark.parametrize("root", comfy_roots())
@pytest.mark.parametrize("mesh", DIVIDING)
def test_leaving_after_the_head_joins_its_output(run_ranks: Any, root: str, mesh: str) -> None:
    """Wan's head has 16 channels per token where the tokens have 96: six times less to join."""
    modes = results(run_ranks, root, even.CASES[0], mesh)
    exits = {mode: result["sent"].get("all_gather", 0) for mode, result in modes.items()}
    assert exits["trunk"] == modes["trunk"]["least"]["exit"] * 16 / 96
    if "block" in exits:
        blocks = 4
        assert exits["block"] == blocks * modes["block"]["least"]["exit"]


@pytest.mark.parametrize("root", comfy_roots())
@pytest.mark.parametrize("size", row_bytes.SIZES)
@pytest.mark.parametrize("model", row_bytes.MODELS)
def test_rows_send_the_least(run_ranks: Any, root: str, model: str, size: int) -> None:
    """A row per convolution and neighbour, two numbers per group of a norm, and what attention needs."""
    why = verdicts.wrong_rows(run_ranks(root)["rows"][model][str(size)])
    assert not why, why


def test_every_degree_is_counted() -> None:
    assert {ulysses * ring for ulysses, ring in (MESHES[name] for name in DIVIDING)} == {2, 4, 8}
