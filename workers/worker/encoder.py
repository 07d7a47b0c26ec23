"""A worker's text encoders: ComfyUI's own, their weights the files' memory, or a part of each block of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from comfy import model_management

from ...raylight.config import ModelSpec
from ..mapping.adopt import Adopted
from ..mapping.encoders import adopt_encoders
from ..wire.messages import Wrapped
from .fsdp.block_weights import BlockWeights
from .model import WorkerModel

DEVICE = "execution_device"
"""Key of the options of an encoder."""


class WorkerEncoder(WorkerModel):
    """Text encoders of a worker. All ranks of a sequence encode the same; on GPUs each has a part of the weights.

    A prompt has too few tokens to be divided, but its encoder may be larger than the model. So weights are in parts
    also where those of the model are not, as long as that frees memory: each rank reads its own, and no more.
    """

    FINDS: ClassVar[bool] = False

    @property
    def diffusion(self) -> torch.nn.Module:
        return self._base.model

    def _adopted(self, spec: ModelSpec, dtype: torch.dtype) -> Adopted:
        return adopt_encoders(self.source, spec, dtype)

    def _divided(self, adopted: Adopted) -> BlockWeights | None:
        parallel, device = self._mesh.parallel, adopted.patcher.load_device
        apart = self._mesh.axis("weights")
        sharing = apart if apart.size > 1 else self._mesh.sequence
        residency = parallel.residency
        if residency == "resident" and not model_management.is_device_cpu(device):
            residency = "sharded"
        if residency == "resident" or (residency == "sharded" and sharing.size == 1):
            return None
        blocks = BlockWeights(
            adopted.patcher.model,
            adopted.homes,
            self.source,
            sharing,
            residency=residency,
            prefetch=parallel.prefetch,
            device=device,
        )
        return blocks if blocks.footprint(0).total < blocks.footprint(0, residency="resident").total else None

    def _planned(self) -> None:
        """Every rank runs all of it."""
        return

    def activations(self, args: tuple[Any, ...]) -> int:
        """Bytes that a call takes beside the weights, as ComfyUI estimates it; 0 where it does not."""
        estimate = getattr(self.diffusion, "memory_estimation_function", None)
        return 0 if estimate is None else int(estimate(args[1], device=self._base.load_device))

    def note(self, queued: float, took: float, args: Any) -> None:
        """Calls of it are not recorded: a prompt is encoded once."""

    def run(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cancelled: Callable[[], bool] = lambda: False,
        wrapped: Wrapped | None = None,
    ) -> Any:
        """Call a method of the encoders.

        Args:
            args: options that are set before, one after the other, and then the method's.

        Raises:
            Cancelled: a rank that encodes the same has; all of them leave before the same block.
        """
        options, *rest = args
        encoder: Any = self.diffusion
        encoder.reset_clip_options()
        for each in options:
            encoder.set_clip_options({**each, DEVICE: self._base.load_device} if DEVICE in each else each)
        return super().run(method, tuple(rest), kwargs, cancelled, wrapped)
