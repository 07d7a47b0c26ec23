"""RayCLIPLoader: text encoders whose weights are on the pool."""

from __future__ import annotations

from typing import Any

import comfy.sd
import folder_paths

from ..loaders.parts import spec_of
from ..raylight.config import ModelSpec
from ..raylight.errors import LoadError
from ..workers.driver import remote
from ..workers.driver.encoders import load_encoders
from .files import changed, find

FOLDERS = ("text_encoders",)
NONE = "none"
TYPES = ("sdxl", *(kind.name.lower() for kind in comfy.sd.CLIPType))
"""ComfyUI's own, and what its DualCLIPLoader calls the pair that has no type of its own."""


class RayCLIPLoader:
    """Loads one to four text encoders on the workers."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Loads text encoders on the workers, as Load CLIP, DualCLIPLoader, TripleCLIPLoader and QuadrupleCLIPLoader do "
        "in ComfyUI's process. On several GPUs each holds a part of the weights. The output works with every node that "
        "takes a CLIP."
    )
    SEARCH_ALIASES = ("clip", "text encoder", "t5", "dual clip", "multi gpu")
    FUNCTION = "load"
    RETURN_TYPES = ("CLIP",)
    RETURN_NAMES = ("clip",)
    OUTPUT_TOOLTIPS = ("The text encoders, for any node that takes a CLIP.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = folder_paths.get_filename_list("text_encoders")
        more = {
            f"clip_name{number}": (
                [NONE, *files],
                {"default": NONE, "tooltip": "Another file, where the type has several."},
            )
            for number in (2, 3, 4)
        }
        return {
            "required": {
                "ray_actors": ("RAY_ACTORS", {"tooltip": "The pool, by the model that is prompted."}),
                "clip_name1": (files, {"tooltip": "Safetensors file in models/text_encoders."}),
                "type": (list(TYPES), {"default": "stable_diffusion", "tooltip": "As in ComfyUI's own loaders."}),
            },
            "optional": more,
        }

    @classmethod
    def IS_CHANGED(cls, clip_name1: str, **more: Any) -> str:
        """A file that was replaced is loaded again."""
        return "".join(changed(FOLDERS, name) for name in (clip_name1, *_others(more)))

    def load(self, ray_actors: Any, clip_name1: str, type: str, **more: Any) -> tuple[Any]:
        place = remote.on_pool(ray_actors).rpc.place
        found = [spec_of(find(FOLDERS, name)) for name in (clip_name1, *_others(more))]
        parts = [spec for spec in found if spec.others]
        if parts:
            raise LoadError(
                f"{parts[0].path} is a part of a text encoder in several files",
                "ComfyUI reads text encoders from one file each",
                "Choose a file that holds the whole encoder",
            )
        spec = ModelSpec.of(
            found[0].path, others=[spec.path for spec in found[1:]], encoder=type, reader=place.config.reader
        )
        return (load_encoders(place, spec),)


def _others(more: dict[str, Any]) -> list[str]:
    names = (more.get(f"clip_name{number}", NONE) for number in (2, 3, 4))
    return [name for name in names if name != NONE]
