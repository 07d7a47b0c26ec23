"""LoRA nodes: a model with one LoRA more, or a chain of LoRAs for a loader. No worker is called."""

from __future__ import annotations

from typing import Any

import folder_paths

from ..workers.driver.loras import Chain, Lora, with_loras
from .files import changed, find
from .numbers import check

FOLDERS = ("loras",)
PREVIOUS: tuple[str, dict[str, Any]] = (
    "RAY_LORA",
    {"tooltip": "LoRAs that come before this one. Those the model has already are not added again."},
)


def _name() -> tuple[list[str], dict[str, Any]]:
    return (folder_paths.get_filename_list("loras"), {"tooltip": "File in models/loras."})


def _strength(limit: float) -> tuple[str, dict[str, Any]]:
    return (
        "FLOAT",
        {
            "default": 1.0,
            "min": -limit,
            "max": limit,
            "step": 0.01,
            "tooltip": "How strongly to change the model; negative values do the opposite.",
        },
    )


class _LoraNode:
    CATEGORY = "Raylight"
    FUNCTION = "load"

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_: Any) -> str:
        """A file that was replaced is read again."""
        return changed(FOLDERS, lora_name)


class RayLoraLoaderModelOnly(_LoraNode):
    """Adds a LoRA to a model on the pool."""

    DESCRIPTION = (
        "Adds a LoRA to a model on the pool, as LoraLoaderModelOnly does; LoRA, LoHa, LoKr, GLoRA, OFT, BOFT, DoRA "
        "and full differences. Chain several by ray_actors; prev_ray_lora is needed only for LoRAs that the model "
        "does not have yet."
    )
    SEARCH_ALIASES = ("lora", "load lora")
    RETURN_TYPES = ("RAY_ACTORS", "RAY_LORA")
    RETURN_NAMES = ("ray_actors", "ray_lora")
    OUTPUT_TOOLTIPS = ("The model with the LoRA; the input is not changed.", "The LoRAs so far, for the next loader.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ray_actors": ("RAY_ACTORS", {"tooltip": "The model on the pool."}),
                "lora_name": _name(),
                "strength_model": _strength(20.0),
            },
            "optional": {"prev_ray_lora": PREVIOUS},
        }

    def load(
        self, ray_actors: Any, lora_name: str, strength_model: float, prev_ray_lora: Chain | None = None
    ) -> tuple[Any, Chain]:
        check({"strength_model": _strength(20.0)}, {"strength_model": strength_model})
        chain = (*(prev_ray_lora or ()), Lora(find(FOLDERS, lora_name), strength_model))
        return with_loras(ray_actors, chain), chain


class RayLoraLoader(_LoraNode):
    """A LoRA for a Ray loader's lora input, or for RayLoraLoaderModelOnly."""

    DESCRIPTION = "Chains LoRAs for the lora input of a Ray loader. They are applied in the order of the chain."
    SEARCH_ALIASES = ("lora", "lora stack")
    RETURN_TYPES = ("RAY_LORA",)
    RETURN_NAMES = ("ray_lora",)
    OUTPUT_TOOLTIPS = ("The LoRAs so far.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"lora_name": _name(), "strength_model": _strength(100.0)},
            "optional": {"prev_ray_lora": PREVIOUS},
        }

    def load(self, lora_name: str, strength_model: float, prev_ray_lora: Chain | None = None) -> tuple[Chain]:
        check({"strength_model": _strength(100.0)}, {"strength_model": strength_model})
        return ((*(prev_ray_lora or ()), Lora(find(FOLDERS, lora_name), strength_model)),)
