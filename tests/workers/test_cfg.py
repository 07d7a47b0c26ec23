"""CFG parallelism on real pools: pictures beside plain ComfyUI's, and what each group did for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.reports import reporter
from comfy_raylight.tests.workers import cfg_driver
from comfy_raylight.tests.workers.cfg_checks import CHECKS
from comfy_raylight.tests.workers.cfg_facts import FACTS

TOLERANCE = 1e-5
TIMEOUT_S = 900
"""For everything on one ComfyUI, which takes a minute and a half on two cores."""
SETTINGS = ("wan:2", "unet:2", *(("wan:4",) if LARGE else ()))


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Mapping[str, Any]]:
    """What the script says of each ComfyUI."""
    folder = tmp_path_factory.mktemp("cfg")

    def settings(root: Path) -> list[str]:
        files = {family: folder / f"{family}.safetensors" for family in ("wan", "unet")}
        jobs = [Job(family=family, path=path) for family, path in files.items()]
        write(jobs, comfy_root=root, python=Path(sys.executable))
        given = [(setting.partition(":")[0], setting.partition(":")[2]) for setting in SETTINGS]
        return [f"{family}={files[family]}:{workers}" for family, workers in given]

    return reporter(cfg_driver.__file__, folder, settings, timeout=TIMEOUT_S)


def cases(table: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [f"{setting} {name}" for setting in SETTINGS for name, entry in table.items() if setting in entry[1]]


@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.parametrize("case", cases(CHECKS))
def test_equals_plain(results: Callable[[Path], Mapping[str, Any]], comfy_root: Path, case: str) -> None:
    result = results(comfy_root)[case]
    assert "plain" not in result, f"plain ComfyUI fails: {result['plain']}"
    assert "pool" not in result, f"the pool fails where plain ComfyUI does not: {result['pool']}"
    assert result["finite"], "the plain picture has values that are no numbers"
    assert result["difference"] <= TOLERANCE
    expected = CHECKS[case.partition(" ")[2]][2]
    assert not expected or tuple(result["calls"]) == expected, "the groups share the calls otherwise"
    assert result["afterwards"] == 0, f"afterwards the bare model differs by {result['afterwards']:.1e}"


@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.parametrize("case", cases(FACTS))
def test_fact(results: Callable[[Path], Mapping[str, Any]], comfy_root: Path, case: str) -> None:
    result = results(comfy_root)[case]
    assert "pool" not in result, result["pool"]
    assert result["afterwards"] == 0, f"afterwards the bare model differs by {result['afterwards']:.1e}"
