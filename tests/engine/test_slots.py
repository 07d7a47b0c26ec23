"""Where arguments are found: by position, by keyword, inside tuples, behind *args and **kwargs."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_raylight.raylight.errors import PlanError
from comfy_raylight.raylight.sequence.slots import Slot, modules
from torch import nn


def function(x: Any, pair: Any = None, *, only: Any = None, **rest: Any) -> None: ...


@pytest.mark.parametrize(
    "path, args, kwargs, value",
    [
        ("x", (1,), {}, 1),
        ("x", (), {"x": 1}, 1),
        ("pair", (0, (1, 2)), {}, (1, 2)),
        ("pair.1", (0, (1, 2)), {}, 2),
        ("pair.0", (0,), {"pair": [1, 2]}, 1),
        ("pair.0", (0,), {}, None),
        ("only", (0,), {"only": 3}, 3),
        ("extra", (0,), {"extra": 4}, 4),
        ("extra", (0,), {}, None),
        (1, (0, 5), {}, 5),
    ],
)
def test_read_and_write(path: str | int, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
    slot = Slot.find(function, path)
    assert slot is not None and slot.read(args, kwargs) == value
    if value is None:
        return
    written, named = list(args), dict(kwargs)
    slot.write(written, named, "new")
    assert slot.read(written, named) == "new"
    # what the caller holds is not changed
    assert slot.read(args, kwargs) == value
    assert len(written) == len(args) and named.keys() == kwargs.keys()


def test_a_holder_keeps_its_type() -> None:
    slot = Slot.find(function, "pair.0")
    assert slot is not None
    for pair, changed in (((1, 2), (9, 2)), ([1, 2], [9, 2])):
        args: list[Any] = [0, pair]
        slot.write(args, {}, 9)
        assert args[1] == changed


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match="Linear has no argument tokens"):
        Slot.need(nn.Linear(1, 1), "tokens")
    with pytest.raises(PlanError, match="Linear has no module blocks"):
        modules(nn.Linear(1, 1), "blocks.*")


def test_paths() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": nn.Identity()}) for _ in range(3)])})
    assert modules(model, "") == [model]
    assert len(modules(model, "blocks.*")) == len(modules(model, "blocks.*.attn")) == 3
