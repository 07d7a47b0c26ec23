"""Loader nodes: a file's name becomes a MODEL whose weights are on the pool."""

from __future__ import annotations

from typing import Any

import folder_paths

from ..raylight.config import ModelSpec, PoolConfig
from ..raylight.errors import LoadError
from ..workers import remote
from ..workers.loading import WEIGHT_DTYPES

FOLDERS = ("diffusion_models", "checkpoints")


class RayUNETLoader:
    """Loads a diffusion model on every worker of the pool."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Loads a diffusion model on the workers. Both outputs are the same model: RAY_ACTORS for Ray nodes, "
        "MODEL for every other node of ComfyUI."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("RAY_ACTORS", "MODEL")
    RETURN_NAMES = ("ray_actors", "model")
    OUTPUT_TOOLTIPS = ("The model on the pool, for Ray nodes.", "The same model, for any node that takes a MODEL.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [name for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]
        return {
            "required": {
                "unet_name": (
                    list(dict.fromkeys(names)),
                    {"tooltip": "File in models/diffusion_models or models/checkpoints."},
                ),
                "weight_dtype": (
                    list(WEIGHT_DTYPES),
                    {"tooltip": "Type the weights are kept in. default: the file's, as ComfyUI chooses."},
                ),
                "ray_actors_init": ("RAY_ACTORS_INIT", {"tooltip": "The pool, from Ray Init Actor."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, unet_name: str, **_: Any) -> str:
        """A file that was replaced is loaded again."""
        try:
            spec = ModelSpec.of(_path(unet_name))
        except LoadError:
            return "missing"
        return f"{spec.size} {spec.mtime_ns} {spec.inode}"

    def load(self, unet_name: str, weight_dtype: str, ray_actors_init: PoolConfig) -> tuple[Any, Any]:
        dtype, options = WEIGHT_DTYPES[weight_dtype]
        spec = ModelSpec.of(_path(unet_name), dtype=dtype, options=options)
        model = remote.load_model(ray_actors_init, spec)
        return model, model


def _path(name: str) -> str:
    for folder in FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    raise LoadError(
        f"There is no model file named {name}",
        f"looked in ComfyUI's folders {' and '.join(FOLDERS)}",
        "Put the file there and reload the page, or choose another one",
    )
