"""Weights divided over ranks, in every kind of file, patched, offloaded and cancelled, beside ComfyUI's own loading."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.conftest import comfy_roots
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.reports import reporter
from comfy_raylight.tests.weights import divided

TIMEOUT_S = 1500
"""For all checks on one ComfyUI."""
SIZES = {"wan": {"layers": 6, "dim": 128}, "few": {"layers": 2, "dim": 128}, "large": {"layers": 8, "dim": 512}}


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Any]]:
    """What the script says of each ComfyUI."""
    folder = tmp_path_factory.mktemp("divided-files")
    jobs = [Job(family="wan", path=folder / f"{name}.safetensors", size=size) for name, size in SIZES.items()]
    write(jobs, comfy_root=comfy_roots()[0], python=Path(sys.executable))
    reports = tmp_path_factory.mktemp("divided")
    return reporter(divided.__file__, reports, lambda _: [jobs[0].path], timeout=TIMEOUT_S)


@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.parametrize("name", divided.CHECKS)
def test_divided_weights(results: Callable[[Path], dict[str, Any]], comfy_root: Path, name: str) -> None:
    result = results(comfy_root)[name]
    if "absent" in result:
        pytest.skip(result["absent"])
    assert "failed" not in result, result["failed"]
