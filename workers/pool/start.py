"""The start of a pool: its processes, their connections, and how they meet each other."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import secrets
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Listener
from typing import TYPE_CHECKING, Any

from ...raylight.config import PoolConfig
from ...raylight.errors import WorkerError
from ..wire.messages import HostEnvironment, JoinRequest, Rendezvous, WorkerPlace
from . import doorway, processes, speeds
from .crew import Crew, Member

if TYPE_CHECKING:
    from .cluster import Seat
    from .pool import Pool
    from .private_folder import PrivateFolder

log = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
SPEED_TIMEOUT_S = 60.0
CLOSE_GRACE_S = 0.5
GROUP_TIMEOUT_S = 1800.0
"""How long a rank waits in a collective. Long, because compiling or a cold load may hold one rank up; a
dead rank ends the call long before, since the driver watches, and a dead link, since the ranks do (LinkWatch)."""


class Start:
    """What a pool's start makes, step by step. Whatever happens in one of them, `end` ends what there is so far.

    Args:
        config: what is to be started.
        interrupted: ComfyUI's cancel flag, read while the driver waits.
        old: workers of another pool, to take over what fits.

    Attributes:
        crew: the processes.
        serving: the call of each actor that ends when the actor serves no more.
        laps: seconds of each part.
        starved: how often memory had run out on this machine before.
        speeds: of the workers beside each other, once they have met; () where they are alike.
    """

    def __init__(
        self,
        config: PoolConfig,
        environment: HostEnvironment,
        interrupted: Callable[[], bool],
        old: Crew | None = None,
    ) -> None:
        from . import connection, launch

        self.connection: Any = connection
        self.launch: Any = launch
        self.crew = Crew(environment)
        if old is not None:
            # nobody else may hold what is Ray's: it ends this process where a reference is dropped too late
            self.crew.actors, old.actors = old.actors, []
            self.crew.processes += old.processes
            self.crew.machine = old.machine
        self.serving: list[Any] = []
        self.laps: dict[str, float] = {}
        self.speeds: tuple[float, ...] = ()
        self.starved = processes.ended_for_memory()
        self._old = old
        self.config = config
        self.interrupted = interrupted
        self._folder: PrivateFolder | None = None
        self._seats: list[Seat] = []
        self._begun = time.monotonic()

    def members(self, lost: Callable[[str], None]) -> list[Member]:
        """Start the processes, or take them over, and connect them.

        Args:
            lost: see connection.ensure_ray.

        Raises:
            ConfigError: what is asked for is not there. Nothing has been started then.
            WorkerError: one did not start in time or ended, or the user cancelled.
        """
        launch, config, crew, old = self.launch, self.config, self.crew, self._old
        environment = crew.environment
        # what cannot be is refused before anything starts
        variables = crew.variables = launch.worker_variables(config, environment)
        kept = old.fitting(variables, environment) if old and config.local else 0
        self.end(first=kept)
        self.connection.ensure_ray(config, lost, self.interrupted)
        self.connection.wait_for_control(self.interrupted)
        seats = self._seats = launch.seats(config, environment, self.interrupted)
        if environment.device_type == "cpu":
            variables = [{**own, "OMP_NUM_THREADS": str(s.threads)} for own, s in zip(variables, seats, strict=True)]
        self.lap("ray")
        crew.actors += launch.make_actors(config, environment, seats, first=kept)
        packed = pickle.dumps(environment)
        starting = [
            actor.start.remote(packed, environment.comfy_root, own)
            for actor, own in zip(crew.actors[kept:], variables[kept:], strict=True)
        ]
        crew.places = old.places[:kept] if old else []
        crew.places += launch.gather(starting, timeout=START_TIMEOUT_S, what="start", interrupted=self.interrupted)
        self.lap("workers")
        here = self.connection.node_id()
        crew.processes += [
            processes.of(place.pid, name=f"Worker {place.rank}") for place in crew.places[kept:] if place.node == here
        ]
        return self._connected(here)

    @property
    def single(self) -> bool:
        """Whether all workers are on this machine."""
        return len(self.crew.processes) == len(self.crew.places)

    def join(self, pool: Pool) -> None:
        """Have the connected workers meet each other."""
        self.speeds = self._measured(pool)
        parallel = dataclasses.replace(self.config.parallel, speeds=self.speeds)
        meet = self._rendezvous(lambda *asked: pool.call("open_store", *asked, ranks=[0])[0])
        joins = [
            JoinRequest(
                parallel=parallel,
                rank=rank,
                rendezvous=meet,
                threads=self._seats[rank].threads,
                readers=self._readers(pool.replicas, rank),
                apart=not self.single,
                machine=self.crew.machine,
            )
            for rank in range(parallel.world)
        ]
        pool.call_each("join", [(join,) for join in joins], limit=START_TIMEOUT_S)
        self.lap("groups")

    def _measured(self, pool: Pool) -> tuple[float, ...]:
        """How fast the workers are beside each other; () where they are alike, as those on CPUs of one machine are."""
        found = speeds.asked(self.config.parallel.world)
        if not found and speeds.differ(self.crew.places):
            found = speeds.measured(pool.call("speed", limit=SPEED_TIMEOUT_S))
        if found:
            log.info("the workers' parts of a model call are as their speeds: %s", speeds.described(found))
        return found

    def lap(self, name: str) -> None:
        """Note how long a part took that ends now."""
        now = time.monotonic()
        self.laps[name] = round(now - self._begun, 3)
        self._begun = now

    def end(self, *, first: int = 0, ask: bool = True) -> None:
        """End the workers from rank `first` on, whatever state they are in.

        Args:
            ask: whether Ray is to end them; where it is gone nobody answers, and what asks starts a new Ray.
        """
        if ask:
            self.launch.kill(self.crew.actors[first:])
        processes.end(self.crew.processes[first:], grace=CLOSE_GRACE_S)
        del self.crew.actors[first:], self.crew.processes[first:]

    def forget(self) -> None:
        """Hold nothing of Ray's any more, and leave no file."""
        self.crew = Crew(self.crew.environment)
        self.serving.clear()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _connected(self, here: str) -> list[Member]:
        """Have each worker call back on one socket each, so that a death is seen at once."""
        key = secrets.token_bytes(32)
        places = self.crew.places
        # on one host a socket file that only this user can open; it has no port to collide on
        where: Any = self._private_file("c") if self.single else (self.connection.host_address(), 0)
        deadline = time.monotonic() + START_TIMEOUT_S
        with Listener(where, backlog=len(places)) as listener:
            self.serving = [actor.serve.remote(listener.address, key) for actor in self.crew.actors]
            connections = doorway.gather(
                listener,
                key,
                len(places),
                check=lambda: self._check_connecting(deadline),
                interrupted=self.interrupted,
            )
        local = {process.pid: process for process in self.crew.processes}
        members = [
            Member(
                rank=place.rank,
                actor=self.crew.actors[place.rank],
                place=place,
                serving=self.serving[place.rank],
                connection=connections[place.rank],
                process=local[place.pid] if place.node == here else None,
            )
            for place in places
        ]
        for member in members:
            if member.process is not None:
                member.actor.follow.options(concurrency_group="control").remote(os.getpid())
        return members

    def _check_connecting(self, deadline: float) -> None:
        if self.interrupted():
            raise WorkerError("Cancelled while the workers should connect")
        if ended := self.launch.ready(self.serving):
            raise WorkerError(
                "A worker ended while it should connect", self.launch.why_ended(ended[0]), "Queue the prompt again"
            )
        if time.monotonic() > deadline:
            raise WorkerError(f"A worker did not connect within {START_TIMEOUT_S:.0f} s", "", "Queue the prompt again")

    def _rendezvous(self, open_store: Callable[[str, int, float], int]) -> Rendezvous:
        """A file on one machine; on several, rank 0's store, which whoever reaches its port can talk to."""
        if self.single:
            return Rendezvous(file=self._private_file("g"), timeout=GROUP_TIMEOUT_S)
        wanted, _, port = self.config.rendezvous.rpartition(":")
        host = wanted or self.crew.places[0].host
        asked = int(port) if port.isdigit() else 0
        return Rendezvous(host=host, port=open_store(host, asked, GROUP_TIMEOUT_S), timeout=GROUP_TIMEOUT_S)

    def _readers(self, replicas: Sequence[Sequence[int]], rank: int) -> tuple[int, int]:
        """A rank's index among the ranks of its replica on its host, and their number."""
        places: list[WorkerPlace] = self.crew.places
        replica = next(ranks for ranks in replicas if rank in ranks)
        beside = [other for other in replica if places[other].node == places[rank].node]
        return beside.index(rank), len(beside)

    def _private_file(self, name: str) -> str:
        """A name that nothing has yet, where only this user can make it."""
        from . import private_folder

        folder = self.connection.own_folder()
        if folder is None:
            self._folder = self._folder or private_folder.make()
            folder = self._folder.path
        return str(folder / f"{name}{secrets.token_hex(4)}")
