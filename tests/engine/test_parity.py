"""ComfyUI's real model classes: P ranks give what one process gives, in every variant, and a wrong plan does not."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_raylight.patches.control import PLANS
from comfy_raylight.patches.registry import FAMILIES

from .case import TOLERANCE
from .conftest import comfy_roots
from .families import CASES, controls
from .ranks import ALONE, MESHES, Case, meshes_of

pytestmark = pytest.mark.timeout(2000)  # the first test of a ComfyUI waits for all of its ranks

ROOTS = comfy_roots()
RUNS = [pytest.param(case, mesh, id=f"{case.name}-{mesh}") for case in CASES for mesh in meshes_of(case)]


def results(run_ranks: Any, root: str, case: Case, mesh: str) -> dict[str, Any]:
    """Modes of a case on rank 0, all ranks having finished."""
    ranks = run_ranks(root)["ranks"][mesh]
    for table in ranks.values():
        assert isinstance(table, dict), table
    if case.name not in ranks["0"]:
        pytest.skip(f"this ComfyUI has no {case.needs}")
    for table in ranks.values():
        for mode, result in table[case.name].items():
            assert result["collectives"] == ranks["0"][case.name][mode]["collectives"]
    return ranks["0"][case.name]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("case, mesh", RUNS)
def test_case(run_ranks: Any, root: str, case: Case, mesh: str) -> None:
    modes = results(run_ranks, root, case, mesh)
    ulysses, ring = MESHES[mesh]
    assert list(modes) == case.modes_on(mesh, ulysses * ring)
    raises = case.raises or (case.ring_raises if ring > 1 else "")
    tolerance = case.rounded * run_ranks(root)["noise"][case.name] if case.half else case.tolerance
    for mode, result in modes.items():
        if raises:
            assert result["raised"] == raises, (mode, result)
            assert result["clean"] <= case.tolerance, (mode, result)
        elif case.wrong:
            assert (case.loud and "raised" in result) or result["error"] > 10 * case.tolerance, (mode, result)
        else:
            assert result["error"] <= tolerance, (mode, result)
            assert result["same"], (mode, "ranks returned different bytes")


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("case, mesh", [run for run in RUNS if run.values[1] in ("u2", "u3", "u2r2")])
def test_modes_agree(run_ranks: Any, root: str, case: Case, mesh: str) -> None:
    """The engine's own choice is the right granularity, and switches change no bit."""
    modes = results(run_ranks, root, case, mesh)
    expected = "trunk" if "trunk" in case.modes else "block"
    if expected not in modes or case.raises or "raised" in modes[expected]:
        return
    for mode in {"auto", "turns", "synced", "wrapped"} & set(modes):
        assert modes[mode]["bytes"] == modes[expected]["bytes"], mode
    for mode in {"auto", "synced", "wrapped"} & set(modes):
        assert modes[mode]["collectives"] == modes[expected]["collectives"], mode


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("case", [case for case in controls.CASES if not case.meshes], ids=lambda case: case.name)
def test_ranks_share_controls(run_ranks: Any, root: str, case: Case) -> None:
    (result,) = results(run_ranks, root, case, "u2").values()
    assert result["sent"]["all_to_all"] > 0


def test_every_family_has_a_case() -> None:
    """A plan without the comparison that would show it wrong is not a feature."""
    compared = {case.family for case in CASES if not (case.wrong or case.raises)}
    assert compared == {*FAMILIES, *(path.rpartition(".")[2] for path in PLANS)}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name, kernel", [(name, kernel) for name, kernels in ALONE.items() for kernel in kernels])
def test_one_process(run_ranks: Any, root: str, name: str, kernel: str) -> None:
    error = run_ranks(root)["alone"][f"{name}-{kernel}"]
    assert error == 0 if kernel == "TORCH" else error <= TOLERANCE
