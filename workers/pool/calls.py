"""Requests to the workers of a pool: how they are sent, and how long answers are waited for."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from ...raylight.errors import Cancelled, WorkerError
from ..wire.failures import dead, describe, failures_of, link_lost, machine_lost
from ..wire.messages import Cancel, Progress, Reply, Request, Standing
from . import processes
from .crew import Member

log = logging.getLogger(__name__)

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
CANCELLABLE = frozenset({"load", "forward", "outline", "decode", "encode"})
"""Verbs that workers end together when they are told to."""

RankGroups = Sequence[tuple[Sequence[int], tuple[Any, ...]]]
"""The ranks of each group, and the arguments of its request."""
Tell = Callable[[int, int], None]
"""Takes what is done, and the total."""


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


class Calls:
    """Talks to the members of a pool. It raises where something is wrong with one; the pool says what that means.

    Args:
        members: those that are connected.
        launch: the module that asks Ray.
        interrupted: ComfyUI's cancel flag.
        starved: how often memory had run out on this machine before they started.

    Attributes:
        starting: whether the pool still starts: Cancel then ends it.
    """

    def __init__(
        self, members: Sequence[Member], *, launch: Any, interrupted: Callable[[], bool], starved: int
    ) -> None:
        self.starting = True
        self.members = members
        self._launch = launch
        self._interrupted = interrupted
        self._starved = starved
        self._next_id = 0

    def packed(self, verb: str, groups: RankGroups) -> tuple[list[dict[int, bytes]], Request]:
        """What each rank of each group is sent, and the first group's request."""
        self._next_id += 1
        requests = [Request(id=self._next_id, verb=verb, arguments=arguments) for _, arguments in groups]
        sent = [
            dict.fromkeys(ranks, pickle.dumps(request)) for (ranks, _), request in zip(groups, requests, strict=True)
        ]
        return sent, requests[0]

    def packed_each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> tuple[list[dict[int, bytes]], Request]:
        """The same for one group of everyone, with arguments of its own for each rank."""
        self._next_id += 1
        requests = [Request(id=self._next_id, verb=verb, arguments=own) for own in arguments]
        return [{rank: pickle.dumps(request) for rank, request in enumerate(requests)}], requests[0]

    def begin(
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

    def listen(self, exchanges: Sequence[Exchange]) -> None:
        """Read what comes within a moment; raises when a failure leaves the others of its group without hope."""
        if self._interrupted():
            self.cancel(exchanges)
        waiting = {
            self.members[rank].connection: (exchange, rank) for exchange in exchanges for rank in exchange.waiting
        }
        for connection in wait(list(waiting), timeout=POLL_S):
            self._read(*waiting[connection])  # type: ignore[index]
        for exchange in exchanges:
            self._check_bounds(exchange)

    def cancel(self, exchanges: Sequence[Exchange]) -> None:
        """Tell those who are still at work to end."""
        if self.starting:
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
            raise describe(failures_of(exchange.replies, exchange.replies), verb, self.hosts())
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
                    raise link_lost(member.rank, member.standing.links, verb, self.hosts())
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

    def hosts(self) -> list[str]:
        """The machine of each worker; [] where all are on this one."""
        if all(member.process is not None for member in self.members):
            return []
        return [member.place.host for member in self.members]


def _without_hope(member: Member) -> bool:
    """Whether it waits in a collective, or says nothing, for so long that no end of its work is to be expected."""
    asked = member.heartbeat[0] if member.heartbeat is not None else time.monotonic()
    return member.standing.waits > CANCEL_S or time.monotonic() - asked > CANCEL_S
