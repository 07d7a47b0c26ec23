"""A block whose weights are patched each time they are gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ....loaders.residency import PackedBlock
from ...mapping.adopt import Home, parts


class PatchedBlock(PackedBlock):
    """A block with patches: they are computed into the bytes that its weights were gathered into.

    So a weight is what it is in a model that fits, quantised again if it was, and takes no memory beside the block. One
    whose shape the patches change has no room there, and is on its own while the block computes.

    Args:
        block: the same without patches.
        homes: of the parameters to patch, by key.
        patch: makes a parameter, by its key, the patched one, of the same dtype.
    """

    def __init__(
        self,
        block: PackedBlock,
        homes: Mapping[str, Home],
        patch: Callable[[str], None],
        *,
        ranks: int,
        device: torch.device,
    ) -> None:
        super().__init__(block.name, block.module, block.leaves, ranks=ranks, device=device)
        self._homes = homes
        self._patch = patch
        self._bare: list[tuple[Home, nn.Parameter]] = []

    def point(self, whole: torch.Tensor) -> None:
        super().point(whole)
        for key, home in self._homes.items():
            self._bare.append((home, home.parameter))
            gathered = parts(home.parameter)[0]
            self._patch(key)
            patched = parts(home.parameter)[0]
            if patched.shape == gathered.shape:
                gathered.copy_(patched)
                set_data(home.parameter, gathered)

    def release(self) -> None:
        for home, parameter in self._bare:  # with the scale of the file, for the next time
            home.module._parameters[home.name] = parameter
        self._bare.clear()
        super().release()


def set_data(parameter: Any, value: torch.Tensor) -> None:
    """Make a parameter have `value` for its data; scales of a quantised one stay."""
    if hasattr(parameter, "_qdata"):
        parameter._qdata = value
    else:
        parameter.data = value
