"""CFG parallelism, apart from who computes: tasks that ask together, who answers whom, and a batch divided by rows."""

from __future__ import annotations

import contextvars
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet

log = logging.getLogger(__name__)

T = TypeVar("T")
Span = tuple[int, int]


class Together:
    """Runs tasks side by side as far as their questions, so that these can be answered at the same time.

    Tasks are coroutines of the caller's own thread: one runs at a time, from one `ask` to the next, always in
    the same order. What belongs to a thread (inference mode, current device, thread pools) is therefore the
    caller's in every task. A task must not hold such a setting of its own across an `ask`.
    """

    def run(
        self, tasks: Sequence[Callable[[], T]], answer: Callable[[Mapping[int, Any]], Mapping[int, Any]]
    ) -> list[T]:
        """Run all tasks to their ends.

        Args:
            tasks: functions that may call `ask`.
            answer: called when every task has asked or ended, with the open questions by number of the task,
                the oldest first; returns answers to some of them, at least to one. It runs in the caller.

        Returns:
            The tasks' results, in their order.

        Raises:
            The first exception of a task or of `answer`, after all other tasks have ended.
        """
        coroutines = [_Coroutine(self, task) for task in tasks]
        questions: dict[int, Any] = {}
        results: dict[int, T] = {}

        def advance(number: int, *answers: Any) -> None:
            value = coroutines[number].switch(*answers)
            (results if coroutines[number].dead else questions)[number] = value

        try:
            for number in range(len(tasks)):
                advance(number)
            while questions:
                for number, value in answer(dict(questions)).items():
                    del questions[number]
                    advance(number, value)
        finally:
            for coroutine in coroutines:
                coroutine.end()
        return [results[number] for number in range(len(tasks))]

    def inside(self) -> bool:
        """Whether a task of this object is running."""
        current = getcurrent()
        return isinstance(current, _Coroutine) and current.owner is self

    def ask(self, question: object) -> Any:
        """In a task: wait for the answer to a question."""
        assert self.inside()
        return getcurrent().parent.switch(question)


class _Coroutine(greenlet):
    """One task."""

    def __init__(self, owner: Together, task: Callable[[], Any]) -> None:
        super().__init__(task)
        self.owner = owner
        self.gr_context = contextvars.copy_context()

    def end(self) -> None:
        """Have a task that waits for an answer unwind, however often it asks again."""
        while not self.dead:
            try:
                self.throw(GreenletExit)
            except BaseException:
                # another error is on its way to the caller, who would not see why it came to this one
                log.warning("a task failed while it was ended", exc_info=True)


def assign(tasks: Iterable[int], groups: int) -> dict[int, int]:
    """Which task each group serves next: {task: group}, as many as there are groups for.

    A task gets the same group each time where it can, since that one holds its conditioning and weight patches.

    Args:
        tasks: numbers of the waiting tasks, the longest waiting first.
        groups: how many groups there are; all are free.
    """
    chosen: dict[int, int] = {}
    waiting = list(tasks)[:groups]
    free = list(range(groups))
    for task in waiting:
        if task % groups in free:
            chosen[task] = task % groups
            free.remove(task % groups)
    chosen.update(zip((task for task in waiting if task not in chosen), free, strict=False))
    return chosen


def spans(conds: int, groups: int) -> list[Span]:
    """Runs (start, stop) of `conds` conditions for up to `groups` groups, none of them empty."""
    bounds = [-(-conds * group // groups) for group in range(groups + 1)]
    return [(start, stop) for start, stop in itertools.pairwise(bounds) if start < stop]


def divide(
    values: Mapping[str, Any], *, per_row: Collection[str], rows: int, parts: Iterable[Span]
) -> list[dict[str, Any]] | None:
    """The arguments of a batched model call for each part of its rows, or None where it is not clear what is a row's.

    Args:
        values: arguments by name; tensors may be nested in dicts, lists and tuples.
        per_row: names whose tensors have a row of dim 0 per row of the batch, or one row for all.
        rows: rows of the batch.
        parts: the rows of each part.
    """
    for name, value in values.items():
        sizes = {tensor.shape[0] for tensor in tensors(value) if tensor.ndim}
        if (name in per_row and not sizes <= {1, rows}) or (name not in per_row and rows in sizes):
            return None
    return [{name: _rows(value, rows, part) for name, value in values.items()} for part in parts]


def join(outputs: Sequence[Any]) -> Any:
    """The output of a whole batch from those of its parts: tensors, or equally long lists or tuples of tensors."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    return type(first)(join(same) for same in zip(*outputs, strict=True))


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors nested in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in nested for tensor in tensors(item)]


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested dicts, lists and tuples, with `change` of everything else in them."""
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(item, change) for item in value)
    return change(value)


def _rows(value: Any, rows: int, part: Span) -> Any:
    def cut(item: Any) -> Any:
        whole = isinstance(item, torch.Tensor) and item.ndim and item.shape[0] == rows
        return item[slice(*part)] if whole else item

    return mapped(value, cut)
