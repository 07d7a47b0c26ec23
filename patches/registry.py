"""Which plan belongs to which of ComfyUI's diffusion-model classes."""

from collections.abc import Mapping
from types import MappingProxyType

from ..raylight.errors import UnsupportedError
from ..raylight.plan import Plan
from .flux import FLUX
from .lumina import LUMINA
from .wan import WAN

PLANS: Mapping[str, Plan] = MappingProxyType({"WanModel": WAN, "Flux": FLUX, "NextDiT": LUMINA})
"""Plans by exact class name. A subclass has a forward of its own, so it has a plan of its own or none."""


def plan_for(model: type | str) -> Plan:
    """The plan of a diffusion-model class, given as `type(model.diffusion_model)` or by name.

    Raises:
        UnsupportedError: there is none; the message names the class and those there are.
    """
    name = model if isinstance(model, str) else model.__name__
    if name not in PLANS:
        raise UnsupportedError(
            f"Raylight cannot split the model family {name} over several workers",
            "it has no plan for it",
            f"Use one of {', '.join(sorted(PLANS))}, or set ulysses_degree and ring_degree to 1",
        )
    return PLANS[name]
