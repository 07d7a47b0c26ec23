"""Recorded model calls: which are alike, what is repeated, and what is left as it is. On a CPU a tape calls again."""

from __future__ import annotations

import uuid
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from comfy_raylight.raylight.comm import Comm, Meter
from comfy_raylight.workers.worker import recorded
from comfy_raylight.workers.worker.recorded import Recordings, Unrecordable, Waits, described

CPU = torch.device("cpu")


class Control(Comm):
    """The connection to another rank that is played: `other` is what it says next, 0 where it agrees."""

    other: tuple[int, ...] = ()

    def all_reduce(self, x: torch.Tensor, *, op: Any = "sum") -> torch.Tensor:
        said, self.other = self.other, ()
        return torch.maximum(x, torch.tensor(said)) if said else x


class Counting:
    """A model's call that counts how it was reached."""

    def __init__(self) -> None:
        self.log: list[str] = []
        comm = Comm(None, ranks=(0,), rank=0, meter=Meter())
        self.control = Control(None, ranks=(0,), rank=0, meter=Meter())
        self.recordings = Recordings(CPU, comm, self.control)
        self.fails = ""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append("as it is")
        return self.compute(*args, **kwargs)

    def bare(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append("bare")
        if self.fails:
            raise RuntimeError(self.fails)
        return self.compute(*args, **kwargs)

    def compute(self, x: torch.Tensor, scale: float = 1.0, *, options: Any = None) -> Any:
        return [x * scale, {"sum": x.sum()}]

    def run(self, *args: Any, state: Hashable = 0, **kwargs: Any) -> Any:
        return self.recordings.run(self.call, self.bare, args, kwargs, state=state)


def test_the_second_call_of_a_kind_is_recorded_and_others_repeat_it() -> None:
    model = Counting()
    kept = []
    for number in range(5):
        x = torch.full((2, 3), float(number))
        kept.append(model.run(x, 2.0, options={"sigmas": x[0], "uuids": [uuid.uuid4()]}))
    assert model.log == ["as it is"] + ["bare"] * 4
    for number, (output, more) in enumerate(kept):
        assert torch.equal(output, torch.full((2, 3), 2.0 * number)) and more["sum"] == 6 * number
    assert model.recordings.count == 1


def test_another_shape_value_or_state_is_another_call() -> None:
    model = Counting()
    x = torch.ones(2, 3)
    for args in ((x,), (x[:1],), (x, 2.0), (x, 2), (x.half(),), (x, True)):
        model.run(*args)
    assert model.log == ["as it is"] * 6
    model.run(x)
    assert model.recordings.count == 1
    for _ in range(2):
        model.run(x, state=1)
    assert model.log[6:] == ["bare", "as it is", "bare"]
    assert model.recordings.count == 1, "of the first state nothing is left"
    model.recordings.clear()
    assert model.recordings.count == 0


def test_calls_with_functions_run_as_they_are() -> None:
    model = Counting()
    for _ in range(4):
        model.run(torch.ones(1), options={"patches": {"attn1_patch": [print]}})
    assert model.log == ["as it is"] * 4


def test_what_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(recorded.Again):
        def __init__(self, device: torch.device, call: Any, pool: Any) -> None:
            super().__init__(device, call, pool)
            call()

    model = Counting()
    model.fails = "the device was asked for a value"
    model.recordings._tape = Failing
    for _ in range(4):
        assert torch.equal(model.run(torch.ones(1))[0], torch.ones(1))
    assert model.log == ["as it is", "bare", *["as it is"] * 3]
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert model.fails in message


def test_long_calls_are_left_to_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "LONG_S", 0.0)
    model = Counting()
    for _ in range(recorded.TRIES + 2):
        model.run(torch.ones(1))
    assert set(model.log) == {"as it is"}


def test_ranks_repeat_a_call_together() -> None:
    """Another rank has moved its weights: it has no recording, and nothing to tell whether it can make one."""
    model, x = Counting(), torch.ones(1)
    for _ in range(3):
        model.run(x)
    model.control.other = (1, 1)
    model.run(x)
    assert model.log == ["as it is", "bare", "bare", "as it is"]
    kept = model.recordings._known.copy()
    tapes = [known.tape for known in kept.values()]
    model.control.other = (1, 0)
    model.run(x)
    assert model.log[4:] == ["bare"] and model.recordings.count == 1
    assert all(known.tape is not tape for known, tape in zip(kept.values(), tapes, strict=True)), "made anew"


def test_few_recordings_are_kept() -> None:
    model = Counting()
    for length in range(1, recorded.KEPT + 3):
        for _ in range(2):
            model.run(torch.ones(length))
    assert model.recordings.count == recorded.KEPT


@pytest.mark.parametrize("steps", [2, 1 + recorded.WORTH])
def test_more_kinds_of_calls_than_are_kept_do_not_push_each_other_out(steps: int) -> None:
    """As many regions of a picture do, a call each in every step; pictures of other sizes one after another may."""
    model, kinds = Counting(), range(1, recorded.KEPT + 2)
    regions = [torch.ones(length) for _ in range(6) for length in kinds]
    pictures = [torch.ones(length) for _ in range(2) for length in kinds for _ in range(steps)]
    for x in regions:
        model.run(x)
    refused = [known.refused for known in model.recordings._known.values()]
    assert sum(refused) == 1 and model.recordings.count == recorded.KEPT
    model.recordings.clear()
    for x in pictures:
        model.run(x)
    assert sum(known.refused for known in model.recordings._known.values()) == (0 if steps > recorded.WORTH else 1)


def test_a_tensor_that_comes_twice_is_one_input() -> None:
    x, inputs = torch.ones(2), []  # type: ignore[var-annotated]
    same = described(([x, x], {"a": x}), inputs, CPU)
    assert len(inputs) == 1 and inputs[0] is x
    assert same != described(([x, x.clone()], {"a": x}), [], CPU)


def test_a_tensor_of_another_device_counts_by_its_values() -> None:
    def key(*values: float) -> Hashable:
        return described(torch.tensor(values), [], torch.device("meta"))

    assert key(1, 2) == key(1, 2) != key(1, 3)
    with pytest.raises(Unrecordable, match="values on cpu"):
        described(torch.zeros(recorded.SMALL + 1), [], torch.device("meta"))


def test_a_device_without_a_number_is_that_of_tensors_with_one() -> None:
    inputs: list[torch.Tensor] = []
    described(torch.zeros(2, device="meta"), inputs, torch.device("meta", 0))
    assert len(inputs) == 1


def test_a_device_waits_for_python_where_all_of_a_call_is_spent_on_starting_it() -> None:
    waits = Waits()
    assert waits.open
    known = ((0.2, (False, True)), (0.1, (False, True)), (0.1, (False, True)), (0.101, (True, True)))
    for took, expected in (*known, (0.2, (False, False)), (0.1, (False, True))):
        waits.note(0.099, took)
        assert (waits.seen, waits.open) == expected
    for _ in range(Waits.CALLS + 1):
        waits.note(2.0, 2.0)
    assert not waits.seen, "long calls wait for computing"


def test_no_cpu_records_by_itself() -> None:
    assert not recorded.by_itself(CPU)
