"""ComfyUI's real model classes: P ranks give what one process gives, in every variant, and a wrong plan does not."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import ALONE, CASES, Case
from .conftest import comfy_roots
from .ranks import RANKS

TOLERANCE = 1e-6
"""Maximum error relative to the maximum of the output, float32."""

ROOTS = comfy_roots()
RUNS = [pytest.param(case, size, id=f"{case.name}-{size}") for case in CASES for size in RANKS if size in case.ranks]


def results(run_ranks: Any, root: str, case: Case, size: int) -> dict[str, Any]:
    """Modes of a case on rank 0, all ranks having finished."""
    ranks = run_ranks(root)["ranks"][str(size)]
    for table in ranks.values():
        assert isinstance(table, dict), table
    if case.name not in ranks["0"]:
        pytest.skip(f"this ComfyUI has no {case.needs}")
    for rank in range(size):
        for mode, result in ranks[str(rank)][case.name].items():
            assert result["collectives"] == ranks["0"][case.name][mode]["collectives"]
    return ranks["0"][case.name]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("case, size", RUNS)
def test_case(run_ranks: Any, root: str, case: Case, size: int) -> None:
    modes = results(run_ranks, root, case, size)
    assert list(modes) == case.modes_on(size)
    for mode, result in modes.items():
        if case.raises:
            assert result["raised"] == case.raises, (mode, result)
            assert result["clean"] <= TOLERANCE, (mode, result)
        elif case.wrong:
            assert result.get("error", 1.0) > 10 * TOLERANCE, (mode, result)
        else:
            assert result["error"] <= TOLERANCE, (mode, result)
            assert result["same"], (mode, "ranks returned different bytes")


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("case, size", RUNS)
def test_modes_agree(run_ranks: Any, root: str, case: Case, size: int) -> None:
    """The engine's own choice is the right granularity, and switches change no bit."""
    modes = results(run_ranks, root, case, size)
    expected = "trunk" if "trunk" in case.modes else "block"
    for mode in {"auto", "packed", "synced", "wrapped"} & set(modes):
        assert modes[mode]["bytes"] == modes[expected]["bytes"], mode
    for mode in {"auto", "synced", "wrapped"} & set(modes):
        assert modes[mode]["collectives"] == modes[expected]["collectives"], mode
    if "packed" in modes:
        assert modes["packed"]["collectives"] <= modes[expected]["collectives"]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name, kernel", [(name, kernel) for name, kernels in ALONE.items() for kernel in kernels])
def test_one_process(run_ranks: Any, root: str, name: str, kernel: str) -> None:
    error = run_ranks(root)["alone"][f"{name}-{kernel}"]
    assert error == 0 if kernel == "TORCH" else error <= TOLERANCE
