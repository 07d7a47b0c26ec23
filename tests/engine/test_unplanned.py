"""Models without a written plan on the ranks of a worker: shared and right, computed whole, or refused; never wrong."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.raylight.errors import Cancelled, UnsupportedError
from comfy_raylight.raylight.found.simulated import on_ranks
from comfy_raylight.raylight.found.small import small
from comfy_raylight.raylight.found.values import apart
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.workers.worker.kept_plans import KeptPlans, folder
from comfy_raylight.workers.worker.unplanned import Unplanned

from .found_toys import Inputs, Toy, picture

RANKS = 2
HEARD = 2
"""Exchanges by which the first rank tells the others: of the size of what it tells, and of that."""
SEEN = {
    "late_mean": "for a part of its tokens",
    "late_between": "tokens are changed before blocks.1",
    "late_values": "for a part of its tokens",
}
"""They mix tokens only where there are many, or only for large values: no proof on small inputs shows it."""


def toy(kind: str) -> Toy:
    torch.manual_seed(0)
    return Toy(kind).eval().requires_grad_(False)


class Ranks:
    """What came of some calls on each rank: outputs, how many collectives they took, and what was said."""

    def __init__(
        self, kind: str, *calls: Inputs, ranks: int = RANKS, changed: str = "", more: Any = None, kept: Any = None
    ) -> None:
        self.model, self.calls = toy(kind), calls

        def job(mesh: Mesh) -> tuple[list[Any], list[int], list[tuple[int, str]]]:
            mine = copy.deepcopy(self.model)
            keeps = kept(mesh, mine) if kept else None
            known = Unplanned(mine, mesh, None, grain=2, kept=lambda: keeps)
            outputs, counts = [], []
            for args, kwargs in copy.deepcopy(calls):
                before = mesh.collectives
                outputs.append(
                    known.run("forward", run, (args, kwargs), state="", changed=changed, **(more(mesh) if more else {}))
                )
                counts.append(mesh.collectives - before)
            return outputs, counts, list(known._lines)

        def run(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return function(*args, **kwargs)

        self.every = on_ranks(ranks, job)
        _, self.counts, self.lines = self.every[0]

    def right(self) -> bool:
        """Whether all ranks gave what the model gives alone."""
        for number, (args, kwargs) in enumerate(copy.deepcopy(self.calls)):
            wanted = self.model(*args, **kwargs)
            if any(apart(outputs[number], wanted) > 1e-6 for outputs, _, _ in self.every):
                return False
        return True

    def said(self, level: int) -> list[str]:
        return [text for at, text in self.lines if at == level]


def test_it_is_found_and_shared() -> None:
    ranks = Ranks("right", picture(), picture(), picture(9, 12))
    assert ranks.right()
    (line,) = ranks.said(logging.INFO)
    assert "Toy has no plan of its own: one was found and checked in" in line and "3 blocks, tokens at dim 1" in line
    assert not ranks.said(logging.WARNING)
    # each block on all tokens at first, and again for another size; one of three in between
    first, second, other = ranks.counts
    assert first > second > 0 and other > second


@pytest.mark.parametrize("kind", ["mean", "conv_inline", "position_table", "state_hidden", "global_max", "draws"])
def test_a_wrong_model_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot split the model family Toy.*none was found: .*Set ulysses_deg"):
        Ranks(kind, picture())


def test_another_kind_is_proved_anew_or_computed_whole() -> None:
    one, batch = picture(batch=1), picture(batch=2)
    ranks = Ranks("right", one, batch, one)
    assert ranks.right() and len(ranks.said(logging.INFO)) == 2
    # proved for one picture, and wrong for two
    ranks = Ranks("batch_mean", one, batch, one, batch)
    assert ranks.right()
    (line,) = ranks.said(logging.WARNING)
    assert "whole: they are of another kind" in line
    # in the second call the ranks only hear of what was found out about it
    assert ranks.counts[0] > ranks.counts[1] == HEARD and ranks.counts[2] > 0 == ranks.counts[3]


@pytest.mark.parametrize("kind", SEEN)
def test_what_small_inputs_do_not_show_is_seen_in_the_call(kind: str) -> None:
    few, many = picture(), picture(12, 20, text=30)
    if kind == "late_values":
        many[0][0].mul_(1e4)
    ranks = Ranks(kind, few, few, many, many, few)
    assert ranks.right()
    (line,) = ranks.said(logging.WARNING)
    assert "is dropped" in line and SEEN[kind] in line
    assert ranks.counts[1] > 0 == ranks.counts[3] == ranks.counts[4]


def test_what_comes_later_is_seen_in_one_of_the_next_calls() -> None:
    """Values change while sizes do not: each call compares one block, so that three compare all."""
    large = picture()
    large[0][0].mul_(1e4)
    ranks = Ranks("late_values_last", picture(), *[large] * 3)
    assert any("is dropped" in line for line in ranks.said(logging.WARNING))
    # the call in which it is seen is computed whole, as are all after it
    assert apart(ranks.every[0][0][-1], ranks.model(*large[0], **large[1])) < 1e-6


def test_other_forms_inside_are_seen() -> None:
    """The same kind of call outside, and other arguments of its blocks: code of the model looks at values."""
    other = picture()
    other[0][2].zero_()
    ranks = Ranks("other_form", picture(), other, other)
    assert ranks.right()
    (line,) = ranks.said(logging.WARNING)
    assert "another form" in line


def test_patches_have_it_computed_whole() -> None:
    def patch(*_: Any) -> None:
        raise AssertionError("no toy calls patches")

    args, _ = picture()
    patched = args, {"transformer_options": {"patches": {"attn1_patch": [patch]}}}
    ranks = Ranks("right", patched)
    assert ranks.right() and ranks.counts == [0]
    assert "test_patches_have_it_computed_whole" in ranks.said(logging.WARNING)[0]
    ranks = Ranks("right", picture(), changed="blocks.1.attn")
    assert ranks.right() and ranks.counts == [0]


def test_cancel_ends_the_search_on_all_ranks() -> None:
    asked = []

    def more(mesh: Mesh) -> dict[str, Any]:
        def cancelled() -> bool:
            asked.append(mesh.rank)
            return len(asked) > 10

        return {"cancelled": cancelled}

    with pytest.raises(Cancelled):
        Ranks("right", picture(), more=more)
    assert set(asked) == {0} and len(asked) == 11


def test_large_inputs_are_made_small() -> None:
    model, seen = toy("right"), []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[0].shape)
        return model(*args, **kwargs)

    args, _ = small(forward, picture(128, 96, text=512))
    assert args[0].shape[2] < 16 and args[0].shape[3] < 24 and args[2].shape[1] < 24
    assert args[0].shape[2] != args[0].shape[3] and args[2].shape[2] == 6
    # nothing was run at its real size
    assert all(shape.numel() < 128 * 96 for shape in seen)


class Kept:
    """A model file of its own, and the cache folder."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        self.file = tmp_path / "model.safetensors"
        self.file.write_bytes(b"weights" * 1000)

    def run(self, kind: str, *calls: Inputs, change: Callable[[Any], None] = lambda model: None) -> Ranks:
        def more(mesh: Mesh, model: Any) -> Any:
            change(model)
            return KeptPlans([str(self.file)], model)

        return Ranks(kind, *calls, kept=more)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(tmp_path, monkeypatch)


def test_a_proof_is_kept(kept: Kept) -> None:
    first = kept.run("right", picture())
    assert "found and checked" in first.said(logging.INFO)[0] and len(list(folder().glob("*.json"))) == 1
    again = kept.run("right", picture(), picture(9, 12))
    assert again.right() and "from an earlier start" in again.said(logging.INFO)[0]
    # the calls themselves are compared all the same
    assert again.counts[0] - HEARD == first.counts[0] - HEARD


def other_file(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    kept.file.write_bytes(b"another" * 1000)
    return {}


def other_structure(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As a LoRA that is a module of its own."""
    return {"change": lambda model: model.blocks[0].add_module("lora", torch.nn.Identity())}


def other_version(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    return {}


def damaged(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (file,) = folder().glob("*.json")
    file.write_text(file.read_text().replace('"Split"', '"Eval"'))
    return {}


@pytest.mark.parametrize("other", [other_file, other_structure, other_version, damaged])
def test_a_proof_is_kept_for_nothing_else(kept: Kept, monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    kept.run("right", picture())
    more = other(kept, monkeypatch)
    again = kept.run("right", picture(), **more)
    assert "found and checked" in again.said(logging.INFO)[0]


def test_weights_of_another_dtype_have_another_name(kept: Kept) -> None:
    one, other = toy("right"), toy("right").to(torch.bfloat16)
    names = {str(KeptPlans([str(kept.file)], model)._path("kind")) for model in (one, one, other)}
    assert len(names) == 2


def test_a_kept_proof_that_a_call_contradicts_is_forgotten(kept: Kept) -> None:
    kept.run("late_mean", picture())
    assert list(folder().glob("*.json"))
    ranks = kept.run("late_mean", picture(12, 20, text=30))
    assert ranks.right() and "is dropped" in ranks.said(logging.WARNING)[0]
    assert not list(folder().glob("*.json"))
