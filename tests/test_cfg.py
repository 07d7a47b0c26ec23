"""CFG parallelism without a pool: tasks that ask together, who serves whom, and batches divided by rows."""

from __future__ import annotations

import contextvars
import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from comfy_raylight.raylight import cfg
from comfy_raylight.raylight.cfg import Together


class Oracle:
    """Answers every question with itself in brackets, and remembers who asked together."""

    def __init__(self, at_most: int = 99) -> None:
        self.asked: list[dict[int, Any]] = []
        self._at_most = at_most

    def __call__(self, questions: Mapping[int, Any]) -> dict[int, Any]:
        self.asked.append(dict(questions))
        return {number: f"<{questions[number]}>" for number in list(questions)[: self._at_most]}


def asking(together: Together, name: str, count: int, said: list[str]) -> Callable[[], str]:
    """A task that asks `count` questions and writes down when it runs."""

    def task() -> str:
        for number in range(count):
            said.append(f"{name}{number}")
            answer = together.ask(f"{name}{number}")
            assert answer == f"<{name}{number}>"
        said.append(f"{name} ends")
        return name

    return task


def test_questions_are_answered_together_and_tasks_take_turns() -> None:
    together, oracle, said = Together(), Oracle(), []  # type: ignore[var-annotated]
    tasks = [asking(together, "a", 2, said), asking(together, "b", 1, said), asking(together, "c", 0, said)]
    assert together.run(tasks, oracle) == ["a", "b", "c"]
    assert oracle.asked == [{0: "a0", 1: "b0"}, {0: "a1"}]
    assert said == ["a0", "b0", "c ends", "a1", "b ends", "a ends"]


def test_what_is_not_answered_waits_and_comes_first() -> None:
    together, oracle, said = Together(), Oracle(at_most=2), []  # type: ignore[var-annotated]
    assert together.run([asking(together, name, 2, said) for name in "abc"], oracle) == ["a", "b", "c"]
    assert [list(asked.values()) for asked in oracle.asked] == [
        ["a0", "b0", "c0"],
        ["c0", "a1", "b1"],
        ["b1", "c1"],
    ]


def test_no_task() -> None:
    assert Together().run([], Oracle()) == []


class Unwinding:
    """A task that notes that it was left, as a `finally` of ComfyUI's would."""

    def __init__(self, together: Together) -> None:
        self.left = False
        self._together = together

    def __call__(self) -> None:
        try:
            self._together.ask("me")
        finally:
            self.left = True


class Interrupt(BaseException):
    """As newer ComfyUI's InterruptProcessingException."""


@pytest.mark.parametrize("error", [ValueError("one task"), Interrupt()])
@pytest.mark.parametrize("when", ["before asking", "after its answer", "in the answer"])
def test_first_exception_ends_all(error: BaseException, when: str) -> None:
    together = Together()
    before, after = Unwinding(together), Unwinding(together)
    started: list[str] = []

    def failing() -> None:
        if when == "before asking":
            raise error
        together.ask("failing")
        started.append("answered")
        raise error

    def answer(questions: Mapping[int, Any]) -> dict[int, Any]:
        if when == "in the answer":
            raise error
        return {1: None}

    tasks: list[Callable[[], Any]] = [before, failing, after]
    with pytest.raises(type(error)) as caught:
        together.run(tasks, answer)
    assert caught.value is error
    assert before.left
    assert after.left == (when != "before asking"), "a task that was not begun is not begun any more"
    assert bool(started) == (when == "after its answer")
    assert not together.inside()


def test_a_task_cannot_refuse_to_end(caplog: pytest.LogCaptureFixture) -> None:
    together, tries = Together(), []

    def stubborn() -> None:
        for number in range(3):
            try:
                together.ask(number)
            except BaseException:
                tries.append(number)
        raise KeyError("while it was ended")

    def failing() -> None:
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        together.run([stubborn, failing], Oracle())
    assert tries == [0, 1, 2]
    assert "while it was ended" in caplog.text


def test_tasks_run_in_the_callers_thread_and_state() -> None:
    """What is local to a thread, or to a context, is the caller's before and after every question."""
    together, variable = Together(), contextvars.ContextVar("variable", default=0)
    seen: list[tuple[Any, ...]] = []

    def look() -> None:
        seen.append((threading.get_ident(), torch.is_inference_mode_enabled(), variable.get()))

    def task() -> None:
        look()
        together.ask(None)
        look()

    def answer(questions: Mapping[int, Any]) -> dict[int, Any]:
        look()
        return dict(questions)

    variable.set(7)
    threads = threading.active_count()
    with torch.inference_mode():
        together.run([task, task], answer)
    assert set(seen) == {(threading.get_ident(), True, 7)} and len(seen) == 5
    assert threading.active_count() == threads
    assert not torch.is_inference_mode_enabled()


def test_inside_is_about_this_object() -> None:
    """A task of one may run another, and is inside of its own only."""
    outer, inner = Together(), Together()
    seen: list[tuple[bool, bool]] = []

    def deep() -> str:
        seen.append((outer.inside(), inner.inside()))
        answer: str = inner.ask("deep")
        return answer

    def task() -> list[str]:
        seen.append((outer.inside(), inner.inside()))
        return [*inner.run([deep, deep], Oracle()), outer.ask("task")]

    assert outer.run([task], Oracle()) == [["<deep>", "<deep>", "<task>"]]
    assert seen == [(True, False), (False, True), (False, True)]
    assert (outer.inside(), inner.inside()) == (False, False)


def test_nothing_is_kept() -> None:
    """Neither tasks nor what they close over live on, without the garbage collector's help."""

    class Heavy:
        alive = 0

        def __init__(self) -> None:
            Heavy.alive += 1

        def __del__(self) -> None:
            Heavy.alive -= 1

    together = Together()

    def tasks() -> Iterator[Callable[[], None]]:
        for _ in range(2):
            heavy = Heavy()
            yield lambda heavy=heavy: together.ask(heavy)  # type: ignore[misc]

    gc.disable()
    try:
        together.run(list(tasks()), dict.fromkeys)
        assert Heavy.alive == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "tasks,groups,expected",
    [
        ([0, 1], 2, {0: 0, 1: 1}),
        ([0, 1, 2], 2, {0: 0, 1: 1}),
        ([2], 2, {2: 0}),
        ([2, 0], 2, {2: 0, 0: 1}),
        ([2, 0, 1], 2, {2: 0, 0: 1}),
        ([1, 0], 2, {1: 1, 0: 0}),
        ([0, 1], 4, {0: 0, 1: 1}),
        ([0, 3, 4], 3, {0: 0, 4: 1, 3: 2}),
        ([0, 3, 1], 3, {0: 0, 1: 1, 3: 2}),
        ([5], 1, {5: 0}),
        ([], 2, {}),
    ],
)
def test_assign(tasks: list[int], groups: int, expected: dict[int, int]) -> None:
    assert cfg.assign(tasks, groups) == expected


@pytest.mark.parametrize(
    "conds,groups,expected",
    [
        (2, 2, [(0, 1), (1, 2)]),
        (3, 2, [(0, 2), (2, 3)]),
        (2, 4, [(0, 1), (1, 2)]),
        (5, 3, [(0, 2), (2, 4), (4, 5)]),
        (1, 2, [(0, 1)]),
    ],
)
def test_spans(conds: int, groups: int, expected: list[cfg.Span]) -> None:
    assert sorted(cfg.spans(conds, groups)) == expected


def test_rows_of_a_batch() -> None:
    rows = torch.arange(4)
    values = {
        "x": [rows.view(4, 1), 10 * rows.view(4, 1, 1)],
        "t": rows.float(),
        "y": torch.ones(1, 3),
        "scale": torch.tensor(2.0),
        "control": {"middle": [rows, None], "name": "c"},
        "shapes": [(4, 2)],
        "table": torch.ones(3),
    }
    parts = cfg.divide(values, per_row={"x", "t", "y", "control", "scale"}, rows=4, parts=[(0, 2), (2, 4)])
    assert parts is not None
    for part, own in zip(parts, (rows[:2], rows[2:]), strict=True):
        assert torch.equal(part["x"][0], own.view(2, 1)) and torch.equal(part["x"][1], 10 * own.view(2, 1, 1))
        assert torch.equal(part["t"], own.float()) and torch.equal(part["control"]["middle"][0], own)
        assert all(part[name] is values[name] for name in ("y", "scale", "table"))
        assert part["shapes"] == [(4, 2)] and part["control"]["name"] == "c"


@pytest.mark.parametrize("name,shape", [("x", (3, 2)), ("unknown", (4, 2))])
def test_unclear_rows_are_not_divided(name: str, shape: tuple[int, ...]) -> None:
    """Neither rows of another number in what has a row per row, nor as many rows in what may have none."""
    values = {"t": torch.ones(4), name: [torch.ones(shape)]}
    assert cfg.divide(values, per_row={"t", "x"}, rows=4, parts=[(0, 2), (2, 4)]) is None


def test_outputs_are_joined_in_order() -> None:
    one, two = torch.zeros(1, 2), torch.ones(2, 2)
    assert torch.equal(cfg.join([one, two]), torch.cat([one, two]))
    joined = cfg.join([[one, 2 * one], [two, 2 * two]])
    assert isinstance(joined, list) and torch.equal(joined[1], torch.cat([2 * one, 2 * two]))
