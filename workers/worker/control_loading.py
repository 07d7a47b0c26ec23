"""A worker's copy of a ControlNet: ComfyUI's own, its weights the file's memory."""

from __future__ import annotations

import comfy.controlnet
import torch

from ...loaders.source import Source
from ...patches.control import control_plan_for
from ...raylight.config import ModelSpec
from ...raylight.plan import Plan
from ..mapping.adopt import Adopted, Adopting, homes_of, on_cpu
from .fsdp.block_weights import BlockWeights
from .model import WorkerModel


class WorkerControl(WorkerModel):
    """A ControlNet of a worker. The ranks of a sequence share it where its blocks have a plan, else each runs it."""

    FINDS = False

    @property
    def diffusion(self) -> torch.nn.Module:
        return self._base.model

    def _divided(self, adopted: Adopted) -> BlockWeights | None:
        """ControlNets are small beside what they control: every rank holds its own."""
        return None

    def _adopted(self, spec: ModelSpec, dtype: torch.dtype) -> Adopted:
        return adopt_control(self.source, dtype)

    def _planned(self) -> Plan | None:
        return control_plan_for(self.diffusion)


def adopt_control(source: Source, dtype: torch.dtype) -> Adopted:
    """Build the ControlNet of a file without copying its plain weights. Call it outside of inference mode.

    Args:
        dtype: what plain ComfyUI keeps the weights in, as the driver found it, which has built it already.
    """
    mode = Adopting(source, convert=not on_cpu())
    with mode:
        control = comfy.controlnet.load_controlnet_state_dict(dict(source.tensors), model_options={"dtype": dtype})
    return Adopted(control.control_model_wrapped, homes_of(control.control_model, mode.dtype_of))
