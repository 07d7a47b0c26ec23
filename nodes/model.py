"""RayModel: a file on all cards, without a number to set."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy import model_management

from ..loaders.parts import spec_of
from ..raylight.choice.choose import GOALS
from ..workers.driver import remote
from ..workers.driver.checkpoint import parts_of
from ..workers.driver.chosen import Chosen
from ..workers.pool.cards import pool_of
from .files import changed, find
from .loaders import FOLDERS, GGUF_FOLDERS, gguf_files

EVERY_FOLDER = tuple(dict.fromkeys((*FOLDERS, *GGUF_FOLDERS)))


class RayModel:
    """Loads a model on all cards; before each run it is chosen which of them compute, and how they share."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Loads a diffusion model, a checkpoint or a GGUF file on all GPUs. Before each run it chooses which of them "
        "compute and how they share the work, from the model, the size of the picture, the conditions, free memory and "
        "the measured links. Where sharing does not pay, one GPU computes. ComfyUI's log and Ray Report say what was "
        "chosen and why. CLIP and VAE are those of a checkpoint."
    )
    SEARCH_ALIASES = ("load diffusion model", "load checkpoint", "gguf", "multi gpu", "auto", "all gpus")
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "RAY_ACTORS")
    RETURN_NAMES = ("model", "clip", "vae", "ray_actors")
    OUTPUT_TOOLTIPS = (
        "The model, for any node that takes a MODEL.",
        "The text encoder of a checkpoint. A file without one says so where it is used.",
        "The VAE of a checkpoint. A file without one says so where it is used.",
        "The same model as the first output, for Ray nodes such as Ray Report.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [name for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]
        return {
            "required": {
                "model_name": (
                    list(dict.fromkeys([*names, *gguf_files()])),
                    {"tooltip": "File in models/diffusion_models or models/checkpoints, safetensors or GGUF."},
                ),
            },
            "optional": {
                "gpus": (
                    "STRING",
                    {
                        "default": "all",
                        "tooltip": "all, or the numbers of the GPUs that may be used, comma separated (for example "
                        "0,2). Without a GPU they are CPU workers.",
                    },
                ),
                "goal": (
                    list(GOALS),
                    {
                        "default": "auto",
                        "tooltip": "auto: the fewest GPUs that are within 3 % of the fastest way. speed: the fastest "
                        "way. memory: the way that takes least memory of each GPU, as long as it is not slower than "
                        "one.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, model_name: str, **_: Any) -> str:
        """A file that was replaced is loaded again."""
        return changed(EVERY_FOLDER, model_name)

    def load(self, model_name: str, gpus: str = "all", goal: str = "auto") -> tuple[Any, Any, Any, Any]:
        config = pool_of(gpus, model_management.get_torch_device().type)
        spec = spec_of(find(EVERY_FOLDER, model_name), reader=config.reader)
        model = remote.load_at(Chosen(config, goal), spec)
        encoder, vae = parts_of(spec)
        return model, encoder, vae, model
