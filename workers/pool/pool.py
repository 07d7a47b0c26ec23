"""The driver's side of a pool: its life, its calls with bounds, and the registry of live pools."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener, wait
from typing import TYPE_CHECKING, Any

import psutil

from ...loaders.content import content_key
from ...raylight.config import ModelSpec, PoolConfig
from ...raylight.cost import Machine
from ...raylight.errors import Cancelled, ConfigError, LoadError, WorkerError
from ..wire import link_test, rates, standing
from ..wire.failures import dead, describe, failures_of, link_lost, machine_lost, ray_lost
from ..wire.messages import (
    Cancel,
    Failure,
    HostEnvironment,
    JoinRequest,
    Progress,
    Rendezvous,
    Reply,
    Request,
    Standing,
    WorkerPlace,
)
from . import devices, doorway, limits, processes
from .history import History

if TYPE_CHECKING:
    from .private_folder import PrivateFolder

log = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
GROUP_TIMEOUT_S = 1800.0
"""How long a rank waits in a collective. Long, because compiling or a cold load may hold one rank up; a
dead rank ends the call long before, since the driver watches, and a dead link, since the ranks do (LinkWatch)."""
POLL_S = 0.05
HEARTBEAT_S = 5.0
SILENCE_S = 60.0
"""A worker whose process does not answer for so long counts as stopped."""
GRACE_S = 0.5
"""After a first failure the others' are collected: the first one seen is often a victim's."""
CANCEL_S = 10.0
"""How long workers that were told to end may all be waiting for each other: nobody computes who could end it."""
NODE_DIED = "node has died"
"""What Ray says of an actor whose machine it does not reach any more."""
CLOSE_GRACE_S = 0.5
RETIRE_S = 10.0
"""How long the workers of a pool may take to give up what they hold, before they are ended instead."""

CANCELLABLE = frozenset({"load", "forward", "outline", "decode", "encode"})
"""Verbs that workers end together when they are told to."""

RankGroups = Sequence[tuple[Sequence[int], tuple[Any, ...]]]
"""The ranks of each group, and the arguments of its request."""
CallGroups = Callable[[str, RankGroups], list[list[Any]]]
Tell = Callable[[int, int], None]
"""Takes what is done, and the total."""

REGISTRY: dict[PoolConfig, Pool] = {}
"""The live pools of this process; with HISTORY, the pack's only mutable module state."""
HISTORY = History()
"""What has become of them."""
_LOCK = threading.RLock()
"""Held by whoever talks to a pool or to Ray: Ray may not be shut down while another thread does."""


@dataclass
class Member:
    """One worker as the driver sees it."""

    rank: int
    actor: Any
    place: WorkerPlace
    serving: Any
    connection: Connection
    process: psutil.Process | None
    """None on another machine."""
    heartbeat: Any = None
    standing: Standing = field(default_factory=Standing)
    busy: bool = False

    def ended(self) -> bool:
        """Whether its process is known to have ended, as far as that can be told at once."""
        # an idle worker says nothing: what can be read from its connection is the end of it
        if not self.busy and self.connection.poll():
            return True
        # a killed process may hold its connection for some time yet, until the last of its threads has gone
        return self.process is not None and not processes.running(self.process)


@dataclass(frozen=True)
class Crew:
    """Workers that a pool has left: processes that have imported everything and hold nothing.

    Attributes:
        actors, places, processes, variables: by rank; the variables are those of the environment that they were
            started with.
        environment: what they know of this process.
        machine: what was measured of them, None for nothing.
    """

    actors: list[Any]
    places: list[WorkerPlace]
    processes: list[psutil.Process]
    variables: list[dict[str, str]]
    environment: HostEnvironment
    machine: Machine | None = None

    def fitting(self, variables: Sequence[dict[str, str]], environment: HostEnvironment) -> int:
        """How many of them, from rank 0 on, are as workers with these variables would be."""
        if environment != self.environment:
            return 0
        alike = [mine == wanted for mine, wanted in zip(self.variables, variables, strict=False)]
        return alike.index(False) if False in alike else len(alike)


@dataclass
class Exchange:
    """A request on its way to groups of ranks, and what has come back.

    Attributes:
        groups: what each rank of each group is sent; groups share no collective.
        progress: called with what is done and the total, as a rank tells it.
        deadline: when everybody must have answered, by `time.monotonic()`.
        heard: when somebody was last heard.
        bounds: when the others of a group must have answered of which a rank failed, by number of the group.
        cancelled: whether the ranks need not be told any more to end.
        unwanted: since when the user has not wanted it any more.
    """

    groups: Sequence[Mapping[int, bytes]]
    request: Request
    progress: Tell | None
    deadline: float
    heard: float
    replies: dict[int, Reply] = field(default_factory=dict)
    bounds: dict[int, float] = field(default_factory=dict)
    cancelled: bool = False
    unwanted: float | None = None

    @property
    def waiting(self) -> list[int]:
        """Ranks that have not answered."""
        return [rank for group in self.groups for rank in group if rank not in self.replies]


def acquire(config: PoolConfig, environment: HostEnvironment, interrupted: Callable[[], bool]) -> Pool:
    """The running pool of this config, or a new one. One of another config is closed first: its devices are needed. The
    new one takes over what workers it can.

    Args:
        interrupted: ComfyUI's cancel flag, read while the driver waits.

    Raises:
        ConfigError: it asks for what there is not; the pool that runs goes on.
    """
    from . import launch

    with _LOCK:
        _leave_lost_ray()
        pool = REGISTRY.get(config)
        if pool is not None and pool.alive():
            return pool
        limits.check(config, environment, local=config.address == launch.LOCAL)
        HISTORY.check(config)
        standing.announce()
        old = next(iter(REGISTRY.values()), None)
        with _noted(config, interrupted):
            pool = Pool(config, environment, interrupted, old.retire() if old is not None else None)
        REGISTRY[config] = pool
        return pool


@contextlib.contextmanager
def _noted(config: PoolConfig, interrupted: Callable[[], bool]) -> Iterator[None]:
    """Note whether a pool starts; what is refused, or not wanted any more, has not failed."""
    HISTORY.starting = True
    try:
        yield
        HISTORY.started()
    except ConfigError:
        raise
    except Exception as error:
        if not interrupted():
            HISTORY.failed(config, error)
        raise
    finally:
        HISTORY.starting = False


def shut_down() -> None:
    """End every pool of this process, and Ray with them where it is our own."""
    from . import launch

    with _LOCK:
        close_all()
        launch.stop_ray()


def _ray_lost(process: str) -> None:
    """Runs in Ray's watching thread: ends all workers, so that who waits for them learns why, and leaves Ray."""
    for pool in list(REGISTRY.values()):
        pool.lose(process)
    with _LOCK:
        _leave_lost_ray()


def _leave_lost_ray() -> None:
    from . import launch

    if launch.ray_ended():
        close_all()
        launch.stop_ray()


def close_all() -> None:
    """End every pool of this process."""
    with _LOCK:
        while REGISTRY:
            REGISTRY.popitem()[1].close()


class Pool:
    """N workers that answer requests together.

    A pool is either alive or closed; it closes itself when a rank died, stopped, or failed in a way that
    may have left another one inside a collective. `replicas` lists the ranks of each data-parallel replica,
    `laps` the seconds each part of the start took, `links` what the link test found, if it ran, `machine` what was
    measured of these workers, if it was, `notes` what callers remember while it lives.
    """

    def __init__(
        self,
        config: PoolConfig,
        environment: HostEnvironment,
        interrupted: Callable[[], bool],
        crew: Crew | None = None,
    ) -> None:
        from . import launch

        self.config = config
        self._environment = environment
        self._variables: list[dict[str, str]] = []
        self.members: list[Member] = []
        self.laps: dict[str, float] = {}
        self.links = ""
        self.machine: Machine | None = crew.machine if crew else None
        self.notes: dict[Hashable, Any] = {}
        self._launch = launch
        self._interrupted = interrupted
        self._actors: list[Any] = list(crew.actors) if crew else []
        self._processes: list[psutil.Process] = list(crew.processes) if crew else []  # of this machine
        self._folder: PrivateFolder | None = None
        self._serving: list[Any] = []
        self._closed = False
        self._lost = ""
        self._single = self._starting = True
        self._agreed: set[ModelSpec] = set()
        self._next_id = 0
        try:
            self._start(crew)
        except BaseException:
            self.close()
            raise
        self._starting = False

    @property
    def replicas(self) -> list[list[int]]:
        count = self.config.parallel.degrees["dp"]
        size = self.config.parallel.world // count
        return [list(range(index * size, (index + 1) * size)) for index in range(count)]

    @property
    def device_type(self) -> str:
        """Of the workers' devices, as torch calls it."""
        return self._environment.device_type

    def alive(self) -> bool:
        """Whether every worker is still there."""
        with _LOCK:
            if not self._closed and any(member.ended() for member in self.members):
                self.close()
                HISTORY.lost(self._idle_end())
            return not self._closed

    def _idle_end(self) -> WorkerError:
        if self._lost:
            return ray_lost(self._lost, "a pause")
        return WorkerError("A worker ended while nothing was asked of it", "see the system log")

    def call(
        self,
        verb: str,
        *arguments: Any,
        ranks: Sequence[int] | None = None,
        progress: Tell | None = None,
        limit: float = float("inf"),
    ) -> list[Any]:
        """Send one request to all `ranks` (default: everyone) and wait for every answer, in rank order.

        Args:
            progress: called with what is done and the total, as a rank tells it.
            limit: seconds that it may take.

        Raises:
            Cancelled: ComfyUI's cancel flag was set, and the workers ended together; the pool stays alive.
            RaylightError: every rank refused with the same error of ours; the pool stays alive.
            WorkerError: a rank failed, died or stopped; the pool is closed unless all ranks failed alike,
                at the same point.
        """
        everyone = range(len(self.members)) if ranks is None else ranks
        return self.call_groups(verb, [(everyone, arguments)], progress=progress, limit=limit)[0]

    def call_groups(
        self,
        verb: str,
        groups: RankGroups,
        *,
        progress: Tell | None = None,
        limit: float = float("inf"),
    ) -> list[list[Any]]:
        """Like `call`, for groups of ranks with arguments of their own, at the same time.

        Groups share no collective, so only ranks of one group must fail alike for the pool to stay alive; the
        others then end what they do first.
        """
        return self._exchange(*self._packed(verb, groups), progress, limit)

    def post(self, verb: str, groups: RankGroups) -> Exchange:
        """Send what `call_groups` sends, and do not wait. None of the ranks may be at work."""
        with _LOCK, self._closing_on_error(verb):
            return self._begin(*self._packed(verb, groups))

    def settle(self, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """Wait until somebody has finished with one of these; the finished ones.

        Raises:
            WorkerError: a rank died or stopped; the pool is closed, and nothing will come of the others.
        """
        verb = exchanges[0].request.verb
        with _LOCK, self._closing_on_error(verb):
            while True:
                finished = [exchange for exchange in exchanges if not exchange.waiting]
                if finished:
                    return finished
                self._listen(exchanges)

    def result(self, exchange: Exchange) -> list[list[Any]]:
        """The answers to an exchange that has finished, as `call_groups` returns and raises them."""
        with _LOCK:
            failures = [failures_of(exchange.replies, group) for group in exchange.groups]
            if any(failures):
                self._raise(failures, [len(group) for group in exchange.groups], exchange.request.verb)
            return [[exchange.replies[rank].value for rank in group] for group in exchange.groups]

    def abandon(self, exchanges: Sequence[Exchange]) -> None:
        """Have everybody end what was posted, and wait for that."""
        left = [exchange for exchange in exchanges if exchange.waiting]
        with _LOCK, self._closing_on_error(left[0].request.verb if left else ""):
            self._cancel(left)
            while left:
                self._listen(left)
                left = [exchange for exchange in left if exchange.waiting]

    def idle(self, ranks: Sequence[int]) -> bool:
        """Whether none of the ranks is at work, so that they can be posted something."""
        return not any(self.members[rank].busy for rank in ranks) if self.members else True

    def call_each(self, verb: str, arguments: Sequence[tuple[Any, ...]], *, limit: float = float("inf")) -> list[Any]:
        """Like `call`, with arguments of its own for each rank."""
        self._next_id += 1
        requests = [Request(id=self._next_id, verb=verb, arguments=own) for own in arguments]
        packed = {rank: pickle.dumps(request) for rank, request in enumerate(requests)}
        return self._exchange([packed], requests[0], limit=limit)[0]

    def agree_on(self, spec: ModelSpec, call_groups: CallGroups | None = None) -> None:
        """Make sure that all workers find the same file as this process; each then goes by its own machine's.

        Args:
            call_groups: what asks them, where some may be at work.

        Raises:
            LoadError: a machine has none of that path, or another one.
        """
        if self._single or spec in self._agreed:
            return
        ask = call_groups or self.call_groups
        told: list[str] = ask("recognise", [(range(len(self.members)), (spec, content_key(spec.paths)))])[0]
        wrong = {member.place.host: why for member, why in zip(self.members, told, strict=True) if why}
        if wrong:
            raise LoadError(
                f"Not every machine of the pool has {spec.path} as this one has it",
                "; ".join(f"{host}: {why}" for host, why in wrong.items()),
                "Copy the file there, under the same path, then queue the prompt again",
            )
        self._agreed.add(spec)

    def measured(self) -> Machine:
        """The rates of the slowest worker and link; workers that are taken over keep theirs.

        Raises:
            WorkerError: a link does not carry what it is given.
        """
        if self.machine is None:
            self.machine = rates.machine(self.call("rates", limit=link_test.LIMIT_S), self.device_type)
            log.info("measured: %s; %s", rates.described(self.machine), self.topology())
        return self.machine

    def lose(self, process: str) -> None:
        """A process of Ray has ended: end the workers, and the pool then closes itself. May be called at any time."""
        self._lost = process
        processes.end(self._processes, grace=0)

    def close(self) -> None:
        """End all workers, whatever state they are in."""
        if self._closed and not self._actors:
            return
        self._closed = True
        REGISTRY.pop(self.config, None)
        for member in self.members:
            member.connection.close()
        self._end_workers(0)
        self._forget_members()

    def retire(self) -> Crew | None:
        """Close, and have the workers give up what they hold. None where they cannot be used again: they are ended."""
        local = self._single and self.config.address == self._launch.LOCAL
        if not self.alive() or not local or not self.idle(range(len(self.members))):
            self.close()
            return None
        self._closed = True
        REGISTRY.pop(self.config, None)
        for member in self.members:
            member.connection.close()
        if not self._launch.have_ended(self._serving, RETIRE_S, self._interrupted):
            self.close()
            return None
        places = [member.place for member in self.members]
        crew = Crew(list(self._actors), places, list(self._processes), self._variables, self._environment, self.machine)
        self._forget_members()
        return crew

    def _end_workers(self, first: int) -> None:
        """End those from rank `first` on."""
        if not self._lost:  # nobody answers, and what asks starts a new Ray
            self._launch.kill(self._actors[first:])
        processes.end(self._processes[first:], grace=CLOSE_GRACE_S)
        del self._actors[first:], self._processes[first:]

    def _forget_members(self) -> None:
        for member in self.members:
            # an error keeps frames that have the members, and must not keep what is Ray's
            member.actor = member.serving = member.heartbeat = None
        self._actors.clear()
        self._serving.clear()
        self.members, self._processes = [], []
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    # ---- start ---------------------------------------------------------------------------------

    def _start(self, crew: Crew | None) -> None:
        begun = time.monotonic()
        self._starved = processes.ended_for_memory()
        launch, config, environment = self._launch, self.config, self._environment
        world = config.parallel.world
        # what cannot be is refused before anything starts
        variables = self._variables = launch.worker_variables(config, environment)
        kept = crew.fitting(variables, environment) if crew and config.address == launch.LOCAL else 0
        self._end_workers(kept)
        launch.ensure_ray(config, _ray_lost, self._interrupted)
        launch.wait_for_control(self._interrupted)
        seats = launch.seats(config, environment, self._interrupted)
        if environment.device_type == "cpu":
            variables = [{**own, "OMP_NUM_THREADS": str(s.threads)} for own, s in zip(variables, seats, strict=True)]
        self._lap("ray", begun)
        self._actors += launch.make_actors(config, environment, seats, first=kept)
        packed = pickle.dumps(environment)
        starting = [
            actor.start.remote(packed, environment.comfy_root, own)
            for actor, own in zip(self._actors[kept:], variables[kept:], strict=True)
        ]
        places: list[WorkerPlace] = crew.places[:kept] if crew else []
        places += launch.gather(starting, timeout=START_TIMEOUT_S, what="start", interrupted=self._interrupted)
        begun = self._lap("workers", begun + self.laps["ray"])
        here = launch.node_id()
        self._processes += [
            processes.of(place.pid, name=f"Worker {place.rank}") for place in places[kept:] if place.node == here
        ]
        single = self._single = all(place.node == here for place in places)
        self._connect(places, here, single)
        meet = self._meeting(places[0])
        self.call_each(
            "join",
            [
                (
                    JoinRequest(
                        parallel=config.parallel,
                        rank=rank,
                        rendezvous=meet,
                        threads=seats[rank].threads,
                        readers=self._readers(places, rank),
                        apart=not single,
                        machine=self.machine,
                    ),
                )
                for rank in range(world)
            ],
            limit=START_TIMEOUT_S,
        )
        begun = self._lap("groups", begun)
        if config.check_links:
            found = self.call("check_links", limit=link_test.LIMIT_S)[0]
            self.links = link_test.described(found)
            log.info("links: %s; %s", self.links, self.topology())
            told = link_test.warning(found, config.parallel, environment.device_type)
            if told:
                log.warning("%s", told)
        log.info("pool of %d workers on %s: %s", world, places[0].device, self.laps)

    def _lap(self, name: str, begun: float) -> float:
        now = time.monotonic()
        self.laps[name] = round(now - begun, 3)
        return now

    def _connect(self, places: list[WorkerPlace], here: str, single: bool) -> None:
        """Have each worker call back on one socket each, so that a death is seen at once."""
        key = secrets.token_bytes(32)
        # on one host a socket file that only this user can open; it has no port to collide on
        where: Any = self._private_file("c") if single else (self._launch.host_address(), 0)
        deadline = time.monotonic() + START_TIMEOUT_S
        with Listener(where, backlog=len(places)) as listener:
            self._serving = [actor.serve.remote(listener.address, key) for actor in self._actors]
            connections = doorway.gather(
                listener,
                key,
                len(places),
                check=lambda: self._check_connecting(deadline),
                interrupted=self._interrupted,
            )
        local = {process.pid: process for process in self._processes}
        self.members = [
            Member(
                rank=place.rank,
                actor=self._actors[place.rank],
                place=place,
                serving=self._serving[place.rank],
                connection=connections[place.rank],
                process=local[place.pid] if place.node == here else None,
            )
            for place in places
        ]
        for member in self.members:
            if member.process is not None:
                member.actor.follow.options(concurrency_group="control").remote(os.getpid())

    def _check_connecting(self, deadline: float) -> None:
        if self._interrupted():
            raise WorkerError("Cancelled while the workers should connect")
        if ended := self._launch.ready(self._serving):
            raise WorkerError(
                "A worker ended while it should connect", self._launch.why_ended(ended[0]), "Queue the prompt again"
            )
        if time.monotonic() > deadline:
            raise WorkerError(f"A worker did not connect within {START_TIMEOUT_S:.0f} s", "", "Queue the prompt again")

    def _readers(self, places: list[WorkerPlace], rank: int) -> tuple[int, int]:
        """A rank's index among the ranks of its replica on its host, and their number."""
        replica = next(ranks for ranks in self.replicas if rank in ranks)
        beside = [other for other in replica if places[other].node == places[rank].node]
        return beside.index(rank), len(beside)

    def topology(self) -> str:
        """How the workers reach each other."""
        if self._single:
            return devices.topology(self.config, self.members[0].place.device.partition(":")[0])
        return f"workers on {', '.join(dict.fromkeys(member.place.host for member in self.members))}"

    def _meeting(self, first: WorkerPlace) -> Rendezvous:
        """A file on one machine; on several, rank 0's store, which whoever reaches its port can talk to."""
        if self._single:
            return Rendezvous(file=self._private_file("g"), timeout=GROUP_TIMEOUT_S)
        wanted, _, port = self.config.rendezvous.rpartition(":")
        host = wanted or first.host
        asked = int(port) if port.isdigit() else 0
        return Rendezvous(
            host=host, port=self._exchange_one(0, "open_store", host, asked, GROUP_TIMEOUT_S), timeout=GROUP_TIMEOUT_S
        )

    def _private_file(self, name: str) -> str:
        """A name that nothing has yet, where only this user can make it."""
        from . import private_folder

        folder = self._launch.own_folder()
        if folder is None:
            self._folder = self._folder or private_folder.make()
            folder = self._folder.path
        return str(folder / f"{name}{secrets.token_hex(4)}")

    def _exchange_one(self, rank: int, verb: str, *arguments: Any) -> Any:
        return self.call(verb, *arguments, ranks=[rank])[0]

    # ---- calls ---------------------------------------------------------------------------------

    def _packed(self, verb: str, groups: RankGroups) -> tuple[list[dict[int, bytes]], Request]:
        """What each rank of each group is sent, and the first group's request."""
        self._next_id += 1
        requests = [Request(id=self._next_id, verb=verb, arguments=arguments) for _, arguments in groups]
        sent = [
            dict.fromkeys(ranks, pickle.dumps(request)) for (ranks, _), request in zip(groups, requests, strict=True)
        ]
        return sent, requests[0]

    def _exchange(
        self,
        groups: Sequence[Mapping[int, bytes]],
        request: Request,
        progress: Tell | None = None,
        limit: float = float("inf"),
    ) -> list[list[Any]]:
        """Send what each rank of each group is to get, and collect the answers in the same order."""
        with _LOCK:
            with self._closing_on_error(request.verb):
                exchange = self._begin(groups, request, progress, limit)
                while exchange.waiting:
                    self._listen([exchange])
            return self.result(exchange)

    @contextlib.contextmanager
    def _closing_on_error(self, verb: str) -> Iterator[None]:
        """A rank may be left inside a collective, or hold an answer that a later call would read: end them all."""
        try:
            if self._closed:
                if self._lost:
                    raise ray_lost(self._lost, verb)
                raise WorkerError("The pool is closed", "", "Queue the prompt again: it starts a new one")
            yield
        except BaseException as error:
            if not self._closed:
                self._lost = self._lost or self._launch.ray_ended(ask=True)
                self.close()
                lost = ray_lost(self._lost, verb) if self._lost else error
                self._note(lost)
                if lost is not error:
                    raise lost from error
            raise

    def _begin(
        self,
        groups: Sequence[Mapping[int, bytes]],
        request: Request,
        progress: Tell | None = None,
        limit: float = float("inf"),
    ) -> Exchange:
        for group in groups:
            for rank, payload in group.items():
                member = self.members[rank]
                assert not member.busy
                member.busy, member.standing = True, Standing()
                self._send(member, payload, request.verb)
        now = time.monotonic()
        return Exchange(
            groups=groups,
            request=request,
            progress=progress,
            deadline=now + limit,
            heard=now,
            cancelled=request.verb not in CANCELLABLE,
        )

    def _send(self, member: Member, payload: bytes, verb: str) -> None:
        try:
            member.connection.send_bytes(payload)
        except OSError as error:
            raise self._dead(member, verb) from error

    def _listen(self, exchanges: Sequence[Exchange]) -> None:
        """Read what comes within a moment; raises when a failure leaves the others of its group without hope."""
        if self._interrupted():
            self._cancel(exchanges)
        waiting = {
            self.members[rank].connection: (exchange, rank) for exchange in exchanges for rank in exchange.waiting
        }
        for connection in wait(list(waiting), timeout=POLL_S):
            self._read(*waiting[connection])  # type: ignore[index]
        for exchange in exchanges:
            self._check_bounds(exchange)

    def _cancel(self, exchanges: Sequence[Exchange]) -> None:
        """Tell those who are still at work to end."""
        if self._starting:
            raise WorkerError("Cancelled while the pool starts")
        for exchange in exchanges:
            exchange.unwanted = exchange.unwanted or time.monotonic()
            if not exchange.cancelled:
                exchange.cancelled = True
                cancel = pickle.dumps(Cancel(id=exchange.request.id))
                for rank in exchange.waiting:
                    self._send(self.members[rank], cancel, exchange.request.verb)

    def _read(self, exchange: Exchange, rank: int) -> None:
        member = self.members[rank]
        try:
            reply: Reply | Progress = pickle.loads(member.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._dead(member, exchange.request.verb) from error
        assert reply.id == exchange.request.id
        exchange.heard = time.monotonic()
        if isinstance(reply, Progress):
            if exchange.progress is not None:
                exchange.progress(reply.done, reply.total)
            return
        exchange.replies[rank] = reply
        member.busy = False
        if reply.failure is not None:
            group = next(number for number, ranks in enumerate(exchange.groups) if rank in ranks)
            # ranks that were cancelled have agreed to leave, each after what it computes at the moment
            agreed = isinstance(reply.failure.error, Cancelled)
            exchange.bounds.setdefault(group, exchange.heard + (SILENCE_S if agreed else GRACE_S))

    def _check_bounds(self, exchange: Exchange) -> None:
        left, verb = exchange.waiting, exchange.request.verb
        if not left:
            return
        now = time.monotonic()
        if now > exchange.deadline:
            raise WorkerError(
                f"The workers did not finish {verb} in time",
                f"missing: {', '.join(map(str, sorted(left)))}",
                "Check the links between them (for example with NCCL_P2P_DISABLE=1), then queue the prompt again",
            )
        if any(
            now > at and not exchange.groups[group].keys().isdisjoint(left) for group, at in exchange.bounds.items()
        ):
            raise describe(failures_of(exchange.replies, exchange.replies), verb, self._hosts())
        if now - exchange.heard > HEARTBEAT_S:
            missing = [self.members[rank] for rank in left]
            self._check_heartbeats(missing, now - exchange.heard, verb)
            if exchange.unwanted and now - exchange.unwanted > CANCEL_S and all(map(_without_hope, missing)):
                raise WorkerError(
                    f"Cancelled during {verb}, where every worker waits for another one",
                    f"for {min(member.standing.waits for member in missing):.0f} s and more",
                    "Queue the prompt again: a new pool starts by itself",
                )

    def _check_heartbeats(self, waiting: list[Member], silent: float, verb: str) -> None:
        """Ask the silent ones for a sign of life over Ray; one that gives none in time is stopped."""
        for member in waiting:
            if member.heartbeat is None:
                member.heartbeat = (time.monotonic(), member.actor.status.remote())
            asked, reference = member.heartbeat
            if self._launch.ready([reference]):
                member.heartbeat = None
                if self._launch.ready([member.serving]):
                    raise self._dead(member, verb)
                member.standing = self._launch.answer(reference) or Standing()
                if member.standing.links:
                    raise link_lost(member.rank, member.standing.links, verb, self._hosts())
            elif time.monotonic() - asked > SILENCE_S:
                raise WorkerError(
                    f"Worker {member.rank} (process {member.place.pid}) has stopped answering",
                    f"no sign of life for {silent:.0f} s during {verb}",
                    "It was ended. Queue the prompt again: a new pool starts by itself",
                )

    def _dead(self, member: Member, verb: str) -> WorkerError:
        why = self._launch.why_ended(member.serving)
        log.error("worker %d has ended: %s", member.rank, why)
        if member.process is None and NODE_DIED in why:
            return machine_lost(member.rank, member.place.host, verb)
        where = "" if member.process else f" on {member.place.host}"
        return dead(
            member.rank,
            f"process {member.place.pid}{where}",
            verb,
            words=self._launch.last_words(member.place.pid) if member.process else "",
            starved=member.process is not None and processes.ended_for_memory() > self._starved,
        )

    def _note(self, error: BaseException) -> None:
        # of a start, acquire does
        if not self._starting and not self._interrupted():
            HISTORY.lost(error)

    def _hosts(self) -> list[str]:
        return [member.place.host for member in self.members] if not self._single else []

    def _raise(self, groups: Sequence[dict[int, Failure]], counts: Sequence[int], verb: str) -> None:
        """Everybody answered, some with failures: decide what it means."""
        failures = {rank: failure for group in groups for rank, failure in group.items()}
        for level, text in failures[min(failures)].said:
            logging.getLogger().log(level, text)
        for group, count in zip(groups, counts, strict=True):
            same_point = len({failure.collectives for failure in group.values()}) <= 1
            if len(group) not in (0, count) or not same_point:
                # someone went on without the others: the groups cannot be trusted any more
                found = describe(failures, verb, self._hosts())
                self.close()
                self._note(found)
                raise found
        error = failures[min(failures)].error
        if error is not None:
            raise error
        raise describe(failures, verb, self._hosts())


def _without_hope(member: Member) -> bool:
    """Whether it waits in a collective, or says nothing, for so long that no end of its work is to be expected."""
    asked = member.heartbeat[0] if member.heartbeat is not None else time.monotonic()
    return member.standing.waits > CANCEL_S or time.monotonic() - asked > CANCEL_S
