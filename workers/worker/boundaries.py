"""Where the ranks can leave a model call together: before each block of the diffusion model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...raylight.blocks import blocks
from ...raylight.watch import Watch


class Boundaries:
    """Has each block of a model ask, while a call is watched, whether to go on."""

    def __init__(self, model: nn.Module) -> None:
        self._watch: Watch | None = None
        # a module may stand in two lists
        self._handles = [block.register_forward_pre_hook(self._ask) for block in dict.fromkeys(blocks(model))]

    @contextlib.contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Blocks that run inside are steps of `watch`.

        Raises:
            Cancelled: from a block, on all ranks at the same one.
        """
        self._watch = watch
        try:
            yield
            # not after an error, when others may not answer
            watch.finish()
        finally:
            self._watch = None

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _ask(self, module: nn.Module, args: Any) -> None:
        # compiled code runs as it was recorded, without asking
        if self._watch is not None and not torch.compiler.is_compiling():
            self._watch.step()
