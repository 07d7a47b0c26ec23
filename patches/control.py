"""ControlNets built of their families' blocks: their residuals are made of whole tokens, between the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from ..raylight.plan import Plan, Region
from .flux import FLUX
from .qwen import QWEN
from .sd3 import SD3


def _around_blocks(plan: Plan) -> Plan:
    """The same blocks without a head, tokens cut and joined around each."""
    return Plan(*(Region(*region.blocks, whole=region.whole, per_block=True) for region in plan.regions))


PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        "comfy.ldm.flux.controlnet.ControlNetFlux": _around_blocks(FLUX),
        "comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel": _around_blocks(QWEN),
        "comfy.cldm.mmdit.ControlNet": _around_blocks(SD3),
    }
)
"""By module and name of the class: two classes have the name ControlNet."""


def control_plan_for(model: nn.Module) -> Plan | None:
    """How ranks share the blocks of a ControlNet; None where each of them runs all of it."""
    family = type(model)
    return PLANS.get(f"{family.__module__}.{family.__qualname__}")
