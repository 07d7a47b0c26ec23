"""A node that says how the pool is and how the last run went, as text and as a picture."""

from __future__ import annotations

import math
from typing import Any

from ..workers.driver import chart, remote, report
from .samplers import core


class RayReport:
    """Shows workers, what they hold, and how the last run went."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Shows which workers there are and on which devices, the models they hold and how these are changed, the "
        "memory of each, and of the last run the seconds per step, the share of communication, and the speed-up that "
        "was predicted and seen. Runs at every prompt, and starts no worker."
    )
    SEARCH_ALIASES = ("status", "benchmark", "memory", "speed-up", "multi gpu")
    FUNCTION = "report"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("report", "chart")
    OUTPUT_TOOLTIPS = ("The report as text.", "The report as a picture.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"ray_actors": ("RAY_ACTORS", {"tooltip": "The model on the pool."})},
            "optional": {
                "latent": ("LATENT", {"tooltip": "Connect the sampler, for a report on the run it has just finished."})
            },
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Never equal to itself: runs every time."""
        return math.nan

    def report(self, ray_actors: Any, latent: Any = None) -> dict[str, Any]:
        found = report.collect(remote.on_pool(ray_actors).rpc)
        text, picture = "\n".join(report.lines(found)), chart.draw(found)
        shown = core.PreviewImage().save_images(picture)["ui"]
        return {"ui": {**shown, "text": [text]}, "result": (text, picture)}
