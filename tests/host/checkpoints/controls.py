"""Small ControlNets, and a VAE for their pictures: random weights of the classes that ComfyUI's loader finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .recipes import RECIPES

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]
    Fill = Callable[[torch.nn.Module], State]

SCHEMES: Mapping[str, str] = {"control_sd3": "sd3", "control_flux": "flux", "control_unet": "unet", "taesd3": ""}
"""What can be written, with the family whose sizes it has."""


def model_of(name: str, size: Mapping[str, int]) -> torch.nn.Module:
    """ComfyUI's module, without values in its weights."""
    import comfy.cldm.cldm
    import comfy.cldm.mmdit
    import comfy.ldm.flux.controlnet
    import comfy.ops
    import comfy.taesd.taesd

    if name == "taesd3":
        return comfy.taesd.taesd.TAESD(latent_channels=16)
    config = _config(SCHEMES[name], size)
    arguments: dict[str, Any] = {"operations": comfy.ops.disable_weight_init, **config}
    if name == "control_flux":
        return comfy.ldm.flux.controlnet.ControlNetFlux(**arguments)
    if name == "control_unet":
        return comfy.cldm.cldm.ControlNet(hint_channels=3, **arguments)
    return comfy.cldm.mmdit.ControlNet(num_blocks=2, control_latent_channels=16, **arguments)


def keys_of(name: str, state: State) -> State:
    """The weights under the names that files have."""
    import comfy.utils

    if name == "control_flux":
        # the name that ComfyUI knows such files by; versions differ in what their class calls it
        return {re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", key): value for key, value in state.items()}
    if name != "control_sd3":
        return state
    depth = state["x_embedder.proj.weight"].shape[0] // 64
    renamed: State = {}
    left = dict(state)
    for key, target in comfy.utils.mmdit_to_diffusers({"depth": depth, "num_blocks": 2}).items():
        if isinstance(target, str) and target in state:
            renamed[key] = left.pop(target, state[target])
        elif not isinstance(target, str) and target[0] in state:
            dim, start, length = target[1]
            renamed[key] = state[target[0]].narrow(dim, start, length).clone()
            left.pop(target[0], None)
    return {**renamed, **left}


def _config(family: str, size: Mapping[str, int]) -> dict[str, Any]:
    import comfy.model_detection
    import torch

    recipe = RECIPES[family]
    markers = {key: torch.empty(shape, device="meta") for key, shape in recipe.keys({**recipe.size, **size}).items()}
    config = comfy.model_detection.model_config_from_unet(markers, "")
    return dict(config.unet_config)
