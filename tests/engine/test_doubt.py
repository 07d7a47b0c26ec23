"""What tells kinds of calls apart, and what counts as a difference in a real call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_raylight.raylight.comm import Comm
from comfy_raylight.raylight.found.doubt import Doubt, Thorough
from comfy_raylight.raylight.found.kinds import Forms, kind_of, normal, sizes_of
from comfy_raylight.raylight.mesh import Mesh
from torch import nn

TOKENS, WIDTH = 4000, 64


def call(rows: int = 4, batch: int = 1, **more: Any) -> Any:
    x = torch.randn(batch, 4, rows, 6)
    return (x, torch.ones(batch)), {"context": torch.randn(batch, 7, 8), "transformer_options": {"sigmas": x}, **more}


def test_sizes_and_values_are_no_kinds() -> None:
    args, kwargs = call(rows=9)
    kwargs["transformer_options"] = {"sigmas": torch.ones(3), "uuids": [1], "cond_or_uncond": [0]}
    assert kind_of((args, kwargs)) == kind_of(call())
    assert sizes_of((args, kwargs)) != sizes_of(call()) == sizes_of(call())


def test_steps_are_no_kinds() -> None:
    """A node may count them in the options: neither is a plan looked for at each, nor every block compared."""
    one, other = (call(transformer_options={"sigmas": None, "step": step, "cond_or_uncond": [0]}) for step in (1, 2))
    assert kind_of(one) == kind_of(other) and sizes_of(one) == sizes_of(other)
    both = call(transformer_options={"sigmas": None, "step": 1, "cond_or_uncond": [1]})
    assert kind_of(one) == kind_of(both) and sizes_of(one) != sizes_of(both)


OTHERS: dict[str, Any] = {
    "a batch": call(batch=2),
    "a mask": call(mask=torch.ones(1, 7, dtype=torch.bool)),
    "a reference": call(ref_latents=[torch.ones(1, 4, 3, 5)]),
    "two references": call(ref_latents=[torch.ones(1, 4, 3, 5)] * 2),
    "a map of one row": call(rows=1),
    "a control": call(control={"output": [torch.ones(1, 24, 8)]}),
    "a switch": call(embedded=True),
    "a way": call(method="offset"),
    "another way": call(method="index"),
    "a strength": call(strength=0.5),
    "none of it": call(strength=0.0),
    "other options": call(transformer_options={"patches": {}}),
    "16 bits": ((call()[0][0].half(), torch.ones(1)), call()[1]),
}


def test_kinds_are_told_apart() -> None:
    kinds = {name: kind_of(other) for name, other in {"": call(), **OTHERS}.items()}
    assert len(set(kinds.values())) == len(kinds), kinds


def test_options_get_their_name() -> None:
    def forward(x: Any, t: Any, context: Any, transformer_options: Any = None, **more: Any) -> None: ...

    args, kwargs = normal(forward, ((1, 2, 3, {"cond_or_uncond": [0]}), {"mask": 4}))
    assert args == (1,)
    assert kwargs == {"t": 2, "context": 3, "transformer_options": {"cond_or_uncond": [0]}, "mask": 4}


class Block(nn.Module):
    """Takes what blocks take."""

    def forward(self, x: Any, pe: Any = None, mask: Any = None, transformer_options: Any = None) -> Any:
        return x


def test_forms_do_not_depend_on_the_rank() -> None:
    form = Forms(Block(), ("x",))
    few, many = torch.ones(2, 1, 8), torch.ones(2, 9, 8)
    assert form((few, many), {}) == form((many,), {"pe": many, "transformer_options": {}})
    assert form((few, many), {}) != form((many, few), {})
    assert form((few,), {}) != form((few,), {"mask": True}) != form((few,), {"mask": False})


def judged(part: torch.Tensor, wanted: torch.Tensor) -> str:
    comparison = Thorough(Doubt({}), frozenset({"block"}), watch=False)
    comparison.expect("block", (wanted,))
    comparison.note("block", (part,))
    return comparison.why(alone())


def alone() -> Comm:
    return Mesh.single().sequence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    exact = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    noise = torch.finfo(dtype).eps / 4 * torch.randn_like(exact)
    assert judged((exact * (1 + noise)).to(dtype), exact.to(dtype)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_of_many_is_a_difference(dtype: torch.dtype) -> None:
    wanted = torch.randn(1, TOKENS, WIDTH).to(dtype)
    part = wanted.clone()
    part[:, -1] *= 1.5
    assert "block gives something else for a part of its tokens" in judged(part, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_a_difference_unless_it_is_none_on_both_sides(value: float) -> None:
    wanted = torch.randn(1, TOKENS, WIDTH)
    part = wanted.clone()
    part[0, 0, 0] = value
    assert judged(part, wanted) and judged(wanted, part)
    assert judged(part, part.clone()) == ""
