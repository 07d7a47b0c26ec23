"""The pool's life on real Ray actors: start, calls, failures, reuse."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.raylight import cost
from comfy_raylight.raylight.config import ModelSpec, ParallelConfig, PoolConfig, WorkerSettings
from comfy_raylight.raylight.errors import Cancelled, LoadError, WorkerError
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.workers.faults import (
    dawdle,
    die,
    end_waiting,
    fail,
    in_worker,
    on_rank,
    times_chunked_layers,
    times_compiled_graphs,
    wait_for_python,
)
from comfy_raylight.tests.workers.own import of_ray
from comfy_raylight.workers.driver.group import Call, Group, Patches
from comfy_raylight.workers.pool import pool as pools
from comfy_raylight.workers.pool.start import Start
from comfy_raylight.workers.wire import link_test
from comfy_raylight.workers.wire.messages import HostEnvironment, LoadRequest, PatchRequest

Acquire = Callable[..., pools.Pool]


def pids(pool: pools.Pool) -> list[int]:
    return [member.place.pid for member in pool.members]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end between opening and reading
        return False


def all_gone(processes: list[int]) -> bool:
    end = time.monotonic() + 5
    while any(map(running, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(running, processes))


PLAIN = WorkerSettings()


def load_of(spec: ModelSpec) -> LoadRequest:
    return LoadRequest(spec=spec, dtype="float32")


class Model:
    """A Wan model on a pool, called below ComfyUI's sampling code."""

    def __init__(self, pool: pools.Pool, file: Path) -> None:
        self.pool = pool
        self.group = Group(pool, pool.replicas[0], lambda _: None)
        self.spec = ModelSpec.of(file)
        self.group.load(load_of(self.spec), self)

    def forward(
        self, patch: Callable[..., Any] | None = None, settings: WorkerSettings = PLAIN, frames: int = 3
    ) -> torch.Tensor:
        """One call; `patch` runs in every self-attention of every rank, with the rank as keyword."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 16, frames, 10, 12, generator=generator)
        context = torch.randn(1, 40, 4096, generator=generator)
        options: dict[str, Any] = {"sigmas": torch.ones(1), "cond_or_uncond": [0]}
        if patch is not None:
            options["optimized_attention_override"] = patch
        call = Call(
            spec=self.spec,
            method="_forward",
            args=(x, torch.tensor([500.0]), context),
            kwargs={"transformer_options": options},
            functions=(patch,) if patch is not None else (),
            patches=Patches(),
            fresh=(x,),
            random=None,
            settings=settings,
        )
        output, _ = self.group.run(call)
        return output

    def recorded(self) -> list[int]:
        """Recorded calls by worker."""
        reports = self.pool.call("report")
        return [found.recorded for report in reports for found in report.models if found.path == self.spec.path]


@pytest.fixture
def model(acquire: Acquire, tiny_wan: Path) -> Model:
    return Model(acquire(), tiny_wan)


def test_two_workers_equal_one(acquire: Acquire, tiny_wan: Path) -> None:
    alone = Model(acquire(1), tiny_wan).forward()
    together = Model(acquire(2), tiny_wan).forward()
    three = Model(acquire(3), tiny_wan).forward()
    scale = alone.abs().max()
    assert scale > 0 and alone.isfinite().all()
    assert (together - alone).abs().max() <= 1e-6 * scale
    assert (three - alone).abs().max() <= 1e-6 * scale


def test_equal_config_is_the_running_pool(acquire: Acquire, model: Model) -> None:
    assert acquire() is model.pool
    assert acquire().members[0].place.pid in pids(model.pool)


def test_another_config_takes_over_the_workers(acquire: Acquire, model: Model) -> None:
    """What they held is gone; surplus ones end, and those that lack are started."""
    before, old = model.forward(), pids(model.pool)
    for world, kept in ((1, 1), (3, 1), (2, 2)):
        new = acquire(world)
        assert not model.pool.alive() and {new.config: new} == pools.REGISTRY
        assert pids(new)[:kept] == old[:kept] and len(pids(new)) == world and all_gone(old[kept:])
        assert [report.models for report in new.call("report")] == [()] * world
        old, model = pids(new), Model(new, Path(model.spec.path))
        assert torch.allclose(model.forward(), before, rtol=0, atol=1e-6 * float(before.abs().max()))


def test_each_way_of_sharing_follows_each_other(environment: HostEnvironment, model: Model) -> None:
    before, old = model.forward(), pids(model.pool)
    settings = WorkerSettings(compile="cudagraphs")
    assert torch.equal(model.forward(settings=settings), before)
    for change in ({"ring": 2}, {"cfg": 2}, {"ulysses": 2, "sync_ulysses": True}, {"ulysses": 2}):
        parallel = ParallelConfig(**{"world": 2, "ulysses": 1, "ring": 1, "cfg": 1, **change})  # type: ignore[arg-type]
        pool = pools.acquire(PoolConfig(parallel=parallel), environment, lambda: False)
        other = Model(pool, Path(model.spec.path))
        assert pids(other.pool) == old
        found = other.forward()
        assert torch.allclose(found, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(found, before)


@pytest.mark.parametrize("compiler", ["", "cudagraphs", pytest.param("inductor", marks=SLOW)])
def test_nothing_of_a_model_stays_with_the_workers(acquire: Acquire, model: Model, compiler: str) -> None:
    def count(worker: Any) -> list[str]:
        import gc

        from comfy.model_base import BaseModel
        from comfy_raylight.loaders.source import Source
        from comfy_raylight.raylight.mesh import Mesh
        from comfy_raylight.workers.worker.model import WorkerModel

        gc.collect()
        return [
            type(found).__name__
            for found in gc.get_objects()
            if isinstance(found, WorkerModel | BaseModel | Source | Mesh)
        ]

    for _ in range(2):
        model.forward(settings=WorkerSettings(compile=compiler))
    model.forward(on_rank(7, fail))
    assert {"WorkerModel", "WAN21", "Source"} <= set(in_worker(model.pool, count))
    assert in_worker(acquire(1), count) == ["Mesh"]


def test_workers_that_do_not_leave_in_time_are_ended(
    acquire: Acquire, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = pids(model.pool)
    monkeypatch.setattr(pools, "RETIRE_S", 0.0)
    new = acquire(1)
    assert all_gone(old) and not set(pids(new)) & set(old)


@pytest.mark.parametrize("cancel", [False, True])
def test_a_worker_that_ends_before_it_connects(model: Model, cancel: bool) -> None:
    """Killed, or stopped and the user cancels: no wait for the time that a start may take."""
    old = model.pool
    crew = old.retire()
    assert crew is not None
    os.kill(crew.places[1].pid, signal.SIGSTOP if cancel else signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerError, match="Cancelled while" if cancel else "ended while it should connect"):
        pools.Pool(Start(old.config, crew.environment, lambda: cancel, crew))
    assert time.monotonic() - began < 20
    assert all_gone([place.pid for place in crew.places])


def test_workers_of_another_environment_are_ended(acquire: Acquire, model: Model) -> None:
    old = model.pool
    processes = pids(old)
    crew = old.retire()
    assert crew is not None
    assert crew.fitting([{}, {}, {}], crew.environment) == 0
    assert crew.fitting(crew.variables, crew.environment) == crew.fitting([*crew.variables, {}], crew.environment) == 2
    assert crew.fitting([crew.variables[0], {}], crew.environment) == 1
    other = dataclasses.replace(crew.environment, folders=b"")
    assert crew.fitting(crew.variables, other) == 0
    new = pools.Pool(Start(old.config, crew.environment, lambda: False, dataclasses.replace(crew, environment=other)))
    try:
        assert all_gone(processes) and new.alive()
    finally:
        new.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_dead_worker(acquire: Acquire, model: Model, rank: int) -> None:
    before = model.forward()
    processes = pids(model.pool)
    with pytest.raises(WorkerError, match=f"Worker {rank} .*died") as caught:
        model.forward(on_rank(rank, die))
    assert "Queue the prompt again" in str(caught.value)
    assert all_gone(processes) and not pools.REGISTRY
    again = Model(acquire(), Path(model.spec.path))
    assert torch.equal(again.forward(), before)


def test_worker_killed_between_calls(acquire: Acquire, model: Model) -> None:
    before = model.forward()
    os.kill(pids(model.pool)[1], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(WorkerError, match="Worker 1 .*died"):
        model.forward()
    assert torch.equal(Model(acquire(), Path(model.spec.path)).forward(), before)


@pytest.mark.parametrize(
    "name,idle",
    [
        pytest.param("gcs_server", True, id="idle-gcs_server", marks=SLOW),
        pytest.param("gcs_server", False, id="working-gcs_server"),
        pytest.param("raylet", True, id="idle-raylet"),
        pytest.param("raylet", False, id="working-raylet", marks=SLOW),
        pytest.param("raylight-keeper", True, id="idle-keeper", marks=SLOW),
        pytest.param("raylight-keeper", False, id="working-keeper"),
    ],
)
def test_process_of_ray_killed(acquire: Acquire, model: Model, name: str, idle: bool) -> None:
    """A dead control service would end this process a minute later: it is left at once, and another Ray started."""
    before = model.forward()
    processes = pids(model.pool)
    victim = of_ray(name)
    if idle:
        victim.kill()
        assert all_gone(processes) and not model.pool.alive()
    else:
        threading.Timer(0.2, victim.kill).start()
        with pytest.raises(WorkerError, match=f"Ray's {name} process ended during forward"):
            model.forward(on_rank(1, dawdle))
    assert torch.equal(Model(acquire(), Path(model.spec.path)).forward(), before)
    assert not victim.is_running()


def test_one_rank_raises(acquire: Acquire, model: Model) -> None:
    processes = pids(model.pool)
    began = time.monotonic()
    with pytest.raises(WorkerError, match="Worker 1 failed.*ValueError: a patch went wrong") as caught:
        model.forward(on_rank(1, fail))
    assert caught.value.cause_type == "ValueError"
    assert time.monotonic() - began < 20
    assert all_gone(processes) and not model.pool.alive()


def test_all_ranks_raise_and_the_pool_lives(model: Model) -> None:
    before = model.forward()
    with pytest.raises(WorkerError, match="ValueError: a patch went wrong"):
        model.forward(on_rank(-1, fail))
    model.group.forget()
    assert model.pool.alive()
    assert torch.equal(model.forward(), before)


def test_bad_file_leaves_the_pool_alive(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"this is not a model" * 10)
    with pytest.raises(LoadError, match="cannot be loaded"):
        model.group.load(load_of(ModelSpec.of(path)), model)
    spec = ModelSpec.of(path)
    path.write_bytes(b"and it changed")
    with pytest.raises(LoadError, match="changed while"):
        model.group.load(load_of(spec), model)
    assert model.pool.alive()
    assert model.forward().isfinite().all()


def test_a_model_nobody_holds_is_released(acquire: Acquire, model: Model, tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    second = tmp_path / "second.safetensors"
    for path in (first, second):
        path.write_bytes(Path(model.spec.path).read_bytes())
    specs = [ModelSpec.of(first), ModelSpec.of(second)]

    class Holder:
        pass

    holders = [Holder(), Holder()]
    model.group.load(load_of(specs[0]), holders[0])
    del holders[0]
    gc.collect()
    model.group.load(load_of(specs[1]), holders[0])
    assert set(model.group._facts) == {model.spec, specs[1]}
    with pytest.raises(WorkerError, match="KeyError"):  # the workers let go of it too
        model.group._call("patch", _empty_patch(model, specs[0]))
    assert model.forward().isfinite().all()


def _empty_patch(model: Model, spec: ModelSpec) -> PatchRequest:
    return PatchRequest(spec=spec, state="x", patches=model.group._encoder.encode(({}, {})), force_cast=False)


def test_cancel_while_starting(acquire: Acquire) -> None:
    pools.close_all()
    flag = threading.Event()
    timer = threading.Timer(0.5, flag.set)
    timer.start()
    with pytest.raises(WorkerError, match="Cancelled"):
        acquire(2, interrupted=flag.is_set)
    assert not pools.REGISTRY
    assert acquire(2).alive()


def test_cancel_within_a_forward(
    acquire: Acquire, comfy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks leave it before the same block; the pool and its model go on as if nothing had been."""
    path = tmp_path / "deep.safetensors"
    write([Job(family="wan", path=path, size={"layers": 8})], comfy_root=comfy_root, python=Path(sys.executable))
    model = Model(acquire(), path)
    before, processes, flag = model.forward(), pids(model.pool), threading.Event()
    monkeypatch.setattr(model.pool.calls, "_interrupted", flag.is_set)
    for after in (0.1, 0.5, 0.9):
        threading.Timer(after, flag.set).start()
        with pytest.raises(Cancelled):
            model.forward(on_rank(1, dawdle))
        flag.clear()
        model.group.forget()
        assert model.pool.alive() and pids(model.pool) == processes
        assert torch.equal(model.forward(), before)


def test_link_test(acquire: Acquire, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="comfy_raylight"):
        pool = acquire(2, check_links=True)
    assert pool.alive()
    (told,) = [record.getMessage() for record in caplog.records if "links: ulysses: all-reduce" in record.getMessage()]
    assert "all-to-all" in told and "GB/s" in told and "share the host's memory" in told


def test_predictions_go_by_the_links_that_were_tested(model: Model) -> None:
    def predicted() -> float:
        return float(model.pool.call("report")[0].predicted)

    model.forward()
    assumed = predicted()
    model.pool.call("check_links")
    assert predicted() not in (0.0, assumed)


def test_predictions_know_what_is_recorded(model: Model) -> None:
    """Where Python keeps a device waiting, sharing costs; not where calls are repeated."""

    def predict(worker: Any) -> float:
        from comfy_raylight.raylight.cost import Machine

        (known,) = worker._runner._models.values()
        rates = {"linear": 1e15, "attention": 1e15, "link": 1e15, "latency": 0.0, "call": 0.0}
        return float(known.predicted(Machine(**rates, launch=1.0, launch_shared=2.0)))

    model.forward()
    assert in_worker(model.pool, predict) == 0.5
    model.forward(settings=WorkerSettings(compile="cudagraphs"))
    assert 1.9 < in_worker(model.pool, predict) <= 2


def test_link_test_is_bounded(acquire: Acquire, monkeypatch: pytest.MonkeyPatch) -> None:
    pools.close_all()
    monkeypatch.setattr(link_test, "LIMIT_S", 0.0)
    with pytest.raises(WorkerError, match="did not finish check_links in time"):
        acquire(2, check_links=True)
    assert not pools.REGISTRY


def test_slow_links_are_told() -> None:
    parallel = ParallelConfig(world=2, ulysses=2, ring=1, cfg=1)

    def warning(rate: float) -> str:
        found = {"ulysses": link_test.Link(reduce=rate, exchange=rate, latency=1e-4)}
        return link_test.warning(found, parallel, "cuda")

    assert warning(6.0) == ""
    assert "carry 0.05 GB/s" in warning(0.05) and "cfg_degree" in warning(0.05)
    assert link_test.warning({}, parallel, "cuda") == ""
    assert link_test.machine({}, "cuda") == cost.RATES["cuda"]
    assert link_test.machine({}, "abacus") is None


def test_everything_is_the_same_pack_in_a_worker(acquire: Acquire, comfy_root: Path) -> None:
    """Classes, results and exceptions round-trip, and `nodes` is ComfyUI's in a worker too."""
    pool = acquire()

    def look(worker: Any) -> dict[str, Any]:
        import sys

        import nodes

        return {
            "class": type(worker).__module__,
            "nodes": nodes.__file__,
            "ours": [name for name in sys.modules if "raylight" in name and ("/" in name or "\\" in name)],
        }

    found = in_worker(pool, look)
    assert found["class"] == "comfy_raylight.workers.pool.actor"
    assert Path(found["nodes"]).parent == comfy_root
    assert found["ours"] == []
    assert type(pool.members[0].place).__module__ == "comfy_raylight.workers.wire.messages"


def test_nothing_listens_beyond_this_host(acquire: Acquire) -> None:
    """Sockets in LISTEN state of the workers and of Ray's own processes are bound to loopback."""
    import psutil

    pool = acquire()
    family = [psutil.Process(pid) for pid in pids(pool)] + psutil.Process().children(recursive=True)
    listening = {
        (process.name(), connection.laddr.ip)
        for process in family
        if process.is_running()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address for _, address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


def test_workers_have_the_priority_of_their_parent(acquire: Acquire) -> None:
    assert in_worker(acquire(2), lambda _: os.nice(0)) == os.nice(0)


def test_settings_come_and_go(model: Model) -> None:
    plain, probed = model.forward(), model.forward(times_chunked_layers)
    chunked = WorkerSettings(ffn_chunks=4)
    assert torch.allclose(model.forward(settings=chunked), plain, atol=1e-6)
    assert (model.forward(times_chunked_layers, chunked) - probed).abs().max() > 1e-3
    assert torch.equal(model.forward(times_chunked_layers), probed)
    assert torch.equal(model.forward(), plain)


def test_blocks_are_compiled(model: Model) -> None:
    """On two workers: what they exchange is no part of the graphs."""
    plain, probed = model.forward(), model.forward(times_compiled_graphs)
    assert torch.equal(probed, plain)
    compiled = WorkerSettings(compile="inductor")
    for _ in range(2):
        assert torch.allclose(model.forward(settings=compiled), plain, atol=1e-5)
    assert (model.forward(times_compiled_graphs, compiled) - plain).abs().max() > 1e-3
    assert torch.equal(model.forward(), plain)


def test_calls_are_recorded(model: Model) -> None:
    """On two workers, what they exchange included; a call with a patch runs as ever, and nothing is compiled."""
    plain, probed = model.forward(), model.forward(times_compiled_graphs)
    recorded = WorkerSettings(compile="cudagraphs")
    for _ in range(4):
        assert torch.equal(model.forward(settings=recorded), plain)
    assert torch.equal(model.forward(times_compiled_graphs, recorded), probed)
    assert model.recorded() == [1, 1]
    assert torch.equal(model.forward(), plain)


def test_a_model_that_waits_for_python_is_recorded_by_itself(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plain = model.forward()
    in_worker(model.pool, wait_for_python)
    try:
        for count in (0, 0, 1, 1):
            assert torch.equal(model.forward(), plain)
            assert model.recorded() == [count, count]
    finally:
        in_worker(model.pool, end_waiting)
    assert caplog.text.count("wait for Python") == 1


def test_a_call_that_needs_more_memory_has_room_made(model: Model) -> None:
    """As ComfyUI does: weights that fitted beside a small call may have to leave, and what is recorded goes first."""
    settings = WorkerSettings(compile="cudagraphs")
    plain = {frames: model.forward(frames=frames) for frames in (2, 3, 4)}
    for frames in (3, 3, 2, 2, 3):
        assert torch.equal(model.forward(settings=settings, frames=frames), plain[frames])
    assert model.recorded() == [2, 2], "smaller calls take nothing from larger ones"
    for recorded in ([0, 0], [1, 1]):
        assert torch.equal(model.forward(settings=settings, frames=4), plain[4])
        assert model.recorded() == recorded


def test_short_sequences_are_told(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Not of recorded calls: a device on which they pay is faster than what the prediction goes by."""

    def told() -> list[str]:
        return [record.message for record in caplog.records if "tokens are few for 2 workers" in record.message]

    for _ in range(3):
        model.forward(settings=WorkerSettings(compile="cudagraphs"), frames=1)
    assert all(model.recorded()) and not told()
    for _ in range(2):
        model.forward(frames=1)
    assert len(told()) == 1 and "docs/scaling.md" in told()[0]
