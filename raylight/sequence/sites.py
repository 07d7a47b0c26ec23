"""Attention modules that compute in another way during a forward: what the override of the one at hand is to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from . import overrides
from .kernels import LocalKernel
from .slots import Slot

Attend = Callable[..., torch.Tensor]
"""Attention as a model's own code asks for it: the function that it would call, and that one's arguments."""


NAMED = "comfy_attention"
"""What ComfyUI after 0.33 calls the part of an attention module that may name a function of its own: a checkpoint's
`<module>.comfy_attention.config` says which."""


class Named:
    """The attention that a checkpoint names for a module, which ComfyUI calls where no override is set.

    Args:
        module: the attention module, or one that has it somewhere below.
    """

    def __init__(self, module: nn.Module) -> None:
        self._holders = [part for part in module.modules() if hasattr(part, NAMED)]

    def __call__(self) -> Attend | None:
        """The function; None where the model's own is meant.

        Raises:
            UnsupportedError: the module has several, and nothing says which call is whose.
        """
        # looked up at each call: a patch may put another object there
        found = {getattr(getattr(holder, NAMED), "function", None) for holder in self._holders}
        if len(found) > 1:
            raise UnsupportedError(
                "The attention layers of one block name different kernels in this checkpoint",
                "the workers compute the attention of a block in one way",
                "Set ulysses_degree and ring_degree to 1 for this model",
            )
        return found.pop() if found else None


class Sites:
    """The attention modules that a forward is in, innermost last.

    Args:
        kernel: computes attention locally, None for what the model calls.
        opaque: makes a function one that compilers leave alone; None where nothing is compiled.
    """

    def __init__(self, kernel: LocalKernel | None, opaque: Callable[[Attend], Attend] | None = None) -> None:
        self._kernel = kernel
        self._open: list[Attend] = []
        # one for all of them: compiled code is made for a function it saw
        self._override: Attend = opaque(self._attend) if opaque else self._attend

    def enter(
        self,
        slot: Slot,
        args: list[Any],
        kwargs: dict[str, Any],
        attention: Callable[..., torch.Tensor] | None,
        *,
        named: Attend | None = None,
        shown: dict[str, Any] | None = None,
    ) -> None:
        """Change the arguments of a module that is about to run, so that it computes `attention`; then `leave`.

        Args:
            slot: of transformer_options.
            attention, named: see `overrides.compose`.
            shown: the options that an override of the user's may look at; None for those in the arguments.
        """
        options = slot.read(args, kwargs) or {}
        self._open.append(overrides.compose(attention, self._kernel, options if shown is None else shown, named))
        slot.write(args, kwargs, {**options, overrides.OVERRIDE: self._override})

    def leave(self) -> None:
        """The module has run."""
        self._open.pop()

    def clear(self) -> None:
        """The forward is over, perhaps by an error."""
        self._open.clear()

    def _attend(self, function: Attend, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._open[-1](function, *args, **kwargs)
