"""How long everything in a model is, as inputs grow: a forward of small inputs, and one for each axis made longer.

The sizes of a dim over these runs are its length vector. Dims with equal vectors hold the same tokens, and a sum of
vectors is a sequence that joins them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .trace import Call, Trace
from .values import Inputs, Path, Refused, changed, leaves, never, tensors

Vector = tuple[int, ...]
MOST_RUNS = 10
"""Longer inputs that are tried on the model."""
MOST_WAYS = 6
"""Ways to make one size longer."""
MOST_TOKENS = 600
"""A size above this is a width and not tried: inputs are to be small."""


@dataclass(frozen=True)
class Way:
    """What to make longer: dims of tensors among the inputs, and ints."""

    dims: frozenset[tuple[Path, int]]
    ints: frozenset[Path] = frozenset()

    def __call__(self, inputs: Inputs) -> Inputs:
        """The inputs with all of that doubled, by repeating what is there."""
        value: Any = [list(inputs[0]), inputs[1]]
        for path in {path for path, _ in self.dims}:
            dims = [dim for at, dim in self.dims if at == path]

            def repeat(t: torch.Tensor, dims: list[int] = dims) -> torch.Tensor:
                return t.repeat([2 if dim in dims else 1 for dim in range(t.ndim)])

            value = changed(value, path, repeat)
        for path in self.ints:
            value = changed(value, path, lambda number: number * 2)
        args, kwargs = value
        return tuple(args), kwargs

    def alone(self) -> list[Way]:
        """Each tensor of it by itself, where there are several: two that happen to be as long are told apart."""
        paths = sorted({path for path, _ in self.dims}, key=str)
        if len(paths) == 1:
            return []
        return [Way(frozenset(at for at in self.dims if at[0] == path)) for path in paths]


def picture(inputs: Inputs) -> list[tuple[int, ...]]:
    """Shapes of a model's first argument: its latents."""
    args, kwargs = inputs
    first = args[0] if args else kwargs.get("x", next(iter(kwargs.values()), None))
    return [tuple(t.shape) for t in tensors([first])]


def ways(inputs: Inputs) -> Iterator[list[Way]]:
    """For each size among the inputs, ways to double what has it, the likeliest first."""
    found = list(leaves([list(inputs[0]), inputs[1]]))
    given = {path: leaf for path, leaf in found if isinstance(leaf, torch.Tensor)}
    ints = [(path, leaf) for path, leaf in found if isinstance(leaf, int)]
    shapes = picture(inputs)
    sizes = dict.fromkeys(n for t in given.values() for n in t.shape[1:] if 1 <= n < MOST_TOKENS)
    for size in sizes:
        every = frozenset((path, dim) for path, t in given.items() for dim in range(1, t.ndim) if t.shape[dim] == size)
        inner = _not_channels(every, given)
        equal = frozenset(path for path, value in ints if value == size)
        # what has one entry for each token of the model's own input
        many = {
            math.prod(shape[a:b])
            for shape in shapes
            for a, b in itertools.combinations(range(2, len(shape) + 1), 2)
            if b - a > 1 and size in shape[a:b]
        }
        flat = {(path, dim) for path, t in given.items() for dim in range(1, t.ndim) if t.shape[dim] in many}
        several = [Way(every | flat, equal), Way(every, equal), Way(every), Way(inner, equal), Way(inner)]
        several += Way(every).alone()
        several += [Way(frozenset({at})) for at in sorted(every, key=str)]
        yield list(dict.fromkeys(several))


def _not_channels(every: frozenset[tuple[Path, int]], given: dict[Path, torch.Tensor]) -> frozenset[tuple[Path, int]]:
    """Dims that may be tokens by where they are: [B, C, ...] or [B, L, C]."""
    kept = {(path, dim) for path, dim in every if dim > 1 or given[path].ndim <= 3}
    kept = {(path, dim) for path, dim in kept if given[path].ndim != 3 or dim == 1} or kept
    return frozenset(kept or every)


@dataclass(frozen=True)
class Runs:
    """Traces of a model's forward.

    Attributes:
        base: of the inputs.
        longer, inputs: of longer ones, and these.
        of_picture: which of `longer`, from 1, have another picture.
    """

    base: Trace
    longer: list[Trace]
    inputs: list[Inputs]
    of_picture: list[int]

    def image(self, vector: Vector) -> bool:
        """Whether a length depends on the picture's size."""
        return any(vector[run] != vector[0] for run in self.of_picture)


def run_all(
    model: nn.Module, function: Callable[..., Any], inputs: Inputs, *, tick: Callable[[], None] = never
) -> Runs:
    """Trace the inputs, and longer ones for each axis; what the model does not take, or runs otherwise, is left out.

    Args:
        tick: called before each forward; what it raises ends this.

    Raises:
        Refused: no size of the picture can be changed.
    """
    base = Trace(model, watch=True)
    base.run(function, inputs)
    shape = [call.key for call in base.calls]
    longer: list[Trace] = []
    made: list[Inputs] = []
    tried: set[Way] = set()

    def attempt(way: Way) -> bool:
        tried.add(way)
        tick()
        run, these = Trace(model), way(inputs)
        try:
            run.run(function, these)
        except Exception:
            # whatever it raises: the model does not take inputs of these sizes
            return False
        if [call.key for call in run.calls] != shape:
            return False
        longer.append(run)
        made.append(these)
        return True

    for several in ways(inputs):
        taken = None
        for way in several[:MOST_WAYS]:
            if len(longer) < MOST_RUNS and way not in tried and attempt(way):
                taken = way
                break
        for way in taken.alone() if taken else ():
            if len(longer) < MOST_RUNS and way not in tried:
                attempt(way)
    shapes = picture(inputs)
    of_picture = [number for number, these in enumerate(made, 1) if picture(these) != shapes]
    if not of_picture:
        raise Refused("no size of the picture can be changed by itself")
    return Runs(base, longer, made, of_picture)


class Lengths:
    """Length vectors of what each call was given and gave."""

    def __init__(self, runs: Runs) -> None:
        self._tables = [{call.key: call for call in run.calls} for run in (runs.base, *runs.longer)]

    def of(self, call: Call, what: str = "args") -> dict[Path, Any]:
        """By path of what it was given or gave ("out"): for a tensor the vectors of its dims, for an int its values."""
        each = [dict(leaves(getattr(table[call.key], what))) for table in self._tables]
        found: dict[Path, Any] = {}
        for path, leaf in each[0].items():
            others = [there.get(path) for there in each]
            if isinstance(leaf, torch.Tensor):
                alike = [o for o in others if isinstance(o, torch.Tensor) and o.ndim == leaf.ndim]
                if len(alike) == len(each):
                    found[path] = [tuple(o.shape[dim] for o in alike) for dim in range(leaf.ndim)]
                else:
                    found[path] = [(n,) * len(each) for n in leaf.shape]
            elif all(isinstance(o, int) for o in others):
                found[path] = tuple(others)
        return found

    def tensors_of(self, call: Call, what: str = "args") -> dict[Path, list[Vector]]:
        """The tensors of `of`."""
        return {path: vectors for path, vectors in self.of(call, what).items() if isinstance(vectors, list)}

    def attention(self, call: Call) -> list[tuple[Vector, Vector]]:
        """Vectors of the query and key tokens of each attention in a call.

        Raises:
            Refused: it is called another number of times for other sizes.
        """
        each = [[record.lengths for record in table[call.key].attention] for table in self._tables]
        if len(set(map(len, each))) > 1:
            raise Refused(f"{call.name}: its attention is called more or less often for other sizes")
        return [(tuple(q for q, _ in row), tuple(k for _, k in row)) for row in zip(*each, strict=True)]


def varies(vector: Vector) -> bool:
    """Whether a length is another in some run."""
    return len(set(vector)) > 1


def token_dims(vectors: list[Vector]) -> list[int]:
    """The dims whose length varies."""
    return [dim for dim, vector in enumerate(vectors) if varies(vector)]


def product(vectors: list[Vector]) -> Vector:
    """The length of several dims together."""
    return tuple(math.prod(row) for row in zip(*vectors, strict=True))


def added(vectors: list[Vector]) -> Vector:
    """The length of several segments, one after the other."""
    return tuple(sum(row) for row in zip(*vectors, strict=True))
