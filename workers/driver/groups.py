"""The cfg groups of one data-parallel replica: each answers calls of its own, several at the same time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ...raylight import cfg
from ...raylight.config import ModelSpec
from ...raylight.errors import RaylightError
from ..pool.lanes import Failed, Lanes
from ..pool.pool import Pool
from ..wire.encoder import Shelf
from ..wire.messages import LoadRequest, ModelFacts
from ..wire.parcels import Reference
from .group import Call, Group, Patches

T = TypeVar("T")
Message = tuple[str, tuple[Any, ...], Sequence[int]]
"""Verb, arguments and ranks of a request."""


class Groups:
    """The parts of `ranks` that each hold one sequence; every part is a `Group` by itself.

    To its parts this object is the pool. What they ask for while several of them work goes out together.

    Args:
        lanes: the pool's, through which other data-parallel replicas work at the same time.
    """

    def __init__(self, pool: Pool, lanes: Lanes, ranks: Sequence[int], refer: Reference) -> None:
        self.pool = pool
        self._lanes = lanes
        self._together = cfg.Together()
        size = pool.config.parallel.sequence
        parts = [ranks[start : start + size] for start in range(0, len(ranks), size)]
        shelf = Shelf(len(parts))
        self.parts = [Group(self, part, refer, models_kept=pool.config.models_kept, shelf=shelf) for part in parts]

    def load(self, request: LoadRequest, holder: object) -> list[ModelFacts]:
        """Have the model loaded on every rank; see Group.load."""
        if request.spec.reader == "map":
            found = self._each(lambda group: group.load(request, holder))
        else:
            found = [group.load(request, holder) for group in self.parts]
        return [facts for group in found for facts in group]

    def holds(self, spec: ModelSpec, patches: Patches) -> bool:
        """Whether the model has these patches already on every group."""
        return all(group.holds(spec, patches) for group in self.parts)

    def run(self, calls: Mapping[int, Call]) -> dict[int, tuple[Any, tuple[Any, Any] | None]]:
        """Run a call on some groups, by number of the group; see Group.run."""
        jobs = [functools.partial(self.parts[group].run, call) for group, call in calls.items()]
        return dict(zip(calls, self._run(jobs), strict=True))

    def share(self, spec: ModelSpec, device: str, *, resident: bool) -> int:
        """Bytes of the model on the device of this uuid; see Group.share."""
        return sum(group.share(spec, device, resident=resident) for group in self.parts)

    def offload(self, spec: ModelSpec) -> None:
        """Take a model's weights off the workers' devices."""
        self._each(lambda group: group.offload(spec))

    def forget(self) -> None:
        """The run is over: drop its callables."""
        self._each(Group.forget)

    def alive(self) -> bool:
        """Whether the pool is."""
        return self.pool.alive()

    def call(self, verb: str, *arguments: Any, ranks: Sequence[int]) -> list[Any]:
        """What Pool.call does, together with the calls of other groups that work at the moment."""
        if self._together.inside():
            replies = self._together.ask((verb, arguments, ranks))
            if isinstance(replies, Failed):
                raise replies.error
            return list(replies)
        return self._lanes.call_groups(verb, [(ranks, arguments)])[0]

    def _each(self, job: Callable[[Group], T]) -> list[T]:
        return self._run([functools.partial(job, group) for group in self.parts])

    def _run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run one job for each of several groups.

        One that fails leaves the others to their ends: a group must be sent what was packed for it, since the
        next parcel counts on its tensors.
        """
        if len(jobs) == 1:
            return [jobs[0]()]
        results: list[T] = []
        for found in self._together.run([functools.partial(_caught, job) for job in jobs], self._send):
            if isinstance(found, Failed):
                raise found.error
            results.append(found)
        return results

    def _send(self, messages: Mapping[int, Message]) -> dict[int, Any]:
        """Send what can go together: short requests first, so that forwards do not wait for one another."""
        short = {number: message for number, message in messages.items() if message[0] != "forward"}
        ready = short or messages
        (verb, *_) = next(iter(ready.values()))
        same = {number: message for number, message in ready.items() if message[0] == verb}
        try:
            replies = self._lanes.call_groups(verb, [(ranks, arguments) for _, arguments, ranks in same.values()])
        except RaylightError as error:
            if not self.pool.alive():
                raise
            return dict.fromkeys(same, Failed(error))
        return dict(zip(same, replies, strict=True))


def _caught(job: Callable[[], T]) -> T | Failed:
    try:
        return job()
    except Exception as error:
        return Failed(error)
