"""A model on the pool used as any MODEL: sampling, LoRA, hooks, patches, interrupts, memory, beside plain ComfyUI."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.dropin import driver
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.reports import reporter

TOLERANCE = 1e-5
EFFECT = 1e-3
"""A check whose picture is nearer than this to the one without shows nothing."""
TIMEOUT_S = 600
"""For all checks on one ComfyUI, which take half a minute on two cores."""


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> Callable[[Path], dict[str, Any]]:
    """What the script says of each ComfyUI."""
    folder = tmp_path_factory.mktemp("dropin")
    files = [tiny_wan, *(folder / f"wan-{seed}.safetensors" for seed in (1, 2))]

    def checkpoints(root: Path) -> list[Path]:
        jobs = [Job(family="wan", path=path, seed=seed) for seed, path in enumerate(files)]
        write(jobs, comfy_root=root, python=Path(sys.executable))
        return files

    return reporter(driver.__file__, folder, checkpoints, timeout=TIMEOUT_S)


@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.parametrize("name", driver.CHECKS)
def test_equals_plain(results: Callable[[Path], dict[str, Any]], comfy_root: Path, name: str) -> None:
    result = results(comfy_root)[name]
    if "absent" in result:
        pytest.skip(result["absent"])
    assert "plain" not in result, f"plain ComfyUI fails: {result['plain']}"
    assert "pool" not in result, f"the pool fails where plain ComfyUI does not: {result['pool']}"
    assert result["finite"], "the plain picture has values that are no numbers"
    effect = result.get("effect", float("inf"))
    assert effect > EFFECT, f"the check does nothing: its effect on the plain model is {effect:.1e}"
    apart = result["difference"]
    assert apart <= TOLERANCE, f"the pool's picture differs by {apart:.1e}, the effect itself is {effect:.1e}"
    assert result["afterwards"] == 0, f"afterwards the bare model differs by {result['afterwards']:.1e}"


@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.parametrize("name", driver.FACTS)
def test_fact(results: Callable[[Path], dict[str, Any]], comfy_root: Path, name: str) -> None:
    result = results(comfy_root)[name]
    if "absent" in result:
        pytest.skip(result["absent"])
    assert "pool" not in result, result["pool"]
    assert result["afterwards"] == 0, f"afterwards the bare model differs by {result['afterwards']:.1e}"
