"""ComfyUI's real model classes: P ranks give what one process gives, in every variant, and a wrong plan does not."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_raylight.patches.control import PLANS
from comfy_raylight.patches.registry import FAMILIES

from . import verdicts
from .case import Case
from .conftest import comfy_roots
from .families import CASES, controls
from .meshes import ALONE, meshes_of

pytestmark = pytest.mark.timeout(2000)  # the first test of a ComfyUI waits for all of its ranks

ROOTS = comfy_roots()
RUNS = [pytest.param(case, mesh, id=f"{case.name}-{mesh}") for case in CASES for mesh in meshes_of(case)]


def built(run_ranks: Any, root: str, case: Case) -> dict[str, Any]:
    """The report that has a case; the test is skipped where this ComfyUI does not have it."""
    report: dict[str, Any] = run_ranks(root)
    if case.name in report["absent"]:
        pytest.skip(f"this ComfyUI has no {case.needs}")
    assert case.name not in report["unbuilt"], report["unbuilt"][case.name]
    return report


def results(run_ranks: Any, root: str, case: Case, mesh: str) -> dict[str, Any]:
    """Modes of a case on the first rank, all having come through."""
    ranks = built(run_ranks, root, case)["ranks"][mesh]
    why = verdicts.broken(case, mesh, ranks)
    assert not why, why
    modes: dict[str, Any] = verdicts.tables_of(ranks)[0][case.name]
    return modes


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("case, mesh", RUNS)
def test_case(run_ranks: Any, root: str, case: Case, mesh: str) -> None:
    why = verdicts.wrong(case, mesh, built(run_ranks, root, case))
    assert not why, why


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("case, mesh", [run for run in RUNS if run.values[1] in verdicts.AGREEING])
def test_modes_agree(run_ranks: Any, root: str, case: Case, mesh: str) -> None:
    """The engine's own choice is the right granularity, and switches change no bit."""
    report = run_ranks(root)
    if case.name in report["unbuilt"] or case.name in report["absent"] or verdicts.wrong(case, mesh, report):
        pytest.skip("test_case says what there is to say of it")
    why = verdicts.apart(case, mesh, report)
    assert not why, why


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
    case = next(case for case in CASES if case.name == name)
    why = verdicts.wrong_alone(f"{name}-{kernel}", built(run_ranks, root, case)["alone"][f"{name}-{kernel}"])
    assert not why, why
