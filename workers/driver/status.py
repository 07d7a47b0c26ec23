"""The pool as a machine reads it: what this process knows. No worker is asked, no lock taken, nothing waited for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from pathlib import Path
from typing import Any

from ..pool import processes
from ..pool.crew import Member
from ..pool.history import TRIES, WITHIN_S
from ..pool.pool import HISTORY, REGISTRY, Pool
from .groups import Groups
from .report import LAST_REPORT

ABOUT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def now() -> dict[str, Any]:
    """State, last fault, restarts, versions, and the pool that runs, as JSON has them.

    `state` is "none" (the next prompt that needs workers starts them), "starting", "ready", "working", "ended" (a
    worker is gone, and the next prompt starts a new pool), or "waiting" (too many starts have failed).
    """
    pool = next(iter(list(REGISTRY.values())), None)
    members = list(pool.members) if pool is not None else []
    workers = [_worker(member) for member in members]
    fault = HISTORY.fault
    return {
        "state": _state(workers),
        "versions": _versions(),
        "restarts": HISTORY.restarts,
        "last_fault": dataclasses.asdict(fault) if fault is not None else None,
        "tries": {"most": TRIES, "within_s": WITHIN_S, "waits_for_a_change": HISTORY.waiting},
        "pool": _pool(pool, workers) if pool is not None else None,
    }


def _state(workers: list[dict[str, Any]]) -> str:
    if HISTORY.starting:
        return "starting"
    if not workers:
        return "waiting" if HISTORY.waiting else "none"
    if not all(worker["running"] for worker in workers):
        return "ended"
    return "working" if any(worker["busy"] for worker in workers) else "ready"


def _worker(member: Member) -> dict[str, Any]:
    place = member.place
    return {
        "rank": member.rank,
        "process": place.pid,
        "host": place.host,
        "device": place.device,
        "busy": member.busy,
        # of another machine's, what Ray tells comes with the next call
        "running": member.process is None or processes.running(member.process),
    }


def _pool(pool: Pool, workers: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [group for found in list(pool.notes.values()) if isinstance(found, Groups) for group in found.parts]
    first = groups[0] if groups else None
    run = first.last_run if first is not None else None
    report = pool.notes.get(LAST_REPORT)
    return {
        "degrees": pool.config.parallel.degrees,
        "address": pool.config.address,
        "start_seconds": dict(pool.laps),
        "link_test": pool.links,
        "speeds": list(pool.speeds),
        "workers": workers,
        "models": [
            {"path": spec.path, **dataclasses.asdict(facts[0])}
            for spec, facts in (first.loaded if first else {}).items()
        ],
        "last_run": {"steps": run.steps, **dataclasses.asdict(run.traffic)} if run is not None and run.steps else None,
        "last_report": {"at": report[0], **dataclasses.asdict(report[1])} if report is not None else None,
    }


def _versions() -> dict[str, str]:
    own = re.search(r'^version = "([^"]+)"', ABOUT.read_text("utf-8"), re.MULTILINE) if ABOUT.is_file() else None
    return {
        "raylight": own[1] if own else "",
        **{name: importlib.metadata.version(name) for name in ("ray", "torch")},
    }
