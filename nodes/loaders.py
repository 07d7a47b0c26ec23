"""Loader nodes: a file's name becomes a MODEL whose weights are on the pool."""

from __future__ import annotations

import os
from typing import Any

import folder_paths

from ..loaders.parts import spec_of
from ..raylight.config import ModelSpec, PoolConfig
from ..raylight.errors import LoadError
from ..workers.driver import remote
from ..workers.driver.loras import Chain, with_loras
from ..workers.mapping.loading import WEIGHT_DTYPES
from .files import changed, find

FOLDERS = ("diffusion_models", "checkpoints")
GGUF_FOLDERS = ("diffusion_models", "unet_gguf")
"""The second one is where other packs register their GGUF files, where one is installed."""
GGUF_DTYPES = {"default": "", "target": "", "float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
INIT: tuple[str, dict[str, Any]] = ("RAY_ACTORS_INIT", {"tooltip": "The pool, from Ray Init Actor."})
LORA: tuple[str, dict[str, Any]] = (
    "RAY_LORA",
    {"tooltip": "LoRAs for the model, from Ray LoRA Loader (chain). They can also be added to the model later."},
)


class _Loader:
    CATEGORY = "Raylight"
    FUNCTION = "load"
    RETURN_TYPES = ("RAY_ACTORS", "MODEL")
    RETURN_NAMES = ("ray_actors", "model")
    OUTPUT_TOOLTIPS = ("The model on the pool, for Ray nodes.", "The same model, for any node that takes a MODEL.")

    FILES: tuple[str, ...]

    @classmethod
    def IS_CHANGED(cls, unet_name: str, **_: Any) -> str:
        """A file that was replaced is loaded again."""
        return changed(cls.FILES, unet_name)

    @staticmethod
    def result(config: PoolConfig, spec: ModelSpec, lora: Chain | None) -> tuple[Any, Any]:
        model = with_loras(remote.load_model(config, spec), lora or ())
        return model, model


class RayUNETLoader(_Loader):
    """Loads a diffusion model on every worker of the pool."""

    DESCRIPTION = (
        "Loads a diffusion model on the workers. Both outputs are the same model: RAY_ACTORS for Ray nodes, "
        "MODEL for every other node of ComfyUI."
    )
    SEARCH_ALIASES = ("load diffusion model", "load checkpoint", "unet", "multi gpu")
    FILES = FOLDERS

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
                "ray_actors_init": INIT,
            },
            "optional": {"lora": LORA},
        }

    def load(
        self, unet_name: str, weight_dtype: str, ray_actors_init: PoolConfig, lora: Chain | None = None
    ) -> tuple[Any, Any]:
        dtype, options = WEIGHT_DTYPES[weight_dtype]
        path = find(FOLDERS, unet_name)
        spec = spec_of(path, dtype=dtype, options=options, reader=ray_actors_init.reader)
        return self.result(ray_actors_init, spec, lora)


class RayGGUFLoader(_Loader):
    """Loads a GGUF diffusion model on every worker; quantised weights stay quantised, also on the device."""

    DESCRIPTION = (
        "Loads a GGUF diffusion model on the workers, without any other pack. Weights stay quantised on the "
        "device and are dequantised layer by layer."
    )
    SEARCH_ALIASES = ("gguf", "quantized", "load diffusion model", "multi gpu")
    FILES = GGUF_FOLDERS

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "unet_name": (gguf_files(), {"tooltip": "GGUF file in models/diffusion_models (or models/unet)."}),
                "dequant_dtype": (
                    list(GGUF_DTYPES),
                    {
                        "tooltip": "Type weights are rounded to after they are dequantised. default, target: the one "
                        "the layer computes in."
                    },
                ),
                "patch_dtype": (
                    list(GGUF_DTYPES),
                    {
                        "tooltip": "Type LoRAs on quantised weights are computed in. default: float32, as ComfyUI "
                        "does; target: the one the layer computes in, which is faster."
                    },
                ),
                "ray_actors_init": INIT,
            },
            "optional": {"lora": LORA},
        }

    def load(
        self,
        unet_name: str,
        dequant_dtype: str,
        patch_dtype: str,
        ray_actors_init: PoolConfig,
        lora: Chain | None = None,
    ) -> tuple[Any, Any]:
        path = find(GGUF_FOLDERS, unet_name)
        if not path.lower().endswith(".gguf"):
            raise LoadError(
                f"{unet_name} is not a GGUF file", "", "Choose a GGUF file, or use Load Diffusion Model (Ray)"
            )
        spec = spec_of(
            path,
            reader=ray_actors_init.reader,
            dequant_dtype=GGUF_DTYPES[dequant_dtype],
            patch_dtype="target" if patch_dtype == "target" else GGUF_DTYPES[patch_dtype],
        )
        return self.result(ray_actors_init, spec, lora)


def gguf_files() -> list[str]:
    """Names of the GGUF files in ComfyUI's folders, whose own lists leave them out."""
    names: list[str] = []
    for folder in GGUF_FOLDERS:
        if folder in folder_paths.folder_names_and_paths:
            for root in folder_paths.get_folder_paths(folder):
                if os.path.isdir(root):
                    found, _ = folder_paths.recursive_search(root, excluded_dir_names=[".git"])
                    names += folder_paths.filter_files_extensions(found, [".gguf"])
    return sorted(dict.fromkeys(names))
