"""Workers that are not equally fast: what is read, what is measured, and what each gets."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from comfy_raylight.raylight.errors import ConfigError
from comfy_raylight.raylight.layout import dealt, share
from comfy_raylight.workers.pool import speeds
from comfy_raylight.workers.wire.messages import WorkerPlace
from comfy_raylight.workers.wire.rates import Rates

PLACE = WorkerPlace(rank=0, pid=1, node="", host="", device="cuda:0", device_name="one kind", start_seconds=0)


def rates(linear: float, attention: float) -> Rates:
    return Rates(linear=linear, attention=attention, links={})


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,zero", "1,0", "1,-2", "nan,1", "1,inf", ","])
def test_no_list_of_speeds_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(speeds.VARIABLE, text)
    with pytest.raises(ConfigError, match="RAYLIGHT_SPEEDS is not a list of speeds.*2 workers"):
        speeds.asked(2)


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(speeds.VARIABLE, raising=False)
    assert speeds.asked(2) == ()
    monkeypatch.setenv(speeds.VARIABLE, "1, 0.5")
    assert speeds.asked(2) == (1.0, 0.5)
    assert speeds.asked(1) == ()
    monkeypatch.setenv(speeds.VARIABLE, "3,3")
    assert speeds.asked(2) == ()


def test_devices_of_several_kinds_are_measured() -> None:
    other = replace(PLACE, rank=1, device_name="another kind")
    assert speeds.differ([PLACE, other]) and not speeds.differ([PLACE, replace(PLACE, rank=1)])


def test_speeds_are_beside_the_fastest() -> None:
    assert speeds.measured([rates(2e14, 1e14), rates(1e14, 5e13)]) == (1.0, 0.5)
    # half as fast in one half of a call
    assert speeds.measured([rates(1e14, 1e14), rates(1e14, 5e13)]) == (1.0, 0.67)
    assert speeds.measured([rates(1.00e14, 1e14), rates(1.05e14, 1e14)]) == ()
    assert speeds.described((1.0, 0.5)) == "1 : 0.5"


def test_parts_are_in_proportion() -> None:
    assert dealt(30, (2.0, 1.0)) == (20, 10)
    assert dealt(24, (1.0, 0.5, 0.5)) == (12, 6, 6)
    assert dealt(3, (1.0, 10.0)) == (0, 3) and dealt(3, (1.0, 10.0), least=1) == (1, 2)
    assert dealt(3, (1.0, 100.0, 1.0), least=1) == (1, 1, 1)


def test_parts_are_whole_and_as_near_as_can_be() -> None:
    chosen = random.Random(1)
    for _ in range(500):
        size = chosen.randint(1, 8)
        total, least = chosen.randint(size, 5000), chosen.choice((0, 1))
        given = tuple(chosen.uniform(0.1, 4) for _ in range(size))
        parts = dealt(total, given, least=least)
        assert sum(parts) == total and min(parts) >= least
        if min(parts) > least:
            wanted = [total * speed / sum(given) for speed in given]
            assert all(abs(part - ideal) <= size for part, ideal in zip(parts, wanted, strict=True))
        spans = [share(total, rank=rank, size=size) for rank in range(size)]
        assert dealt(total, (1.0,) * size, least=least) == tuple(stop - start for start, stop in spans)
