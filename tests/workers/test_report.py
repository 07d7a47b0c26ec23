"""What the report says of devices that are not here."""

from __future__ import annotations

import pytest
from comfy_raylight.workers.driver import chart
from comfy_raylight.workers.driver.group import Run, Traffic
from comfy_raylight.workers.driver.report import PoolReport, last_run, lines
from comfy_raylight.workers.wire.messages import WorkerReport

RUNS = [Run(steps=2, traffic=Traffic(calls=2, seconds=4.0, worker_seconds=3.6, collective_seconds=0.6))]


def report(*, timed: bool, predicted: float) -> PoolReport:
    worker = WorkerReport(
        rank=0, device="abacus", host_bytes=1, device_bytes=1, models=(), timed=timed, predicted=predicted
    )
    return PoolReport(
        comfyui="ComfyUI 0.0.1, made up",
        degrees={"ulysses": 2},
        links="",
        tested="",
        places=("here",),
        workers=(worker,),
        run=last_run(RUNS, 2, worker),
    )


def test_what_was_timed_is_told() -> None:
    text = "\n".join(lines(report(timed=True, predicted=1.5)))
    assert "2 steps, 2.000 s per step" in text
    assert "15% of it in exchanges between workers, 10% between ComfyUI and workers" in text
    assert "over one worker: 1.50 seen, 1.50 predicted" in text


@pytest.mark.parametrize(("predicted", "told"), [(1.5, "1.50 predicted"), (0.0, "no prediction")])
def test_what_overlaps_is_not_told_apart(predicted: float, told: str) -> None:
    """An accelerator computes and exchanges at once: what queueing takes would look like a perfect speed-up."""
    found = report(timed=False, predicted=predicted)
    text = "\n".join(lines(found))
    assert "2 steps, 2.000 s per step" in text
    assert "not timed on this device, 10% between ComfyUI and workers" in text
    assert f"over one worker: {told}" in text and "seen" not in text
    assert found.run is not None and found.run.computing == pytest.approx(1.8)


@pytest.mark.parametrize("timed", [True, False])
def test_each_has_a_chart(timed: bool) -> None:
    picture, bare = (chart.draw(report(timed=timed, predicted=gain)) for gain in (1.5, 0.0))
    assert picture.shape[1] > bare.shape[1], "a bar more"
