"""Nodes that free what the workers hold."""

from __future__ import annotations

import math
from typing import Any

from ..workers.driver import remote


class RayOffloadModel:
    """Takes a model off the workers' devices, for example before a VAE decode."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Takes the model's weights off the workers' GPUs and passes the latent through. The host keeps its one copy, "
        "so the next sampler has them back at the speed of the bus, with every LoRA. Runs at every prompt."
    )
    SEARCH_ALIASES = ("free vram", "unload")
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


class RayKill:
    """Ends the workers."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Ends all workers, which frees everything they hold on GPUs and host: for example before a workflow without "
        "Ray nodes. The next prompt that needs workers starts new ones by itself. Runs at every prompt."
    )
    SEARCH_ALIASES = ("stop workers", "free vram")
    FUNCTION = "kill"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    MODES = ("Kill Workers Only", "Kill Entire Cluster")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ray_actors": (
                    # with the initializer it runs where no pool starts, and so no loader
                    "RAY_ACTORS,RAY_ACTORS_INIT",
                    {"tooltip": "Any model on the pool, or Ray Init Actor."},
                ),
                "kill_mode": (
                    list(cls.MODES),
                    {"tooltip": "Workers only, or Ray as well; a Ray cluster that others run is left, not ended."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Never equal to itself: runs every time."""
        return math.nan

    def kill(self, ray_actors: Any, kill_mode: str) -> tuple[()]:
        remote.end_pools(ray=kill_mode == self.MODES[1])
        return ()
