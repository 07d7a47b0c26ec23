"""Tasks side by side on a pool that is played: who goes on when, and what is left behind by an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from comfy_raylight.raylight.errors import UnsupportedError, WorkerError
from comfy_raylight.workers.pool.lanes import Lanes


@dataclass(eq=False)
class Posted:
    """A request on the played pool."""

    verb: str
    ranks: tuple[int, ...]


@dataclass
class Played:
    """A pool whose answers come in the order of `finish`, which names verbs.

    Attributes:
        log: what happened.
        errors: what a verb ends in.
        dies: a verb at whose turn a worker dies.
    """

    finish: list[str]
    errors: dict[str, Exception] = field(default_factory=dict)
    dies: str = ""
    log: list[str] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)
    closed: bool = False

    def post(self, verb: str, groups: Sequence[tuple[Sequence[int], tuple[Any, ...]]]) -> Posted:
        ranks = tuple(rank for group, _ in groups for rank in group)
        assert self.busy.isdisjoint(ranks)
        self.busy.update(ranks)
        self.log.append(f"post {verb}")
        return Posted(verb, ranks)

    def settle(self, exchanges: Sequence[Posted]) -> list[Posted]:
        wanted = self.finish.pop(0)
        if wanted == self.dies:
            self.closed = True
            raise WorkerError("a worker died")
        found = next(exchange for exchange in exchanges if exchange.verb == wanted)
        self.busy.difference_update(found.ranks)
        return [found]

    def result(self, exchange: Posted) -> list[list[str]]:
        if exchange.verb in self.errors:
            raise self.errors[exchange.verb]
        return [[exchange.verb.upper()]]

    def abandon(self, exchanges: Sequence[Posted]) -> None:
        self.log += [f"abandon {exchange.verb}" for exchange in exchanges]

    def call_groups(self, verb: str, groups: Sequence[Any]) -> list[list[str]]:
        self.log.append(f"call {verb}")
        return [[verb.upper()]]

    def idle(self, ranks: Sequence[int]) -> bool:
        return self.busy.isdisjoint(ranks)

    def alive(self) -> bool:
        return not self.closed


def lanes_of(pool: Played) -> Lanes:
    def keep() -> Callable[[], None]:
        return lambda: pool.log.append("restore")

    return Lanes(cast(Any, pool), keep)


def calling(pool: Played, lanes: Lanes, *requests: tuple[str, int]) -> Callable[[], str]:
    """A task that makes these requests (verb, rank) one after another."""

    def task() -> str:
        for verb, rank in requests:
            assert lanes.call_groups(verb, [([rank], ())]) == [[verb.upper()]]
        return requests[0][0]

    return task


def test_a_task_goes_on_when_its_own_ranks_have_answered() -> None:
    pool = Played(finish=["b1", "b2", "a1", "a2"])
    lanes = lanes_of(pool)
    tasks = [calling(pool, lanes, ("a1", 0), ("a2", 0)), calling(pool, lanes, ("b1", 1), ("b2", 1))]
    assert lanes.run(tasks) == ["a1", "b1"]
    posts = [line for line in pool.log if line.startswith("post")]
    assert posts == ["post a1", "post b1", "post b2", "post a2"]
    assert pool.log.count("restore") == 4 and not pool.busy


def test_a_request_for_ranks_at_work_waits_and_goes_first() -> None:
    pool = Played(finish=["a1", "b1", "a2"])
    lanes = lanes_of(pool)
    assert lanes.run([calling(pool, lanes, ("a1", 0), ("a2", 0)), calling(pool, lanes, ("b1", 0))]) == ["a1", "b1"]
    assert [line for line in pool.log if line.startswith("post")] == ["post a1", "post b1", "post a2"]


def test_outside_of_tasks_it_is_the_pool() -> None:
    pool = Played(finish=[])
    assert lanes_of(pool).call_groups("a", [([0], ())]) == [["A"]]
    assert pool.log == ["call a"]


@pytest.mark.parametrize("error", [UnsupportedError("no"), WorkerError("failed")])
def test_an_error_ends_what_workers_do_for_others(error: Exception) -> None:
    pool = Played(finish=["a1"], errors={"a1": error})
    lanes = lanes_of(pool)
    with pytest.raises(type(error)) as caught:
        lanes.run([calling(pool, lanes, ("a1", 0)), calling(pool, lanes, ("b1", 1))])
    assert caught.value is error
    assert pool.log[-1] == "abandon b1"
    pool.busy.clear()
    pool.finish.append("c1")
    assert lanes.run([calling(pool, lanes, ("c1", 1))]) == ["c1"]


def test_what_was_not_sent_is_not_waited_for() -> None:
    pool = Played(finish=["a1"], errors={"a1": UnsupportedError("no")})
    lanes = lanes_of(pool)
    with pytest.raises(UnsupportedError):
        lanes.run([calling(pool, lanes, ("a1", 0)), calling(pool, lanes, ("b1", 0))])
    assert not any("b1" in line for line in pool.log)


def test_a_pool_that_closed_says_why_and_nothing_is_waited_for() -> None:
    pool = Played(finish=["b1"], dies="b1")
    lanes = lanes_of(pool)
    with pytest.raises(WorkerError, match="a worker died"):
        lanes.run([calling(pool, lanes, ("a1", 0)), calling(pool, lanes, ("b1", 1))])
    assert not any("abandon" in line for line in pool.log)
