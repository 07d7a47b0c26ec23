"""What is told of a forward before it runs: each family against what its blocks get, SDXL against known numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.host.reports import reporter

from .conftest import comfy_roots

BOUNDS = (0.4, 1.6)
"""Told over true. The pictures of these cases are so small that texts which are not told of are as long."""


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    report = reporter("engine.sizes", tmp_path_factory.mktemp("sizes"), timeout=600)
    return lambda root: report(Path(root))


@pytest.mark.parametrize("root", comfy_roots())
def test_tokens_of_every_family(told: Callable[[str], dict[str, Any]], root: str) -> None:
    found = told(root)["cases"]
    families: dict[str, str] = {}
    for name, case in found.items():
        families.setdefault(case["family"], name)
    assert len(families) >= 25
    off = {}
    for family, name in families.items():
        case = found[name]
        assert "failed" not in case, (family, case)
        ratios = [told / true for told, true in case["tokens"] if true]
        if not ratios or not all(BOUNDS[0] <= ratio <= BOUNDS[1] for ratio in ratios):
            off[family] = case["tokens"]
    assert off == {}


@pytest.mark.parametrize("root", comfy_roots())
def test_a_known_unet(told: Callable[[str], dict[str, Any]], root: str) -> None:
    """SDXL at 1024 x 1024: docs/scaling.md has what two workers send, and that it is 70 attentions."""
    sdxl = told(root)["sdxl"]
    assert sdxl["attentions"] == 70
    assert sdxl["sent"] == pytest.approx(210e6, rel=0.01)
    # 6 TFLOP for a row, as published
    assert 4.5e12 < sdxl["flops"] < 7.5e12
    assert sdxl["most"] == 32
