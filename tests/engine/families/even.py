"""Models whose heads and tokens divide evenly, so that the bytes they move have a closed form."""

from __future__ import annotations

from functools import partial

from ..case import Case
from . import flux, wan

eight_heads = partial(wan.wan, dim=96, num_heads=8)
eight_flux_heads = partial(flux.flux, hidden_size=128, num_heads=8)
wide = partial(wan.video, frames=2, height=8, width=16)
even_image = partial(flux.image, text=8, size=(8, 8))

CASES = (
    Case(name="wan_even", family="WanModel", model=eight_heads, make=wide, modes=("trunk", "turns", "block")),
    Case(name="flux_even", family="Flux", model=eight_flux_heads, make=even_image, modes=("trunk", "turns")),
)
