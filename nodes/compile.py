"""Compilation of a model's blocks in the workers."""

from __future__ import annotations

from typing import Any

from ..raylight.config import COMPILERS
from ..workers import remote


class RayTorchCompileModel:
    """Has the workers run the blocks of a model under torch.compile."""

    CATEGORY = "Raylight/extra"
    DESCRIPTION = (
        "Compiles each block of the model in the workers, also where they share a picture. The first step of a new "
        "size takes the time to compile, up to minutes; the others are faster. Results differ in the last bits."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("RAY_ACTORS",)
    RETURN_NAMES = ("ray_actors",)
    OUTPUT_TOOLTIPS = ("The model with this setting; the input is not changed.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ray_actors": ("RAY_ACTORS", {"tooltip": "The model on the pool."}),
                "backend": (
                    list(COMPILERS),
                    {"tooltip": "inductor makes kernels of its own; cudagraphs records those there are (NVIDIA only)."},
                ),
            }
        }

    def patch(self, ray_actors: Any, backend: str) -> tuple[Any]:
        return (remote.with_settings(ray_actors, compile=backend),)
