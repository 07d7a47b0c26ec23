"""What there is to say of a pool: its workers, what they hold, and how the last run went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...raylight.config import WorkerSettings
from ..wire import rates, standing
from ..wire.messages import ModelReport, WorkerReport
from .group import Run

if TYPE_CHECKING:
    from .model_rpc import ModelRpc

LAST_REPORT = "report"
"""Key of a pool's notes: when it was last reported on, in seconds since the epoch, and the report."""


@dataclass(frozen=True, kw_only=True)
class LastRun:
    """The last sampling run, in seconds per noise level that the model was called at ("step").

    Attributes:
        steps: how many there were.
        computing: of a step, in the workers beside exchanges with each other.
        exchanging: of a step, in collectives, waiting for each other included; None where that is not known, and part
            of `computing`.
        driver: of a step, between ComfyUI's process and the workers.
        seen: speed-up: what all workers computed, one after another, over what the model calls took; 0 where
            computing is not known.
        predicted: speed-up by raylight.cost; 0 where it cannot say.
    """

    steps: int
    computing: float
    exchanging: float | None
    driver: float
    seen: float
    predicted: float

    @property
    def step(self) -> float:
        """Seconds of a step in model calls."""
        return self.computing + (self.exchanging or 0.0) + self.driver


@dataclass(frozen=True, kw_only=True)
class PoolReport:
    """A pool as it is now.

    `workers` is empty where none runs, `run` is None before the first; `chosen` says how it was shared and why, where
    that was chosen.
    """

    comfyui: str
    degrees: dict[str, int]
    links: str
    tested: str
    places: tuple[str, ...] = ()
    workers: tuple[WorkerReport, ...] = ()
    run: LastRun | None = None
    chosen: str = ""


def collect(rpc: ModelRpc) -> PoolReport:
    """Ask the workers of a model's pool; no pool is started for it.

    Raises:
        WorkerError: a worker died or stopped.
    """
    pool, parallel = rpc.live_pool(), rpc.config.parallel
    if pool is None:
        return PoolReport(comfyui=standing.line(), degrees=parallel.degrees, links="", tested="", chosen=rpc.place.told)
    first = rpc.replica * (parallel.world // parallel.degrees["dp"])
    workers = tuple(rpc.lanes().call_groups("report", [(range(parallel.world), ())])[0])
    report = PoolReport(
        comfyui=standing.line(),
        degrees=parallel.degrees,
        links=pool.topology(),
        tested=pool.links or (rates.described(pool.machine) if pool.machine is not None else ""),
        places=tuple(f"process {member.place.pid} on {member.place.host}" for member in pool.members),
        workers=workers,
        run=last_run(rpc.last_runs(), parallel.sequence, workers[first]),
        chosen=rpc.place.told,
    )
    pool.notes[LAST_REPORT] = (time.time(), report)
    return report


def last_run(runs: Sequence[Run], sequence: int, worker: WorkerReport) -> LastRun | None:
    """The run as one: its cfg groups worked at the same time.

    Args:
        sequence: workers of each group.
        worker: one of them.
    """
    busy = [run.traffic for run in runs if run.traffic.calls]
    steps = max((run.steps for run in runs), default=0)
    if not busy or not steps:
        return None
    longest = max(busy, key=lambda traffic: traffic.seconds)
    exchanged = longest.collective_seconds if worker.timed else None
    computed = sum(traffic.worker_seconds - traffic.collective_seconds for traffic in busy) * sequence
    return LastRun(
        steps=steps,
        computing=(longest.worker_seconds - (exchanged or 0.0)) / steps,
        exchanging=None if exchanged is None else exchanged / steps,
        driver=(longest.seconds - longest.worker_seconds) / steps,
        seen=computed / longest.seconds if worker.timed else 0.0,
        predicted=worker.predicted * len(busy),
    )


def lines(report: PoolReport) -> list[str]:
    """The report as text."""
    degrees = " x ".join(f"{name} {count}" for name, count in report.degrees.items() if count > 1) or "one worker"
    chosen = [f"Chosen: {report.chosen}"] if report.chosen else []
    if not report.workers:
        nobody = "No worker is running. The next prompt that needs them starts them."
        return [report.comfyui, f"Pool: {degrees}", *chosen, nobody]
    found = [report.comfyui, f"Pool: {len(report.workers)} workers, {degrees}", f"Links: {report.links}"]
    found += chosen
    found.append(f"Link test: {report.tested or 'not run, skip_comm_test is on'}")
    for place, worker in zip(report.places, report.workers, strict=True):
        memory = f"{mib(worker.host_bytes)} of the host for itself"
        if worker.device_bytes:
            memory += f", {mib(worker.device_bytes)} of the device"
        found += ["", f"Worker {worker.rank}: {worker.device}, {place}", f"  {memory}"]
        for model in worker.models:
            found += [f"  {_model(model)}", f"    {model.weights}"]
        if not worker.models:
            found.append("  no model")
    run = report.run
    if run is None:
        return [*found, "", "Last run: none yet"]
    exchanges = "exchanges between workers are not timed on this device"
    if run.exchanging is not None:
        exchanges = f"{run.exchanging / run.step:.0%} of it in exchanges between workers"
    seen = f"{run.seen:.2f} seen, " if run.seen else ""
    predicted = f"{run.predicted:.2f} predicted" if run.predicted else "no prediction for this model or device"
    return [
        *found,
        "",
        f"Last run: {run.steps} steps, {run.step:.3f} s per step in the model",
        f"  {exchanges}, {run.driver / run.step:.0%} between ComfyUI and workers",
        f"  speed-up over one worker: {seen}{predicted}",
    ]


def mib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _model(model: ModelReport) -> str:
    changes = [f"{model.patches} patches"] if model.patches else []
    for name, default in vars(WorkerSettings()).items():
        value = getattr(model.settings, name)
        if value != default:
            changes.append(f"{name} {value}")
    if model.warnings:
        changes.append(f"{model.warnings} warnings of ComfyUI's code (in the log)")
    if model.plan:
        changes.append(model.plan)
    if model.recorded:
        changes.append(f"{model.recorded} recorded calls")
    made = f", with {', '.join(changes)}" if changes else ""
    return f"{Path(model.path).name} ({model.family}): {mib(model.resident)} of {mib(model.size)} on the device{made}"
