"""Shapes of a model's tensors where a file has the same values in other dims, as converters to GGUF leave them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

ROUNDS = 4
"""ComfyUI's detection reads some of the shapes itself, so that one that is found may change what the model has."""


class Misfits(Exception):
    """Tensors whose shape in the model does not follow from the file: name, the file's shape, the model's."""

    def __init__(self, found: list[tuple[str, Shape, Shape]]) -> None:
        super().__init__(found)
        self.found = found


def fitting(stored: Shapes, model_of: Callable[[Shapes], Shapes]) -> dict[str, Shape]:
    """The shapes that tensors of a file have in the model, where they are others; the order of values is the file's.

    A shape is certain where the file's is it with adjacent dims merged, and with 1s dropped or added.

    Args:
        stored: as in the file, by name.
        model_of: what a model that ComfyUI builds for such shapes has in their place, by the same names; it raises
            anything where ComfyUI builds none.

    Raises:
        Misfits: some cannot be found.
    """
    shapes = dict(stored)
    misfits: list[tuple[str, Shape, Shape]] = []
    for _ in range(ROUNDS):
        try:
            wanted = model_of(shapes)
        except Exception:  # detection trusts a file's shapes; which errors it meets is open
            guesses = {name: shape for name in stored for shape in _apart(name, stored)}
        else:
            off = {name: shape for name, shape in wanted.items() if shapes[name] != shape}
            misfits = [(name, stored[name], shape) for name, shape in off.items() if not _alike(stored[name], shape)]
            if not off:
                return {name: shape for name, shape in shapes.items() if shape != stored[name]}
            guesses = {name: shape for name, shape in off.items() if _alike(stored[name], shape)}
            guesses |= {name: guess for name, _, shape in misfits for guess in _guesses(name, stored, len(shape))}
        if all(shapes[name] == shape for name, shape in guesses.items()):
            break
        shapes |= guesses
    raise Misfits(misfits)


def _alike(stored: Shape, wanted: Shape) -> bool:
    """Whether a shape is another one with adjacent dims merged, not counting 1s."""
    rest = [size for size in wanted if size != 1]
    for size in stored:
        product = 1
        while product < size and rest:
            product *= rest.pop(0)
        if product != size:
            return False
    return not rest


def _guesses(name: str, stored: Shapes, rank: int) -> Iterator[Shape]:
    """Shapes of a rank that a tensor may have had; the last one is the best."""
    shape = stored[name]
    if len(shape) < rank:
        yield (*(1,) * (rank - len(shape)), *shape)
    yield from (guess for guess in _apart(name, stored) if len(guess) == rank)


def _apart(name: str, stored: Shapes) -> Iterator[Shape]:
    """The shape of a weight whose first two dims were merged: its bias says what the first one is."""
    shape, bias = stored[name], stored.get(f"{name.removesuffix('weight')}bias", ())
    if name.endswith(".weight") and len(shape) >= 2 and len(bias) == 1:
        outer = bias[0]
        if outer and shape[0] != outer and shape[0] % outer == 0:
            yield (outer, shape[0] // outer, *shape[1:])
