"""Patches that ComfyUI's blocks call on their tokens: on cut tokens they are shown all, and their result is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..comm import Comm
from ..cuts import Split
from ..errors import MisfitError
from ..layout import Layout, gather
from .overrides import OVERRIDE

Patch = Callable[..., Any]
MASK = "attn_mask"
"""Always whole, in what a patch is given and in what it returns."""


def show_whole(
    options: dict[str, Any],
    names: Mapping[str, int],
    *,
    order: tuple[str, ...],
    mask: Split | None,
    layout: Layout,
    comm: Comm,
) -> dict[str, Any]:
    """The transformer_options of one call of a block with its patch lists replaced; the same object where it has none.

    A patch sees what it would see on one rank: tensors with every token, the model's own options (in which it
    may leave notes), and the global `img_slice`. The block sees what it writes into a tensor; a rope table
    written to stays so for the blocks of a region only.

    Args:
        options: what the block is given.
        names: patch lists, and the token dim of the tensors in their calls.
        order: the segments of those tokens.
        mask: how the mask in those calls is cut, None where it is whole.
    """
    patches = options.get("patches", {})
    tokens = _Tokens(options, order=order, mask=mask, layout=layout, comm=comm)
    shown = {
        name: [tokens.shown(patch, dim) for patch in patches[name]] for name, dim in names.items() if patches.get(name)
    }
    return {**options, "patches": {**patches, **shown}} if shown else options


class _Tokens:
    """The tokens of one call of a block as its patches are to see them."""

    def __init__(
        self, options: dict[str, Any], *, order: tuple[str, ...], mask: Split | None, layout: Layout, comm: Comm
    ) -> None:
        self._options = options
        self._order = order
        self._mask = mask
        self._layout = layout
        self._comm = comm
        self._local, self._total = layout.local(order), layout.total(order)
        self._copied: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._returned: torch.Tensor | None = None

    def shown(self, patch: Patch, dim: int) -> Patch:
        def whole(*args: Any, **kwargs: Any) -> Any:
            joined: list[tuple[torch.Tensor, torch.Tensor]] = []
            given = [self._join(value, dim, joined) for value in args]
            out = patch(*given, **self._join(kwargs, dim, joined))
            returned = list(out.values()) if isinstance(out, dict) else [out]
            for local, total in joined:
                if not any(value is total for value in returned):
                    # it may have been written to
                    local.copy_(self._layout.split(total, dim=dim, over=self._order))
            return self._cut(out, dim)

        return whole

    def _join(self, value: Any, dim: int, joined: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """What a patch is to see in place of `value`; `joined` gets the tensors that took others' place."""
        if isinstance(value, torch.Tensor) and value.ndim > dim and value.shape[dim] == self._local:
            total = gather(value, dim=dim, over=self._order, layout=self._layout, comm=self._comm)
            joined.append((value, total))
            return total
        if isinstance(value, dict):
            if "patches" in value:
                return self._own(value)
            return {
                key: self._whole_mask(item) if key == MASK else self._join(item, dim, joined)
                for key, item in value.items()
            }
        return value

    def _whole_mask(self, value: torch.Tensor | None) -> torch.Tensor | None:
        # the block hands a mask that a patch returned to the next one
        if value is None or value is self._returned or self._mask is None:
            return value
        return self._mask.join(value, self._layout, self._comm)

    def _own(self, given: dict[str, Any]) -> dict[str, Any]:
        """The model's own options; where the block made a copy, to say where the image's tokens are, a copy of them."""
        if "img_slice" not in given:
            return self._options
        if self._copied is None or self._copied[0] is not given:
            # the engine's override computes over cut tokens, which patches do not have
            own = {key: item for key, item in given.items() if key != OVERRIDE} | self._options
            if "img" in self._order:
                start = sum(self._layout.length(name) for name in self._order[: self._order.index("img")])
                own["img_slice"] = [start, start + self._layout.length("img")]
            # one for all patches of the block, which may leave notes for each other
            self._copied = given, own
        return self._copied[1]

    def _cut(self, value: Any, dim: int) -> Any:
        if isinstance(value, dict):
            self._returned = value.get(MASK, self._returned)
            return {key: item if key == MASK else self._cut(item, dim) for key, item in value.items()}
        if not isinstance(value, torch.Tensor) or value.ndim <= dim or value.shape[dim] == 1:
            return value
        if value.shape[dim] != self._total:
            raise MisfitError(
                "A patch changes the number of tokens inside attention",
                f"it returned {list(value.shape)} for {self._total} tokens",
                "Remove the node that adds or drops tokens (such as a reference cache or token merging)",
            )
        return self._layout.split(value, dim=dim, over=self._order)
