"""Code of a model's blocks that a user's patch has replaced: whether it gives on cut tokens what it gives on all.

Such code is trusted to leave tokens alone and to call attention as ComfyUI's blocks do. Much of it does (other feed
forwards, other attention kernels), some does not: it looks at all tokens of a frame, or hides its attention. Neither
name nor shape tells, so blocks are compared: the same block, on all tokens and alone, before it runs on its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from ..comm import Comm
from ..errors import UnsupportedError
from ..names import name_of
from .slots import Slot

REMEDY = "Remove the node, or set ulysses_degree and ring_degree to 1: cfg_degree and data parallel work with it"
EXACT = 1e-5
"""What a block in fp32 may differ by, root mean square to root mean square: products are summed in another order."""
TENSOR_FLOAT = 1e-3
"""The same where matrix products may be those of TF32."""


class Replaced:
    """What of a model's code was replaced, where its tokens are cut.

    Attributes:
        hooked: names of the modules that a plan has hooks on, to be filled by who installs them.
        blocks: those of them that are blocks.
        between: whether it may look at the tokens between two blocks, which then have to be whole there.
    """

    def __init__(self) -> None:
        self.hooked: set[str] = set()
        self.blocks: list[str] = []
        self.between = False
        self._suspects: list[str] = []
        self._names = ""
        self._forwards = 0

    def changed(self, objects: Mapping[str, Any]) -> None:
        """Take note of the attributes that are replaced from now on, by their dotted names.

        Raises:
            UnsupportedError: a module that has hooks, or holds one that has.
        """
        for name, value in objects.items():
            if isinstance(value, nn.Module) and any(within(hooked, name) for hooked in self.hooked):
                _refuse(name_of(value), f"it takes the place of {name}")
        code = {name: value for name, value in objects.items() if callable(value) and not isinstance(value, nn.Module)}
        self._suspects = [block for block in self.blocks if any(within(name, block) for name in objects)]
        self.between = any(not any(within(name, block) for block in self.blocks) for name in code)
        self._names = ", ".join(dict.fromkeys(map(name_of, code.values()))) or "A node"
        self._forwards = 0

    def chosen(self) -> frozenset[str]:
        """The blocks to compare in the next forward: at first all that have replaced code, then one at a time."""
        number, self._forwards = self._forwards, self._forwards + 1
        if not self._suspects or number == 0:
            return frozenset(self._suspects)
        return frozenset({self._suspects[number % len(self._suspects)]})

    def comparison(self) -> Comparison:
        """Compares them."""
        return Comparison(self.chosen())

    def judge(self, comparison: Comparison, comm: Comm) -> None:
        """Raises UnsupportedError, on all ranks alike, where blocks gave something else."""
        apart = comparison.apart(comm)
        if not apart <= comparison.limit:
            self.refuse(f"a block with its code differs by {apart:.1e} from what it gives for all tokens at once")

    def refuse(self, why: str, cause: Exception | None = None) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse(self._names, why, cause)


class Comparison:
    """What the compared blocks of one forward gave, against what they should have.

    Attributes:
        limit: the largest difference that rounding explains.
        open: whether a block that has been run on all tokens has yet to run on its own.
    """

    def __init__(self, blocks: frozenset[str]) -> None:
        self.limit = 0.0
        self._blocks = blocks
        self._wanted: dict[str, tuple[torch.Tensor | None, ...]] = {}
        self._sums: list[torch.Tensor] = []

    def __contains__(self, block: str) -> bool:
        return block in self._blocks

    @property
    def open(self) -> bool:
        return bool(self._wanted)

    def expect(self, block: str, parts: tuple[torch.Tensor | None, ...]) -> None:
        """This rank's parts of a block's outputs for all tokens."""
        self._wanted[block] = parts

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around the forward."""
        return contextlib.nullcontext()

    def given(  # noqa: PLR0917, as blocks hand it on
        self, block: str, module: nn.Module, streams: Mapping[str | int, Slot], args: Any, kwargs: Any, enters: bool
    ) -> None:
        """A block is about to run: where its streams are, and all that it is given. It `enters` with whole tokens."""

    def note(self, block: str, parts: tuple[torch.Tensor | None, ...], *, stays: bool = False) -> None:
        """A block's outputs for this rank's tokens; they stay its part where no block joins them."""
        for part, wanted in zip(parts, self._wanted.pop(block, ()), strict=False):
            if part is None or wanted is None:
                continue
            error = (part.float() - wanted.float()).nan_to_num().square().sum()
            self._sums.append(torch.stack((error, wanted.float().nan_to_num().square().sum())))
            self.limit = max(self.limit, limit(part))

    def apart(self, comm: Comm) -> float:
        """Root mean square of the difference to that of the values, over all ranks; every rank asks, or none."""
        if not self._sums:
            return 0.0
        error, whole = comm.all_reduce(torch.stack(self._sums).sum(0)).tolist()
        return float((error / max(whole, 1e-30)) ** 0.5)


def _refuse(names: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise UnsupportedError(
        f"{names} cannot be used with a model whose tokens are divided over workers", why, REMEDY
    ) from cause


def limit(x: torch.Tensor) -> float:
    """The largest difference that rounding explains in this dtype, root mean square to root mean square."""
    if x.dtype in (torch.float32, torch.float64):
        return EXACT if torch.get_float32_matmul_precision() == "highest" else TENSOR_FLOAT
    # values that are all rounded anew differ by a third of that, and few are
    return torch.finfo(x.dtype).eps / 2


def within(name: str, place: str) -> bool:
    """Whether a dotted name is that of a place, or of something in it."""
    return name == place or name.startswith(f"{place}.")
