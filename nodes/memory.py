"""Nodes that free the workers' devices."""

from __future__ import annotations

import math
from typing import Any

from ..workers import remote


class RayOffloadModel:
    """Takes a model off the workers' devices, for example before a VAE decode."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Takes the model's weights off the workers' GPUs and passes the latent through. The host keeps its one copy, "
        "so the next sampler has them back at the speed of the bus, with every LoRA. Runs at every prompt."
    )
    FUNCTION = "offload"
    OUTPUT_NODE = True
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent, unchanged.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"ray_actors": ("RAY_ACTORS", {"tooltip": "The model on the pool."})},
            "optional": {
                "latent": ("LATENT", {"tooltip": "Passed through: connect the sampler, to offload after it has run."})
            },
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Never equal to itself: runs every time."""
        return math.nan

    def offload(self, ray_actors: Any, latent: Any = None) -> tuple[Any]:
        remote.offload(ray_actors)
        return (latent,)
