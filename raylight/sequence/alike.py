"""A node's code around a model's blocks: that it goes the same way on all ranks, and sees what blocks write into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..cuts import Stream
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..comm import Comm
    from ..layout import Layout

REMEDY = (
    "Set ulysses_degree and ring_degree to 1, or use ComfyUI's EasyCache or TeaCache (Ray), which decide once for all "
    "workers"
)


class Alike:
    """What ranks that decide for themselves ask each other before each step, so that they go the same way or none.

    A decision that is made of equal tensors by equal devices is equal. Where it is not, all ranks leave the call, in
    place of some waiting in a block for those that have left it out.

    Args:
        control: the ranks of a sequence, on CPU connections.
        modules: what may be left out.
        names: whose code decides.
    """

    CALL, END, ANSWER = -1, -2, -3
    """The model is called, has been called, and the code that calls it has returned."""

    def __init__(self, control: Comm, modules: Sequence[nn.Module], names: str) -> None:
        self._control = control
        self._modules = modules
        self._names = names

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Each of the modules is a step meanwhile, before anything else that is done there.

        Raises:
            UnsupportedError: from a step, on all ranks.
        """
        handles = []
        try:
            for number, module in enumerate(self._modules if self._control.size > 1 else ()):
                handles.append(module.register_forward_pre_hook(partial(self._ask, number), prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step(self, number: int) -> None:
        """This rank goes on with step `number`.

        Raises:
            UnsupportedError: another one goes on with another. All ranks raise it.
        """
        most, least = self._control.all_reduce(torch.tensor([number, -number]), op="max").tolist()
        if most != -least:
            raise UnsupportedError(
                f"{self._names} cannot be used with a model whose tokens are divided over workers",
                "it has decided otherwise on one worker than on another",
                REMEDY,
            )

    def any(self, flags: list[bool]) -> list[bool]:
        """Which of them are set on some rank."""
        found: list[bool] = self._control.all_reduce(torch.tensor(flags, dtype=torch.int64), op="max").bool().tolist()
        return found

    def _ask(self, number: int, module: nn.Module, args: Any) -> None:
        self.step(number)


class Written:
    """What one block was given: this rank's part of tensors that whoever called it may look at again.

    Some blocks add to what they are given and return that; others hold it to be the caller's. A caller sees the same
    as of a block that has all tokens.
    """

    def __init__(self) -> None:
        self._given: list[tuple[Stream, torch.Tensor, torch.Tensor]] = []

    def note(self, stream: Stream, whole: torch.Tensor, local: torch.Tensor) -> None:
        """A tensor of the caller's, and the part of it that the block is given, which owns its memory."""
        self._given.append((stream, whole, local))

    def joined(self, value: torch.Tensor, stream: Stream, layout: Layout, comm: Comm) -> torch.Tensor:
        """An output for all tokens: the caller's own tensor where the block returns what it was given."""
        joined = stream.join(value, layout, comm)
        for number, (_, whole, local) in enumerate(self._given):
            if value is local and whole.shape == joined.shape:
                del self._given[number]
                return whole.copy_(joined)
        return joined

    def rest(self, layout: Layout, comm: Comm, alike: Alike) -> None:
        """Bring the caller's other tensors to what the block has made of its parts."""
        if not self._given:
            return
        changed = alike.any([not torch.equal(local, stream(whole, layout)) for stream, whole, local in self._given])
        for (stream, whole, local), written in zip(self._given, changed, strict=True):
            if written:
                whole.copy_(stream.join(local, layout, comm))
