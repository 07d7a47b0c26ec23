"""What goes wrong on some ranks stays one wrong part: the others are run, and nobody waits for one that is gone."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_raylight.tests.host.reports import reporter

from . import unsteady, verdicts
from .conftest import TIMEOUT_S, comfy_roots

pytestmark = pytest.mark.timeout(TIMEOUT_S)


@pytest.fixture(scope="module", params=comfy_roots())
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of `unsteady`, which is to end as what has wrong cases ends."""
    folder = tmp_path_factory.mktemp("unsteady")
    return reporter("engine.unsteady", folder, timeout=TIMEOUT_S, codes=(1,))(request.param)


def test_ranks_stay_in_step(report: dict[str, Any]) -> None:
    ranks = dict(report["steps"])
    assert ranks.pop("1") == "rank 1 ended with code -9"
    assert list(ranks) == ["0", "2"]
    for found in ranks.values():
        for name in ("all well", "after it", "after them", "after that"):
            assert found[name] == [{"sum": 3.0}, True], name
        result, well = found["one raises"]
        assert not well and "onnection closed" in result["text"], "it waited until the collective timed out"
        result, well = found["all raise"]
        assert not well and result["raised"] == "ValueError" and "raise ValueError" in result["broke"]
        assert found["counts"] == [{}, False]
        assert "out of step: another rank" in found["killed"][0]["broke"]
        result, well = found["after all"]
        assert not well and result["lost"] and "not run" in result["broke"]


def test_a_case_that_goes_wrong_is_one_wrong_case(report: dict[str, Any]) -> None:
    found = verdicts.summary(unsteady.CASES, report)
    assert list(found.unbuilt) == ["unbuilt"] and "nobody_knows_this" in found.unbuilt["unbuilt"]
    assert list(found.absent) == ["absent"]
    assert list(found.right) == ["right"]
    assert found.wrong["last_rank"] == f"{', '.join(unsteady.ON)}: ValueError: on the last rank alone"
    assert found.wrong["every_rank"] == f"{', '.join(unsteady.ON)}: ValueError: on every rank"
    assert "differs by" in found.wrong["differs"]
    # one of three ranks dies, and what comes later cannot be run on three
    assert found.wrong["dies"] == "u3: rank 1 ended with code 9"
    assert found.wrong["after"].startswith("u3: ") and "u2" not in found.wrong["after"]
    why = verdicts.wrong(unsteady.CASES[-1], "u3", report)
    assert "not run, since the ranks got out of step before" in why
    assert found.text().startswith("right: 1\n  right\nwrong: 5\n")
