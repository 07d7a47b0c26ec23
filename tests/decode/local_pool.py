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
from comfy_raylight.workers.pool.crew import Member
from comfy_raylight.workers.pool.pool import Pool
from comfy_raylight.workers.pool.start import Start
from comfy_raylight.workers.wire.messages import Standing

CONTEXT: Any = multiprocessing.get_context("fork")


class LocalStart(Start):
    """Workers that share nothing but what they were forked with.

    Args:
        world: how many.
        before: run in each worker before it serves.
    """

    def __init__(self, world: int, interrupted: Callable[[], bool], before: Callable[[Any], None]) -> None:
        parallel = ParallelConfig(world=world, ulysses=world, ring=1, cfg=1)
        environment: Any = None
        super().__init__(PoolConfig(parallel=parallel), environment, interrupted)
        self._before = before
        self.connection: Any = SimpleNamespace(ray_ended=lambda ask: "")
        self.launch: Any = SimpleNamespace(
            ready=lambda references: references[0] is not None,
            kill=self._kill,
            why_ended=lambda serving: "it was killed",
            last_words=lambda pid: "",
            answer=lambda reference: Standing(),
        )

    def members(self, lost: Callable[[str], None]) -> list[Member]:
        parallel = self.config.parallel
        self._folder = private_folder.make()
        store = str(self._folder.path / "store")
        pipes = [CONTEXT.Pipe() for _ in range(parallel.world)]
        self.crew.actors += [
            # daemons: what goes wrong here must not wait for their end
            CONTEXT.Process(target=_serve, args=(parallel, rank, store, pipes, self._before), daemon=True)
            for rank in range(parallel.world)
        ]
        for process in self.crew.actors:
            process.start()
        self.crew.processes += [psutil.Process(process.pid) for process in self.crew.actors]
        actor = SimpleNamespace(status=SimpleNamespace(remote=lambda: "alive"))
        self.crew.places = [SimpleNamespace(pid=process.pid, device="cpu") for process in self.crew.actors]  # type: ignore[misc]
        members = [
            Member(
                rank=rank,
                actor=actor,
                place=place,
                serving=None,
                connection=pipes[rank][0],
                process=self.crew.processes[rank],
            )
            for rank, place in enumerate(self.crew.places)
        ]
        for _, theirs in pipes:
            theirs.close()
        return members

    def join(self, pool: Pool) -> None:
        """They have their mesh from the fork."""

    def _kill(self, processes: Any) -> None:
        for process in processes:
            process.kill()
            process.join(10)


class LocalPool(Pool):
    """A pool of such workers."""

    def __init__(
        self,
        world: int,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        before: Callable[[Any], None] = lambda runner: None,
    ) -> None:
        super().__init__(LocalStart(world, interrupted, before))


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
