"""Mapped weights: every kind of file, patch and move beside ComfyUI's own loading."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.weights import driver

TIMEOUT_S = 600
"""For all checks on one ComfyUI, which take a minute on two cores."""


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> Callable[[Path], dict[str, Any]]:
    """Runs the script once per ComfyUI, also where it ends badly."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def run(root: Path) -> dict[str, Any] | str:
        out = folder / f"{len(list(folder.iterdir()))}.json"
        log = out.with_suffix(".log")
        with log.open("wb") as file:
            command = [sys.executable, driver.__file__, str(root), str(out), str(tiny_wan)]
            code = subprocess.run(command, stdout=file, stderr=file, timeout=TIMEOUT_S, check=False).returncode
        if code:
            return f"the driver ended with {code}:\n{log.read_text(errors='replace')[-4000:]}"
        report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return report

    def results_of(root: Path) -> dict[str, Any]:
        report = run(root)
        if isinstance(report, str):
            pytest.fail(report)
        return report

    return results_of


@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.parametrize("name", driver.CHECKS)
def test_mapped_weights(results: Callable[[Path], dict[str, Any]], comfy_root: Path, name: str) -> None:
    result = results(comfy_root)[name]
    if "absent" in result:
        pytest.skip(result["absent"])
    assert "failed" not in result, result["failed"]
