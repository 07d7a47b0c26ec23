"""Shapes that tensors of a file have in the model: what follows from the model's, and what does not."""

from __future__ import annotations

import pytest
from comfy_raylight.workers.mapping.shapes import Misfits, Shape, Shapes, fitting

CONV, TABLE, LINEAR = "patch.weight", "table", "proj.weight"
MODEL = {CONV: (8, 4, 1, 2, 2), "patch.bias": (8,), TABLE: (1, 6, 8), LINEAR: (16, 8), "proj.bias": (16,)}


def detected(shapes: Shapes) -> Shapes:
    """As ComfyUI builds it: some sizes are those of the file, wherever it has them."""
    inner = shapes[CONV][1]
    rows, width = shapes[TABLE][1:3]
    if width != 8:
        raise IndexError("no such width")
    return {**MODEL, CONV: (8, inner, 1, 2, 2), TABLE: (1, rows, width)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {CONV: (32, 1, 2, 2)},
        {LINEAR: (1, 16, 8)},
        {LINEAR: (16, 8, 1, 1)},
        {LINEAR: (128,), "patch.bias": (1, 8)},
        {TABLE: (1, 6, 8, 1)},
        {CONV: (32, 1, 2, 2), LINEAR: (1, 16, 8)},
    ],
    ids=str,
)
def test_certain(changes: dict[str, Shape]) -> None:
    assert fitting({**MODEL, **changes}, detected) == {name: MODEL[name] for name in changes}


@pytest.mark.parametrize("shape", [(8, 16), (16, 9), (4, 32), (2, 64)], ids=str)
def test_not_certain(shape: Shape) -> None:
    with pytest.raises(Misfits) as caught:
        fitting({**MODEL, LINEAR: shape}, detected)
    assert caught.value.found == [(LINEAR, shape, MODEL[LINEAR])]


def test_a_model_that_cannot_be_built() -> None:
    with pytest.raises(Misfits) as caught:
        fitting({**MODEL, TABLE: (6, 8)}, detected)
    assert caught.value.found == []
