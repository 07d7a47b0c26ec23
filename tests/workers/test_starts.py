"""Pools that do not start, or end while they work: what is said of it, and how often a start is tried."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from comfy_raylight.raylight.errors import ConfigError, WorkerError
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.workers.conftest import Acquire, config
from comfy_raylight.tests.workers.own import of_ray
from comfy_raylight.workers.driver import status
from comfy_raylight.workers.pool import pool as pools
from comfy_raylight.workers.pool.history import History
from comfy_raylight.workers.wire.messages import HostEnvironment


@pytest.fixture(autouse=True)
def forgiven() -> Iterator[None]:
    yield
    pools.HISTORY.forgive()


def end_a_worker(pool: pools.Pool, how: int) -> None:
    os.kill(pool.members[1].place.pid, how)
    time.sleep(0.5)  # a crash writes first what it was
    pool.call("report")


@pytest.mark.parametrize("how", [signal.SIGSEGV, pytest.param(signal.SIGBUS, marks=SLOW), signal.SIGKILL])
def test_how_a_worker_ended(acquire: Acquire, how: signal.Signals) -> None:
    """Out of memory is said to be the cause of what leaves no other trace, and of nothing else."""
    pool = acquire()
    with pytest.raises(WorkerError, match="Worker 1 .* died during report") as caught:
        end_a_worker(pool, how)
    killed = how == signal.SIGKILL
    assert ("out of memory" in str(caught.value)) == killed
    assert (f"crashed, by {how.name}" in str(caught.value)) != killed
    told = status.now()
    assert told["state"] == "none" and told["last_fault"]["error"] == str(caught.value)


def test_what_cannot_be_leaves_the_running_pool_alone(acquire: Acquire) -> None:
    pool = acquire()
    with pytest.raises(ConfigError, match="GPU is 1000, and .* cores carry"):
        acquire(1000)
    with pytest.raises(ConfigError, match="ray_object_store_gb"):
        acquire(2, object_store_gb=1e6)
    assert pool.alive() and acquire() is pool


def test_the_bound_of_cpu_workers(acquire: Acquire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGHT_MAX_CPU_WORKERS", "1")
    with pytest.raises(ConfigError, match="GPU is 3, and .* carry 1. Lower GPU, or set .*RAYLIGHT_MAX_CPU"):
        acquire(3)
    monkeypatch.setenv("RAYLIGHT_MAX_CPU_WORKERS", "many")
    with pytest.raises(ConfigError, match="RAYLIGHT_MAX_CPU_WORKERS is not a number"):
        acquire(3)


def test_cancel_while_the_control_service_is_stopped(acquire: Acquire) -> None:
    """Ray would wait for it for ever, and for its answer when it is left."""
    acquire(1)
    control, flag = of_ray("gcs_server"), threading.Event()
    control.suspend()
    try:
        threading.Timer(0.5, flag.set).start()
        with pytest.raises(WorkerError, match="Cancelled"):
            acquire(2, interrupted=flag.is_set)
        assert acquire(2).alive()
    finally:
        if control.is_running():
            control.resume()


def test_three_failed_starts(environment: HostEnvironment, acquire: Acquire) -> None:
    """No fourth one, until a setting changes or RayKill has run; the cause is said each time."""
    nowhere = dataclasses.replace(environment, comfy_root="/nonexistent")
    pools.close_all()
    for _ in range(3):
        with pytest.raises(
            WorkerError, match="failed while it should start: ModuleNotFoundError: No module named 'comfy"
        ):
            pools.acquire(config(2), nowhere, lambda: False)
    before = pools.HISTORY.fault
    with pytest.raises(WorkerError, match="failed to start 3 times.*the last time: A worker failed.*Change a setting"):
        pools.acquire(config(2), nowhere, lambda: False)
    assert status.now()["state"] == "waiting" and pools.HISTORY.fault is before
    with pytest.raises(WorkerError, match="failed while it should start"):  # a setting was changed: it is tried
        pools.acquire(config(1), nowhere, lambda: False)
    pools.HISTORY._failed = (config(2), [time.monotonic()] * 3)
    pools.HISTORY.forgive()  # as RayKill does
    restarts = pools.HISTORY.restarts
    assert acquire(2).alive() and pools.HISTORY.restarts == restarts + 1


def test_failures_long_ago_are_no_series(environment: HostEnvironment) -> None:
    history = History()
    history.failed(config(2), WorkerError("one"))
    history._failed = (config(2), [time.monotonic() - 400])
    for _ in range(2):
        history.failed(config(2), WorkerError("more"))
    history.check(config(2))
    history.failed(config(2), WorkerError("again"))
    with pytest.raises(WorkerError, match="the last time: again"):
        history.check(config(2))


def test_a_second_fault_while_a_pool_restarts(acquire: Acquire) -> None:
    """One clear error, and the next start works."""
    pool = acquire()
    with pytest.raises(WorkerError, match="died"):
        end_a_worker(pool, signal.SIGKILL)
    known = {child.pid for child in psutil.Process().children(recursive=True)}

    def kill_a_new_one() -> bool:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in known and child.name().startswith("ray::Worker"):
                child.kill()
                known.add(child.pid)
        return False

    with pytest.raises(
        WorkerError, match="A worker ended while it should .*out of memory is the usual cause"
    ) as caught:
        acquire(interrupted=kill_a_new_one)
    assert len(str(caught.value)) < 300
    assert acquire().alive() and status.now()["state"] == "ready"


def test_status_tells_who_works(acquire: Acquire) -> None:
    """While another thread has the lock and the workers are busy, and when one is gone that nobody has looked for."""
    pool = acquire()
    told = status.now()
    assert told["state"] == "ready" and told["versions"]["raylight"] and len(told["pool"]["workers"]) == 2
    with pools._LOCK:
        asked = threading.Thread(target=lambda: seen.append(status.now()))
        seen: list[dict[str, Any]] = []
        asked.start()
        asked.join(10)
    assert seen[0]["pool"]["workers"] == told["pool"]["workers"]
    os.kill(pool.members[0].place.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while status.now()["state"] == "ready" and time.monotonic() < end:
        time.sleep(0.05)
    assert status.now()["state"] == "ended"
    assert not pool.alive() and "nothing was asked" in status.now()["last_fault"]["error"]
