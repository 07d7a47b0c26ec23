"""TeaCache as a node of its own: ComfyUI has none."""

from __future__ import annotations

from typing import Any

from ..workers.driver import remote
from ..workers.driver.teacache import TeaCache, cached
from .mirrors import SYNC
from .numbers import check


class RayTeaCache:
    """Leaves out evaluations of the model that would hardly differ from the last one.

    After Liu et al., https://arxiv.org/abs/2411.19108. An evaluation that is left out costs nothing: no worker is
    called, for no condition, and the last direction from the latent to the result is followed once more.
    """

    CATEGORY = "Raylight/extra"
    DESCRIPTION = (
        "Leaves out evaluations of the model that would hardly differ from the last one: while the latent has changed "
        "by less than the threshold, in sum, the last result's direction is followed. Faster, and not the same "
        "picture. After TeaCache (arXiv 2411.19108), with the noisy latent as indicator, so that it works for every "
        "model."
    )
    SEARCH_ALIASES = ("tea cache", "cache", "speed")
    FUNCTION = "patch"
    RETURN_TYPES = ("RAY_ACTORS",)
    RETURN_NAMES = ("ray_actors",)
    OUTPUT_TOOLTIPS = ("The model with this change; the input is not changed.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def part(default: float, high: float, tooltip: str) -> tuple[str, dict[str, Any]]:
            return "FLOAT", {"default": default, "min": 0.0, "max": high, "step": 0.01, "tooltip": tooltip}

        def whole(default: int, high: int, tooltip: str) -> tuple[str, dict[str, Any]]:
            return "INT", {"default": default, "min": 1, "max": high, "tooltip": tooltip}

        return {
            "required": {
                "ray_actors": ("RAY_ACTORS", {"tooltip": "The model on the pool."}),
                "threshold": part(0.25, 5.0, "Sum of relative changes at which the model runs again; 0 is off."),
                "warmup_percent": part(0.1, 0.5, "Part of the schedule at its start that is always computed."),
                "retention_interval": whole(8, 64, "Of as many evaluations in a row, one is computed; 1 is off."),
                "start_percent": part(0.15, 1.0, "Where in the schedule evaluations begin to be left out."),
                "end_percent": part(0.95, 1.0, "Where in the schedule they cease to be."),
            },
            "optional": {
                "subsample_factor": whole(8, 16, "Every how many rows and columns are compared."),
                "verbose": ("BOOLEAN", {"default": False, "tooltip": "Log each decision."}),
                "distributed_sync": ("BOOLEAN", {"default": True, "tooltip": SYNC}),
            },
        }

    def patch(  # noqa: PLR0917, the names are those of users' files
        self,
        ray_actors: Any,
        threshold: float,
        warmup_percent: float,
        retention_interval: int,
        start_percent: float,
        end_percent: float,
        subsample_factor: int = 8,
        verbose: bool = False,
        distributed_sync: bool = True,
    ) -> tuple[Any]:
        numbers = {
            "threshold": threshold,
            "warmup_percent": warmup_percent,
            "retention_interval": retention_interval,
            "start_percent": start_percent,
            "end_percent": end_percent,
            "subsample_factor": subsample_factor,
        }
        declared = self.INPUT_TYPES()
        check({**declared["required"], **declared["optional"]}, numbers)
        settings = TeaCache(
            threshold=threshold,
            warmup=warmup_percent,
            interval=retention_interval,
            start=start_percent,
            end=end_percent,
            subsample=subsample_factor,
            verbose=verbose,
        )
        return (cached(remote.on_pool(ray_actors), settings),)
