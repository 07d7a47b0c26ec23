"""bf16: within what rounding to bf16 does anyway."""

from __future__ import annotations

from ..case import Case
from . import flux, lumina, wan

CASES = (
    Case(name="wan_bf16", family="WanModel", model=wan.wan, make=wan.video, half=True),
    Case(name="flux_bf16", family="Flux", model=flux.flux, make=flux.image, half=True),
    Case(name="zimage_bf16", family="NextDiT", model=lumina.zimage, make=lumina.sheet, half=True),
)
