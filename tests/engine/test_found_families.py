"""Plans that are found for ComfyUI's real classes, written ones or none: P ranks give what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.reports import reporter

from . import unplanned
from .conftest import comfy_roots
from .found_ranks import SIZES, one_of_each

pytestmark = pytest.mark.timeout(3000)

FEW = ("joyimage_reference", "lens_masked", "mageflow", "boogu", "pixeldit", "triposplat", "flux", "qwen", "wan_vace")
"""Without RAYLIGHT_TEST_LARGE: each class that has no plan, and a few that have one."""
NAMES = one_of_each() if LARGE else FEW
HALF, CLOSE = 0.5, 4
TOLERANCE = 1e-6
LOOKED = "looks at tokens between two blocks (shape)"
"""Flux of old versions reads the length of its text between its two lists of blocks, which the workers do not trust."""
PARTS = {"pixeldit": "pixel_blocks", "triposplat": "repo_layers"}
"""What of a class is left whole, or asks for tokens to be whole between blocks."""


@pytest.fixture(scope="session")
def examined(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report of a ComfyUI, made once each."""
    folder = tmp_path_factory.mktemp("found")
    report = reporter("engine.found_ranks", folder, lambda root: NAMES, timeout=2900)
    return lambda root: report(Path(root))


@pytest.mark.parametrize("root", comfy_roots())
@pytest.mark.parametrize("name", NAMES)
def test_it_is_found_and_right(examined: Any, root: str, name: str) -> None:
    report = examined(root)
    if name in report["absent"]:
        pytest.skip("this ComfyUI does not have it")
    found = report["found"][name]
    assert "plan" in found, found
    assert found["error"] <= TOLERANCE
    for size in SIZES:
        for rank, results in report["ranks"][str(size)].items():
            assert isinstance(results, dict), f"rank {rank} of {size}: {results}"
            assert results[name]["same"] and results[name]["error"] <= TOLERANCE, results[name]
            assert results[name]["collectives"] > 0


@pytest.mark.parametrize("root", comfy_roots())
@pytest.mark.parametrize("name", NAMES)
def test_workers_share_it_and_are_right(examined: Any, root: str, name: str) -> None:
    """Without being told of its plan: found by the first, proved, and not computed whole."""
    report = examined(root)
    if name in report["absent"]:
        pytest.skip("this ComfyUI does not have it")
    for rank, results in report["ranks"][str(SIZES[0])].items():
        worker = results[name]["worker"]
        assert worker["error"] <= TOLERANCE, worker
        if any(LOOKED in line for line in worker["said"]):
            # then it is computed whole, which is right as well; this class has a written plan
            assert name == "flux", worker
            continue
        assert all(count > 0 for count in worker["shared"]), worker
        # each second call compares one block, which may cost no exchange
        assert all(second <= first for first, second in zip(*[iter(worker["shared"])] * 2, strict=True)), worker
        assert rank != "0" or all("was found and checked" in line for line in worker["said"]), worker


@pytest.mark.parametrize("root", comfy_roots())
@pytest.mark.parametrize("name", [case.name for case in unplanned.CASES if case.name in NAMES])
def test_most_of_a_step_is_divided(examined: Any, root: str, name: str) -> None:
    report = examined(root)
    if name in report["absent"]:
        pytest.skip("this ComfyUI does not have it")
    found = report["found"][name]
    _, share = unplanned.MODELS[found["family"]]
    # the README has it; cases differ in what they have beside their blocks
    assert found["share"] > HALF and abs(100 * found["share"] - share) < CLOSE
    assert all(PARTS.get(name, "-") in note for note in found["notes"]), found["notes"]


def test_classes_without_a_plan_have_none() -> None:
    """One that gets a written plan is no case for here."""
    from comfy_raylight.patches.registry import FAMILIES

    assert not {case.family for case in unplanned.CASES} & FAMILIES.keys()
    assert {case.family for case in unplanned.CASES} == unplanned.MODELS.keys()
