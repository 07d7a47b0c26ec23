"""RayControlNetLoader: a ControlNet whose weights are on the pool, and whose residuals are computed there."""

from __future__ import annotations

from typing import Any

import folder_paths

from ..loaders.parts import spec_of
from ..workers.driver import remote
from ..workers.driver.control import load_control
from .files import changed, find

FOLDERS = ("controlnet",)


class RayControlNetLoader:
    """Loads a ControlNet on every worker of the pool."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Loads a ControlNet on the workers. What it computes stays there, where ComfyUI's own would send it to them "
        "at every model call. Both outputs are the same ControlNet: one for Ray nodes, one for every other node."
    )
    SEARCH_ALIASES = ("controlnet", "multi gpu")
    FUNCTION = "load"
    RETURN_TYPES = ("RAY_CONTROL_NET", "CONTROL_NET")
    RETURN_NAMES = ("ray_control_net", "control_net")
    OUTPUT_TOOLTIPS = ("The ControlNet, for Apply ControlNet (Ray).", "The same ControlNet, for ComfyUI's own nodes.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ray_actors": ("RAY_ACTORS", {"tooltip": "The pool, by the model that is to be controlled."}),
                "control_net_name": (
                    folder_paths.get_filename_list("controlnet"),
                    {"tooltip": "Safetensors file in models/controlnet."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, control_net_name: str, **_: Any) -> str:
        """A file that was replaced is loaded again."""
        return changed(FOLDERS, control_net_name)

    def load(self, ray_actors: Any, control_net_name: str) -> tuple[Any, Any]:
        place = remote.on_pool(ray_actors).rpc.place
        control = load_control(place, spec_of(find(FOLDERS, control_net_name), reader=place.config.reader))
        return control, control
