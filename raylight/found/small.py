"""Small inputs of a call's kind: the call itself with fewer tokens along each axis, as far as the model takes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .lengths import picture
from .values import Inputs, Path, Refused, changed, copied, leaves, never, tensors

FEWEST = (3, 5, 7, 4, 9, 11, 6, 13, 8, 15)
"""Steps along an axis of the picture, each axis another one, so that they are told apart."""
TEXTS = (7, 9, 11, 13, 6, 8, 10, 12, 15, 17)
"""Sizes of anything else."""
GRAINS = (1, 2, 4, 8, 16, 32)
"""How much coarser than hoped for the steps may have to be: patches, and levels that halve a picture."""
LONGEST = 24
"""A size from which on it is made smaller, where it is not one of the picture's."""
MOST = 4096
"""Tokens, or pixels over the grain, that small inputs may have at most."""


def small(function: Callable[..., Any], inputs: Inputs, *, grain: int = 2, tick: Callable[[], None] = never) -> Inputs:
    """The inputs of a real call cut down; sizes that are one stay so, even ones stay even, and equal ones equal.

    Args:
        function: what is called with them.
        grain: pixels of the picture along each axis that surely make one token.
        tick: called before each forward; what it raises ends this.

    Raises:
        Refused: the model does not take less, and what it takes is too much to try things with.
    """

    def takes(these: Inputs) -> bool:
        tick()
        args, kwargs = copied(these)
        try:
            with torch.no_grad():
                out = function(*args, **kwargs)
        except Exception:
            # whatever it raises: the model does not take inputs of these sizes
            return False
        return all(bool(t.isfinite().all()) for t in tensors([out]))

    found = _smaller_picture(inputs, grain, takes)
    pixels = max((math.prod(shape[2:]) for shape in picture(found) if len(shape) > 2), default=0)
    if pixels > MOST * grain**2:
        raise Refused("it takes no smaller picture, and this one is too large to try a plan with")
    found = _smaller_rest(found, takes)
    if not takes(found):
        raise Refused("it does not run on small inputs of this kind")
    return found


def _smaller_picture(inputs: Inputs, grain: int, takes: Callable[[Inputs], bool]) -> Inputs:
    """All axes of the picture at once, with whatever else is as long as one or as several of them."""
    shapes = picture(inputs)
    axes = sorted({size for shape in shapes for size in shape[2:] if size > 1})
    given = {path: t for path, t in leaves([list(inputs[0]), inputs[1]]) if isinstance(t, torch.Tensor)}
    # what nodes bring beside the picture, such as references, has sizes of its own
    beside = {
        size
        for path, t in given.items()
        if path[0] != 0 and t.ndim >= 4
        for size in t.shape[2:]
        if size > 1 and size not in axes
    }
    for coarser in GRAINS:
        sizes = _steps(sorted({*axes, *beside}), grain * coarser)
        if all(size == less for size, less in sizes.items()):
            continue
        for made in _resized(inputs, given, shapes, sizes):
            if takes(made):
                return made
    return inputs


def _steps(sizes: list[int], grain: int) -> dict[int, int]:
    """A smaller size for each, none of them twice."""
    found: dict[int, int] = {}
    for size in sizes:
        step = math.gcd(size, grain)
        odd = size // step % 2
        options = (step * n for n in FEWEST if step > 1 or n % 2 == odd)
        less = next((n for n in options if n < size and n not in found.values()), size)
        found[size] = less
    return found


def _resized(
    inputs: Inputs, given: dict[Path, torch.Tensor], shapes: list[tuple[int, ...]], sizes: dict[int, int]
) -> Iterator[Inputs]:
    """The inputs with these sizes, in maps alone or also in what has one entry for each token."""
    maps = {
        (path, dim): sizes[t.shape[dim]]
        for path, t in given.items()
        for dim in range(2, t.ndim)
        if t.ndim >= 3 and t.shape[dim] in sizes and (t.ndim > 3 or path[0] == 0)
    }
    flat: dict[tuple[Path, int], int] = {}
    for shape in shapes:
        for a, b in itertools.combinations(range(2, len(shape) + 1), 2):
            for patch in (1, 2, 4, 8, 16):
                whole = math.prod(shape[a:b]) // patch**2
                less = math.prod(sizes.get(n, n) for n in shape[a:b]) // patch**2
                flat |= {
                    (path, dim): less
                    for path, t in given.items()
                    for dim in range(1, t.ndim)
                    if (path, dim) not in maps and t.shape[dim] == whole > LONGEST and less > 1
                }
    yield _cut(inputs, maps)
    if flat:
        yield _cut(inputs, {**flat, **maps})


def _smaller_rest(inputs: Inputs, takes: Callable[[Inputs], bool]) -> Inputs:
    """Each other size by itself: of text, of what pictures are told apart by, of masks."""
    found = inputs
    own = {size for shape in picture(inputs) for size in shape}
    given = [(path, leaf) for path, leaf in leaves([list(inputs[0]), inputs[1]]) if path[:2] != (0, 0)]
    sizes = {n for _, t in given if isinstance(t, torch.Tensor) for n in t.shape[1:] if n >= LONGEST and n not in own}
    used: set[int] = set()
    for size in sorted(sizes):
        less = next((n for n in TEXTS if n % 2 == size % 2 and n not in used), 0)
        if not less:
            break
        where = {
            (path, dim)
            for path, t in given
            if isinstance(t, torch.Tensor)
            for dim in range(1, t.ndim)
            if t.shape[dim] == size
        }
        ints = {path for path, value in given if not isinstance(value, torch.Tensor) and value == size}
        before = {(path, dim) for path, dim in where if dim == 1}
        ways = [(where, ints), (where, set()), (before, ints), (before, set())]
        for dims, numbers in ways:
            made = _cut(found, dict.fromkeys(dims, less), dict.fromkeys(numbers, less))
            if dims and takes(made):
                found = made
                used.add(less)
                break
    return found


def _cut(inputs: Inputs, dims: dict[tuple[Path, int], int], ints: dict[Path, int] | None = None) -> Inputs:
    """The first so many entries along some dims."""
    value: Any = [list(inputs[0]), inputs[1]]
    for (path, dim), size in dims.items():

        def first(t: torch.Tensor, dim: int = dim, size: int = size) -> torch.Tensor:
            return t.narrow(dim, 0, size).clone()

        value = changed(value, path, first)
    for path, number in (ints or {}).items():

        def other(_: int, number: int = number) -> int:
            return number

        value = changed(value, path, other)
    args, kwargs = value
    return tuple(args), kwargs
