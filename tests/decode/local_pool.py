"""A pool whose workers are forked from this process: the pack's own driver, connection and runner, without Ray."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from comfy_raylight.raylight.config import ParallelConfig, PoolConfig
from comfy_raylight.tests.engine.ranks import mesh_of
from comfy_raylight.workers.pool import private_folder
from comfy_raylight.workers.pool.pool import Member, Pool
from comfy_raylight.workers.wire.messages import Standing

CONTEXT: Any = multiprocessing.get_context("fork")


class LocalPool(Pool):
    """Workers that share nothing but what they were forked with.

    Args:
        world: how many.
        before: run in each worker before it serves.
    """

    def __init__(
        self,
        world: int,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        before: Callable[[Any], None] = lambda runner: None,
    ) -> None:
        parallel = ParallelConfig(world=world, ulysses=world, ring=1, cfg=1)
        self.config = PoolConfig(parallel=parallel)
        self.notes = {}
        launch: Any = SimpleNamespace(
            ready=lambda references: references[0] is not None,
            kill=self._kill,
            ray_ended=lambda ask: "",
            why_ended=lambda serving: "it was killed",
            last_words=lambda pid: "",
            answer=lambda reference: Standing(),
        )
        self._launch = launch
        self._interrupted = interrupted
        self._serving: list[Any] = []
        self._closed = False
        self._lost = ""
        self._single, self._starting, self._starved = True, False, 0
        self._next_id = 0
        self._folder = private_folder.make()
        store = str(self._folder.path / "store")
        pipes = [CONTEXT.Pipe() for _ in range(world)]
        self._actors = [
            # daemons: what goes wrong here must not wait for their end
            CONTEXT.Process(target=_serve, args=(parallel, rank, store, pipes, before), daemon=True)
            for rank in range(world)
        ]
        for process in self._actors:
            process.start()
        self._processes = [psutil.Process(process.pid) for process in self._actors]
        actor = SimpleNamespace(status=SimpleNamespace(remote=lambda: "alive"))
        self.members = [
            Member(
                rank=rank,
                actor=actor,
                place=SimpleNamespace(pid=process.pid),  # type: ignore[arg-type]
                serving=None,
                connection=pipes[rank][0],
                process=self._processes[rank],
            )
            for rank, process in enumerate(self._actors)
        ]
        for _, theirs in pipes:
            theirs.close()

    def _kill(self, processes: Any) -> None:
        for process in processes:
            process.kill()
            process.join(10)


def _serve(parallel: ParallelConfig, rank: int, store: str, pipes: Any, before: Callable[[Any], None]) -> None:
    from comfy_raylight.workers.worker.runner import Runner
    from comfy_raylight.workers.worker.serve import serve

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    for number, (ours, theirs) in enumerate(pipes):
        ours.close()
        if number != rank:
            theirs.close()
    runner = Runner()
    runner._mesh = mesh_of(parallel, rank=rank, path=store)
    before(runner)
    serve(pipes[rank][1], runner)
