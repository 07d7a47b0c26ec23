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

SCHEMES: Mapping[str, str] = {
    "control_sd3": "sd3",
    "control_sd35": "sd3",
    "control_sd35_large": "sd3",
    "control_flux": "flux",
    "control_unet": "unet",
    "control_lora": "unet",
    "taesd3": "",
}
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
    if name.startswith("control_sd35"):
        return _sd35(double=name == "control_sd35_large", operations=comfy.ops.disable_weight_init)
    config = _config(SCHEMES[name], size)
    arguments: dict[str, Any] = {"operations": comfy.ops.disable_weight_init, **config}
    if name == "control_flux":
        return comfy.ldm.flux.controlnet.ControlNetFlux(**arguments)
    if name in ("control_unet", "control_lora"):
        return comfy.cldm.cldm.ControlNet(hint_channels=3, **arguments)
    return comfy.cldm.mmdit.ControlNet(num_blocks=2, control_latent_channels=16, **arguments)


def keys_of(name: str, state: State) -> State:
    """The weights under the names that files have."""
    import comfy.utils

    if name == "control_flux":
        # the name that ComfyUI knows such files by; versions differ in what their class calls it
        return {re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", key): value for key, value in state.items()}
    if name == "control_lora":
        return _low_rank(state)
    if name.startswith("control_sd35"):
        borrowed = "orig_y_embedder" if name == "control_sd35_large" else "x_embedder"
        return {key: value for key, value in state.items() if not key.startswith(borrowed)}
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


def _sd35(*, double: bool, operations: Any) -> torch.nn.Module:
    """With the sizes of the small SD3: 4 heads of 64. `double` borrows the model's y_embedder, else its x_embedder."""
    import comfy.cldm.dit_embedder
    import torch

    return comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None,
        patch_size=2,
        in_chans=16,
        num_layers=2,
        main_model_double=4,
        double_y_emb=double,
        attention_head_dim=64,
        num_attention_heads=4,
        adm_in_channels=2048,
        device=None,
        dtype=torch.float32,
        operations=operations,
    )


def _low_rank(state: State) -> State:
    """A Control-LoRA: what the model does not have is whole, a part of the rest a difference of rank 2."""
    import torch

    generator = torch.Generator().manual_seed(3)
    found = {"lora_controlnet": torch.zeros(1)}
    for key, value in state.items():
        if key.startswith(("input_hint_block", "zero_convs", "middle_block_out")):
            found[key] = value
        elif key.startswith("input_blocks") and key.endswith("weight") and value.ndim > 1:
            stem, rows, columns = key.removesuffix(".weight"), value.shape[0], value[0].numel()
            found[f"{stem}.up"] = torch.randn(rows, 2, generator=generator) * 0.3
            found[f"{stem}.down"] = torch.randn(2, columns, generator=generator) * columns**-0.5
    return found


def _config(family: str, size: Mapping[str, int]) -> dict[str, Any]:
    import comfy.model_detection
    import torch

    recipe = RECIPES[family]
    markers = {key: torch.empty(shape, device="meta") for key, shape in recipe.keys({**recipe.size, **size}).items()}
    config = comfy.model_detection.model_config_from_unet(markers, "")
    return dict(config.unet_config)
