"""Plans that are found: right where they are proved, or refused; none passes on a model that cannot be divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_raylight.raylight import cuts, plan
from comfy_raylight.raylight.cuts import Split
from comfy_raylight.raylight.errors import UnsupportedError
from comfy_raylight.raylight.found import cuts as found_cuts
from comfy_raylight.raylight.found import find as found
from comfy_raylight.raylight.found import proof
from comfy_raylight.raylight.found.cuts import Count, Nested
from comfy_raylight.raylight.found.simulated import on_ranks
from comfy_raylight.raylight.found.source import source
from comfy_raylight.raylight.found.values import Refused, apart
from comfy_raylight.raylight.layout import Layout, Segment
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.plan import Plan

from .found_toys import Toy, Twins, line, picture

TRUNK = ("right", "batch_statistic", "told_length")
AROUND = ("between", "between_method", "dropped", "added", "two_lists")
"""The model works on tokens between its blocks."""
WHOLE = {
    "conv_module": "blocks.*.conv",
    "group_norm": "blocks.*.gn",
    "bypass_module": "blocks.*.attn",
    "causal_mask": "blocks.*.attn",
    "length_in_q": "blocks.*.attn",
    "length_in_scale": "blocks.*.attn",
}
"""A module looks at all tokens, and can be given them."""
REFUSED = (
    "mean",
    "mean_small",
    "conv_inline",
    "position_table",
    "cumsum",
    "roll",
    "first_token",
    "keep_indices",
    "draws",
    "global_max",
    "length_in_output",
    "rope_attribute",
    "rope_inside",
    "rope_cache",
    "state_attribute",
    "state_options",
    "state_hidden",
    "bypass_inline",
)


def toy(kind: str) -> Toy:
    torch.manual_seed(0)
    return Toy(kind).eval().requires_grad_(False)


def proved(model: torch.nn.Module, inputs: Any) -> Plan:
    """The plan that is found and proved for a model.

    Raises:
        Refused: there is none.
    """
    known = found.find(model, model.forward, inputs)
    return proof.prove(model, "forward", known.plan, known.inputs).plan


def error(model: torch.nn.Module, plan: Plan, inputs: Any, size: int) -> float:
    """The largest difference of what ranks return to the model's own, for inputs that no proof had."""
    args, kwargs = inputs
    wanted = model(*args, **kwargs)
    return max(apart(out[0], wanted) for out in proof.divided(model, "forward", plan, inputs, size))


def check_others(model: torch.nn.Module, plan: Plan) -> None:
    """The plan holds for other sizes, values and numbers of ranks."""
    for size in (2, 4):
        assert error(model, plan, picture(4, 11, 13), size) < 1e-6


@pytest.mark.parametrize("kind", TRUNK)
def test_it_is_cut_once(kind: str) -> None:
    model = toy(kind)
    made = proved(model, picture())
    assert [(region.per_block, region.whole) for region in made.regions] == [(False, ())]
    check_others(model, made)


@pytest.mark.parametrize("kind", AROUND)
def test_it_is_cut_around_blocks(kind: str) -> None:
    model = toy(kind)
    made = proved(model, picture())
    assert all(region.per_block for region in made.regions)
    check_others(model, made)


@pytest.mark.parametrize("kind, path", WHOLE.items())
def test_a_module_gets_all_tokens(kind: str, path: str) -> None:
    model = toy(kind)
    made = proved(model, picture())
    assert [whole.at for region in made.regions for whole in region.whole] == [path]
    check_others(model, made)


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused(kind: str) -> None:
    with pytest.raises(Refused, match=r"\S"):
        proved(toy(kind), picture())


@pytest.mark.parametrize("text", [11, 22, 7])
def test_streams_of_equal_length_are_told_apart(text: int) -> None:
    torch.manual_seed(0)
    model = Twins().eval().requires_grad_(False)
    made = proved(model, line(11, text))
    for other in (line(9, 14), line(14, 9), line(13, 13)):
        assert error(model, made, other, 3) < 1e-6


def test_it_prints_as_it_is_written() -> None:
    """What is printed makes an equal plan."""
    names = {**vars(cuts), **vars(found_cuts), **vars(plan)}
    for kind in ("told_length", "between", "conv_module"):
        made = proved(toy(kind), picture())
        assert eval(source(made), dict(names)) == made


def test_a_wrong_plan_is_not_proved() -> None:
    """The proof by itself, without the search before it."""
    model = toy("right")
    known = found.find(model, model.forward, picture())
    for wrong in (toy("mean"), toy("position_table"), toy("state_hidden"), toy("bypass_module"), toy("draws")):
        with pytest.raises(Refused):
            proof.prove(wrong, "forward", known.plan, known.inputs)


def test_small_errors_are_seen() -> None:
    """In bf16 a mean times 1e-3 would pass: proofs are in fp32."""
    model = toy("right")
    known = found.find(model, model.forward, picture())
    rounding = toy("rounds")
    with pytest.raises(Refused, match="16 bits"):
        found.find(rounding, rounding.forward, picture())
    with pytest.raises(Refused, match="differs"):
        proof.prove(toy("mean_small"), "forward", known.plan, known.inputs)


def test_ranks_that_come_apart_are_ended() -> None:
    """Nobody waits for a rank that failed, and different exchanges are not taken for each other."""

    def fails(mesh: Mesh) -> None:
        if mesh.rank == 1:
            raise ValueError("by itself")
        mesh.sequence.broadcast(torch.zeros(1))

    def differs(mesh: Mesh) -> None:
        x = torch.zeros(1)
        if mesh.rank:
            mesh.sequence.broadcast(x)
        else:
            mesh.sequence.all_reduce(x)

    with pytest.raises(ValueError, match="by itself"):
        on_ranks(3, fails)
    with pytest.raises(RuntimeError, match="different exchanges"):
        on_ranks(2, differs)


def test_a_number_of_tokens_is_cut() -> None:
    layout = Layout(segments=(Segment("txt", 5), Segment("img", 7)), rank=1, size=2)
    assert Count("txt", "img")(12, layout) == layout.local(("txt", "img"))
    with pytest.raises(UnsupportedError, match="another number"):
        Count("img")(12, layout)


def test_another_form_is_refused() -> None:
    """A plan is for arguments of the form that it was found with."""
    layout = Layout(segments=(Segment("x", 4),), rank=0, size=2)
    entry = Nested({(0,): Split(1)}, (0,), (1,))
    tokens, other = torch.arange(8.0).view(1, 4, 2), torch.ones(2)
    cut = entry((tokens, other), layout)
    assert torch.equal(cut[0], tokens[:, :2]) and cut[1] is other
    with pytest.raises(UnsupportedError, match="another form"):
        entry((tokens, other, other), layout)
