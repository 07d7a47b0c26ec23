"""Mapped weights: every kind of file, patch and move beside ComfyUI's own loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.host.reports import reporter
from comfy_raylight.tests.weights import driver

TIMEOUT_S = 600
"""For all checks on one ComfyUI, which take a minute on two cores."""


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> Callable[[Path], dict[str, Any]]:
    """What the script says of each ComfyUI."""
    folder = tmp_path_factory.mktemp("weights")
    return reporter(driver.__file__, folder, lambda _: [tiny_wan], timeout=TIMEOUT_S)


@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.parametrize("name", driver.CHECKS)
def test_mapped_weights(results: Callable[[Path], dict[str, Any]], comfy_root: Path, name: str) -> None:
    result = results(comfy_root)[name]
    if "absent" in result:
        pytest.skip(result["absent"])
    assert "failed" not in result, result["failed"]
