"""A pool of workers in ComfyUI's process: its life, what it is asked, and the pools that live."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from ...loaders.content import content_key
from ...raylight.config import ModelSpec, PoolConfig
from ...raylight.cost import Machine
from ...raylight.errors import ConfigError, LoadError, WorkerError
from ..wire import link_test, rates, standing
from ..wire.failures import describe, failures_of, ray_lost
from ..wire.messages import Failure, HostEnvironment, Request
from . import devices, limits, processes
from .calls import Calls, Exchange, RankGroups, Tell
from .crew import Crew, Member
from .history import History
from .start import Start

log = logging.getLogger(__name__)

RETIRE_S = 10.0
"""How long the workers of a pool may take to give up what they hold, before they are ended instead."""

CallGroups = Callable[[str, RankGroups], list[list[Any]]]

REGISTRY: dict[PoolConfig, Pool] = {}
"""The live pools of this process; with HISTORY, the pack's only mutable module state."""
HISTORY = History()
"""What has become of them."""
_LOCK = threading.RLock()
"""Held by whoever talks to a pool or to Ray: Ray may not be shut down while another thread does."""


def acquire(config: PoolConfig, environment: HostEnvironment, interrupted: Callable[[], bool]) -> Pool:
    """The running pool of this config, or a new one. One of another config is closed first: its devices are needed. The
    new one takes over what workers it can.

    Args:
        interrupted: ComfyUI's cancel flag, read while the driver waits.

    Raises:
        ConfigError: it asks for what there is not; the pool that runs goes on.
    """
    with _LOCK:
        _leave_lost_ray()
        pool = REGISTRY.get(config)
        if pool is not None and pool.alive():
            return pool
        limits.check(config, environment, local=config.local)
        HISTORY.check(config)
        standing.announce()
        old = next(iter(REGISTRY.values()), None)
        with _noted(config, interrupted):
            pool = Pool(Start(config, environment, interrupted, old.retire() if old is not None else None))
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
    from . import connection

    with _LOCK:
        close_all()
        connection.stop_ray()


def _ray_lost(process: str) -> None:
    """Runs in Ray's watching thread: ends all workers, so that who waits for them learns why, and leaves Ray."""
    for pool in list(REGISTRY.values()):
        pool.lose(process)
    with _LOCK:
        _leave_lost_ray()


def _leave_lost_ray() -> None:
    from . import connection

    if connection.ray_ended():
        close_all()
        connection.stop_ray()


def close_all() -> None:
    """End every pool of this process."""
    with _LOCK:
        while REGISTRY:
            REGISTRY.popitem()[1].close()


class Pool:
    """N workers that answer requests together.

    A pool is either alive or closed; it closes itself when a rank died, stopped, or failed in a way that
    may have left another one inside a collective.

    Attributes:
        members: the workers, by rank.
        links: what the link test found, if it ran.
        notes: what callers remember while it lives.
    """

    def __init__(self, start: Start) -> None:
        self.config = start.config
        self.members: list[Member] = []
        self.links = ""
        self.notes: dict[Hashable, Any] = {}
        self.calls = Calls(self.members, launch=start.launch, interrupted=start.interrupted, starved=start.starved)
        self._start = start
        self._closed = False
        self._lost = ""
        self._agreed: set[ModelSpec] = set()
        try:
            self.members += start.members(_ray_lost)
            start.join(self)
            self._test_links()
        except BaseException:
            self.close()
            raise
        self.calls.starting = False
        log.info("pool of %d workers on %s: %s", len(self.members), self.members[0].place.device, start.laps)

    def _test_links(self) -> None:
        if self.config.check_links:
            found = self.call("check_links", limit=link_test.LIMIT_S)[0]
            self.links = link_test.described(found)
            log.info("links: %s; %s", self.links, self.topology())
            told = link_test.warning(found, self.config.parallel, self.device_type)
            if told:
                log.warning("%s", told)

    @property
    def replicas(self) -> list[list[int]]:
        """The ranks of each data-parallel replica."""
        count = self.config.parallel.degrees["dp"]
        size = self.config.parallel.world // count
        return [list(range(index * size, (index + 1) * size)) for index in range(count)]

    @property
    def device_type(self) -> str:
        """Of the workers' devices, as torch calls it."""
        return self._start.crew.environment.device_type

    @property
    def machine(self) -> Machine | None:
        """What was measured of these workers, if it was."""
        return self._start.crew.machine

    @property
    def speeds(self) -> tuple[float, ...]:
        """Of the workers beside each other; () where they are alike."""
        return self._start.speeds

    @property
    def laps(self) -> dict[str, float]:
        """Seconds that each part of the start took."""
        return self._start.laps

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
        return self._exchange(*self.calls.packed(verb, groups), progress, limit)

    def post(self, verb: str, groups: RankGroups) -> Exchange:
        """Send what `call_groups` sends, and do not wait. None of the ranks may be at work."""
        with _LOCK, self._closing_on_error(verb):
            return self.calls.begin(*self.calls.packed(verb, groups))

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
                self.calls.listen(exchanges)

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
            self.calls.cancel(left)
            while left:
                self.calls.listen(left)
                left = [exchange for exchange in left if exchange.waiting]

    def idle(self, ranks: Sequence[int]) -> bool:
        """Whether none of the ranks is at work, so that they can be posted something."""
        return not any(self.members[rank].busy for rank in ranks) if self.members else True

    def call_each(self, verb: str, arguments: Sequence[tuple[Any, ...]], *, limit: float = float("inf")) -> list[Any]:
        """Like `call`, with arguments of its own for each rank."""
        return self._exchange(*self.calls.packed_each(verb, arguments), limit=limit)[0]

    def agree_on(self, spec: ModelSpec, call_groups: CallGroups | None = None) -> None:
        """Make sure that all workers find the same file as this process; each then goes by its own machine's.

        Args:
            call_groups: what asks them, where some may be at work.

        Raises:
            LoadError: a machine has none of that path, or another one.
        """
        if self._start.single or spec in self._agreed:
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
        crew = self._start.crew
        if crew.machine is None:
            crew.machine = rates.machine(self.call("rates", limit=link_test.LIMIT_S), self.device_type)
            log.info("measured: %s; %s", rates.described(crew.machine), self.topology())
        return crew.machine

    def topology(self) -> str:
        """How the workers reach each other."""
        if self._start.single:
            return devices.topology(self.config, self.members[0].place.device.partition(":")[0])
        return f"workers on {', '.join(dict.fromkeys(member.place.host for member in self.members))}"

    def lose(self, process: str) -> None:
        """A process of Ray has ended: end the workers, and the pool then closes itself. May be called at any time."""
        self._lost = process
        processes.end(self._start.crew.processes, grace=0)

    def close(self) -> None:
        """End all workers, whatever state they are in."""
        if self._closed and not self._start.crew.actors:
            return
        self._leave()
        self._start.end(ask=not self._lost)
        self._forget()

    def retire(self) -> Crew | None:
        """Close, and have the workers give up what they hold. None where they cannot be used again: they are ended."""
        start = self._start
        local = start.single and self.config.local
        if not self.alive() or not local or not self.idle(range(len(self.members))):
            self.close()
            return None
        self._leave()
        if not start.launch.have_ended(start.serving, RETIRE_S, self._start.interrupted):
            self.close()
            return None
        crew = start.crew
        self._forget()
        return crew

    def _leave(self) -> None:
        """Hang up: a worker whose connection closes gives up what it holds."""
        self._closed = True
        REGISTRY.pop(self.config, None)
        for member in self.members:
            member.connection.close()

    def _forget(self) -> None:
        for member in self.members:
            # an error keeps frames that have the members, and must not keep what is Ray's
            member.actor = member.serving = member.heartbeat = None
        self.members.clear()
        self._start.forget()

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
                exchange = self.calls.begin(groups, request, progress, limit)
                while exchange.waiting:
                    self.calls.listen([exchange])
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
                self._lost = self._lost or self._start.connection.ray_ended(ask=True)
                self.close()
                lost = ray_lost(self._lost, verb) if self._lost else error
                self._note(lost)
                if lost is not error:
                    raise lost from error
            raise

    def _note(self, error: BaseException) -> None:
        # of a start, acquire does
        if not self.calls.starting and not self._start.interrupted():
            HISTORY.lost(error)

    def _raise(self, groups: Sequence[dict[int, Failure]], counts: Sequence[int], verb: str) -> None:
        """Everybody answered, some with failures: decide what it means."""
        failures = {rank: failure for group in groups for rank, failure in group.items()}
        for level, text in failures[min(failures)].said:
            logging.getLogger().log(level, text)
        for group, count in zip(groups, counts, strict=True):
            same_point = len({failure.collectives for failure in group.values()}) <= 1
            if len(group) not in (0, count) or not same_point:
                # someone went on without the others: the groups cannot be trusted any more
                found = describe(failures, verb, self.calls.hosts())
                self.close()
                self._note(found)
                raise found
        error = failures[min(failures)].error
        if error is not None:
            raise error
        raise describe(failures, verb, self.calls.hosts())
