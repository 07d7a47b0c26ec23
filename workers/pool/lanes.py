"""Several tasks that talk to one pool at the same time, each to ranks of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...raylight import cfg
from ...raylight.errors import RaylightError
from .calls import Exchange, RankGroups
from .pool import Pool

T = TypeVar("T")


@dataclass(eq=False)
class _Question:
    """A request of a task; it has no exchange as long as a rank is at work for another task."""

    verb: str
    groups: RankGroups
    exchange: Exchange | None = None

    @property
    def ranks(self) -> set[int]:
        return {rank for ranks, _ in self.groups for rank in ranks}


@dataclass(frozen=True)
class Failed:
    """What came in place of an answer or a result."""

    error: Exception


class Lanes:
    """Runs tasks side by side as far as their requests to the pool.

    One task runs at a time, from one request to the next, and goes on as soon as its own ranks have answered; so
    workers compute while other tasks' code runs.

    Args:
        keep: remembers what of the process is a task's own; called before other tasks go on. What it returns is
            called before the task itself does.
    """

    def __init__(self, pool: Pool, keep: Callable[[], Callable[[], None]]) -> None:
        self.pool = pool
        self._keep = keep
        self._together = cfg.Together()
        self._open: list[_Question] = []

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run all tasks to their ends; returns their results.

        Raises:
            The first exception of a task. The other tasks have ended then, and so has what workers did for them.
        """
        try:
            return self._together.run(tasks, self._answer)
        finally:
            posted = [question.exchange for question in self._open if question.exchange is not None]
            self._open.clear()
            if posted and self.pool.alive():
                self.pool.abandon(posted)

    def call_groups(self, verb: str, groups: RankGroups) -> list[list[Any]]:
        """What Pool.call_groups does; in a task, other tasks go on meanwhile."""
        if not self._together.inside():
            return self.pool.call_groups(verb, groups)
        question = _Question(verb, groups)
        if self._is_free(question):
            # at once: what was packed for a rank must reach it even where another task ends all
            question.exchange = self.pool.post(verb, groups)
        self._open.append(question)
        restore = self._keep()
        answer = self._together.ask(question)
        restore()
        if isinstance(answer, Failed):
            raise answer.error
        found: list[list[Any]] = answer
        return found

    def _is_free(self, question: _Question) -> bool:
        """Whether it can be posted: its ranks are idle, and no older question waits for them."""
        older = self._open[: self._open.index(question)] if question in self._open else self._open
        waiting = set().union(*(other.ranks for other in older if other.exchange is None))
        return waiting.isdisjoint(question.ranks) and self.pool.idle(sorted(question.ranks))

    def _answer(self, questions: Mapping[int, _Question]) -> dict[int, Any]:
        """Post what could not be posted before, and wait for somebody's answer."""
        try:
            for question in self._open:
                if question.exchange is None and self._is_free(question):
                    question.exchange = self.pool.post(question.verb, question.groups)
            posted = {number: asked for number, asked in questions.items() if asked.exchange is not None}
            finished = self.pool.settle([asked.exchange for asked in posted.values() if asked.exchange is not None])
        except RaylightError as error:  # the pool is closed: the first task says why
            return dict.fromkeys(questions, Failed(error))
        answers: dict[int, Any] = {}
        for number, asked in posted.items():
            if asked.exchange in finished:
                self._open.remove(asked)
                answers[number] = self._result(asked.exchange)
        return answers

    def _result(self, exchange: Exchange) -> list[list[Any]] | Failed:
        try:
            return self.pool.result(exchange)
        except RaylightError as error:
            return Failed(error)
