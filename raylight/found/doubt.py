"""A plan that was found is doubted whenever it is used: blocks are compared with themselves on all tokens.

A proof on small inputs does not show what a model does only with many tokens, or only with certain values. So the first
forward of each size compares every block, and sees that nothing but blocks touches tokens that are cut; each later one
compares one block. All ranks learn of a difference in one exchange, which all of them enter.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..comm import Comm
from ..errors import RaylightError, UnsupportedError
from ..sequence.replaced import Comparison, Replaced, limit
from ..sequence.slots import Slot
from .kinds import Form, Forms
from .trace import HARMLESS
from .values import tensors

SIZES_KEPT = 64
"""Sizes that are known to be right; the one that was not used longest is compared again."""
WORST = 16
"""How much more than the mean the token may differ that differs most."""
UNTOUCHED = 0.5
"""Allowed of what is said with 0 or 1: tokens between blocks are those of the last block, or they are not."""


class Unproved(RaylightError):
    """A call is not what its plan was proved for: every rank raises it, at the same point."""


class Doubt(Replaced):
    """What is compared of a plan that was found.

    Args:
        forms: what each block may be given, by its name: nothing else was proved.
    """

    def __init__(self, forms: Mapping[str, frozenset[Form]]) -> None:
        super().__init__()
        self.forms = forms
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._thorough = True
        self._readers: dict[str, Forms] = {}

    def prepare(self, sizes: Hashable) -> bool:
        """Say of what sizes the next forward is; whether all of its blocks will be compared."""
        self._thorough = sizes not in self._seen
        if not self._thorough:
            self._seen.move_to_end(sizes)
        return self._thorough

    def passed(self, sizes: Hashable) -> None:
        """A forward of these sizes was right."""
        self._seen[sizes] = None
        while len(self._seen) > SIZES_KEPT:
            self._seen.popitem(last=False)

    def chosen(self) -> frozenset[str]:
        """The blocks to compare in the next forward."""
        number, self._forwards = self._forwards, self._forwards + 1
        return frozenset(self.blocks if self._thorough else {self.blocks[number % len(self.blocks)]})

    def comparison(self) -> Comparison:
        """Compares them."""
        return Thorough(self, self.chosen(), watch=self._thorough)

    def judge(self, comparison: Comparison, comm: Comm) -> None:
        """Raises Unproved, on all ranks alike, where something differs."""
        assert isinstance(comparison, Thorough)
        why = comparison.why(comm)
        if why:
            raise Unproved(why)

    def check(self, block: str, module: nn.Module, streams: Sequence[str | int], args: Any, kwargs: Any) -> None:
        """Raises Unproved, on all ranks alike, where a block is given something of another form."""
        reader = self._readers.get(block)
        if reader is None:
            reader = self._readers[block] = Forms(module, tuple(streams))
        form = reader(args, kwargs)
        known = self.forms.get(block, frozenset())
        if form not in known:
            other = [name for name, said in form if all(dict(each).get(name) != said for each in known)]
            raise Unproved(f"{block} is given something of another form than was tried: {', '.join(other) or form}")

    def refuse(self, why: str, cause: Exception | None = None) -> NoReturn:
        """Raises UnsupportedError: a rank fails by itself, and nothing is agreed on."""
        raise UnsupportedError("A block cannot be run on a part of its tokens", why) from cause


class Thorough(Comparison):
    """The comparison of one forward, block by block and token by token.

    Args:
        watch: whether to see as well that nothing but blocks touches tokens that are cut.
    """

    def __init__(self, doubt: Doubt, blocks: frozenset[str], *, watch: bool) -> None:
        super().__init__(blocks)
        self._doubt = doubt
        self._watch = _Between() if watch else None
        self._rows: list[torch.Tensor] = []
        self._names: list[tuple[str, float]] = []
        self._last: list[torch.Tensor] = []

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around the forward."""
        return contextlib.nullcontext() if self._watch is None else self._watch

    def given(  # noqa: PLR0917, as blocks hand it on
        self, block: str, module: nn.Module, streams: Mapping[str | int, Slot], args: Any, kwargs: Any, enters: bool
    ) -> None:
        """A block is about to run."""
        if self._watch is not None:
            self._watch.inside = True
        self._doubt.check(block, module, list(streams), args, kwargs)
        if self._watch is None or enters:
            return
        for slot in streams.values():
            value = slot.read(args, kwargs)
            if isinstance(value, torch.Tensor):
                same = [(value == kept).all() for kept in self._last if kept.shape == value.shape]
                changed = ~torch.stack(same).any() if same else torch.ones((), dtype=torch.bool, device=value.device)
                self._row(f"tokens are changed before {block}", changed.float(), UNTOUCHED)

    def note(self, block: str, parts: tuple[torch.Tensor | None, ...], *, stays: bool = False) -> None:
        """A block has run.

        Args:
            stays: whether its outputs remain cut, for the next one.
        """
        for part, wanted in zip(parts, self._wanted.pop(block, ()), strict=False):
            if part is not None and wanted is not None:
                self._compare(block, part, wanted)
        if self._watch is not None:
            kept = [part for part in parts if part is not None] if stays else []
            self._last = [part.clone() for part in kept]
            self._watch.tokens(kept)
            self._watch.inside = False

    def _compare(self, block: str, part: torch.Tensor, wanted: torch.Tensor) -> None:
        if part.shape != wanted.shape:
            raise UnsupportedError("A block gives another number of tokens for a part of them", f"{block}")
        a, b = part.float(), wanted.float()
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(a), a - b)
        # what is not a number on one side only differs by more than anything
        error = difference.nan_to_num(nan=torch.inf).square()
        whole = b.nan_to_num(posinf=0, neginf=0).square()
        tokens, sizes = error.mean(-1).flatten(), whole.mean(-1).flatten()
        usual = whole.mean()
        worst = (tokens / sizes.clamp_min(1e-30).maximum(usual * 0.01)).max() if tokens.numel() else usual * 0
        self._row(block, torch.stack((error.sum(), whole.sum(), worst)), limit(part))

    def _row(self, what: str, values: torch.Tensor, allowed: float) -> None:
        if values.ndim == 0:
            values = torch.stack((values, torch.ones_like(values), torch.zeros_like(values)))
        self._rows.append(values)
        self._names.append((what, allowed))

    def why(self, comm: Comm) -> str:
        """What differs, over all ranks; "" for nothing. Every rank asks."""
        names, touched = self._names, self._watch.touched if self._watch is not None else ""
        if not self._rows:
            # no block ran, here as elsewhere
            return ""
        told = self._rows[0].new_tensor([float(bool(touched)), 1.0, 0.0])
        every = comm.stack(torch.stack([*self._rows, told])).double()
        error, whole, worst = every[..., 0].sum(0), every[..., 1].sum(0), every[..., 2].amax(0)
        apart = (error / whole.clamp_min(1e-30)).sqrt().tolist()
        most = worst.sqrt().tolist()
        for number, (name, allowed) in enumerate(names):
            # a comparison that is not a number holds nowhere
            if not (apart[number] <= allowed and most[number] <= WORST * allowed):
                if allowed == UNTOUCHED:
                    return name
                return (
                    f"{name} gives something else for a part of its tokens, by {max(apart[number], most[number]):.1e}"
                )
        if apart[-1]:
            return f"the model's own code looks at tokens between two blocks ({touched or 'on another worker'})"
        return ""


class _Between(TorchFunctionMode):
    """Sees which functions of torch are given tokens that are cut, outside of blocks.

    Attributes:
        inside: whether a block runs, or what the engine does around it.
        touched: the first such function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.touched = ""
        self._tokens: Any = WeakIdKeyDictionary()

    def tokens(self, kept: list[torch.Tensor]) -> None:
        """What the last block gave."""
        for tensor in kept:
            self._tokens[tensor] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and not self.touched and len(self._tokens):
            with torch._C.DisableTorchFunction():
                seen = any(tensor in self._tokens for tensor in tensors([list(args), kwargs or {}]))
            owner = getattr(getattr(func, "__self__", None), "__name__", "")
            if seen and owner not in HARMLESS:
                self.touched = owner or getattr(func, "__name__", str(func))
        return func(*args, **(kwargs or {}))
