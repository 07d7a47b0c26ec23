"""The blocks of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of its outermost lists and dicts of modules: what a forward runs one after the other."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from child.children()
        else:
            yield from blocks(child)
