"""SD1.5, SD2, SDXL and what is built like them, by rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy_raylight.raylight.plan import RowPlan

from ..case import TRUNK, Case, Inputs, build, override, random

SD15: dict[str, Any] = {
    "num_res_blocks": [2] * 4,
    "channel_mult": (1, 2, 4, 4),
    "num_heads": 4,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
SDXL: dict[str, Any] = {
    "num_res_blocks": [2] * 3,
    "channel_mult": (1, 2, 4),
    "num_head_channels": 16,
    "transformer_depth": [0, 0, 2, 2, 3, 3],
    "transformer_depth_middle": 3,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 20,
}
VIDEO: dict[str, Any] = {
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": [3, 1, 1],
    "use_temporal_resblock": True,
    "use_temporal_attention": True,
    "disable_temporal_crossattention": False,
}
SMALL: dict[str, Any] = {
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "num_heads": 3,
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 4,
}
"""Two levels; neither 2 nor 5 ranks divide the heads."""
EVEN: dict[str, Any] = {**SMALL, "num_heads": 8}
CONTROL = (
    (32, 0),
    (32, 0),
    (32, 0),
    (32, 1),
    (64, 1),
    (64, 1),
    (64, 2),
    (128, 2),
    (128, 2),
    (128, 3),
    (128, 3),
    (128, 3),
)
"""Channels and level of what SD15's skip connections hold."""
FRAMES = 3


def unet(config: dict[str, Any], *, channels: int = 4, width: int = 32, **more: Any) -> torch.nn.Module:
    common = dict(image_size=32, in_channels=channels, out_channels=4, model_channels=width, context_dim=24)
    given = {**common, "use_spatial_transformer": True, "legacy": False, **config, **more}
    model = build("comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel", **given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # so that every layer counts
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    return model


def picture(
    rows: int = 32, columns: int = 24, *, batch: int = 2, channels: int = 4, label: int = 0, **more: Any
) -> Inputs:
    """A latent, the timestep, text, and a label where the model takes one."""
    x, t = random(batch, channels, rows, columns), torch.linspace(300, 600, batch)
    return (x, t, random(batch, 7, 24)), {"y": random(batch, label) if label else None, **more}


def textless() -> Inputs:
    """Cross-attention without text is self-attention."""
    (x, t, _), more = picture(16, 12)
    return (x, t, None), more


def controlled(rows: int = 32, columns: int = 24) -> Inputs:
    def residual(channels: int, level: int) -> torch.Tensor:
        return random(2, channels, -(-rows // 2**level), -(-columns // 2**level)) * 0.1

    output: list[torch.Tensor | None] = [residual(*each) for each in CONTROL]
    output[3] = None
    return picture(rows, columns, control={"input": [], "output": output, "middle": [residual(128, 3)]})


def video() -> Inputs:
    return picture(
        16,
        12,
        batch=2 * FRAMES,
        channels=4,
        label=20,
        num_video_frames=FRAMES,
        image_only_indicator=torch.zeros(2, FRAMES),
    )


def optioned(inputs: Callable[[], Inputs], options: Callable[[], dict[str, Any]]) -> Inputs:
    """With transformer_options, and equal draws in every forward."""

    def seeds(emb: torch.Tensor, channels: int, options: dict[str, Any]) -> torch.Tensor:
        torch.manual_seed(3)
        return emb

    args, kwargs = inputs()
    made = options()
    patches = {**made.get("patches", {}), "emb_patch": [seeds]}
    return args, {**kwargs, "transformer_options": {"sigmas": torch.tensor([1.0]), **made, "patches": patches}}


def node(module: str, name: str, *arguments: Any, channels: int = 32) -> dict[str, Any]:
    """The transformer_options that one of ComfyUI's own nodes sets."""
    import comfy.model_patcher
    import comfy.model_sampling

    base = torch.nn.Module()
    base.model_config = type("Config", (), {"unet_config": {"model_channels": channels}})()
    base.model_sampling = comfy.model_sampling.ModelSamplingDiscrete()
    patcher = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    function = cls.execute if hasattr(cls, "execute") else getattr(cls(), cls.FUNCTION)
    out = function(patcher, *arguments)
    options: dict[str, Any] = getattr(out, "result", out)[0].model_options["transformer_options"]
    return options


def free_u() -> dict[str, Any]:
    return node("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2)


def tome() -> dict[str, Any]:
    return node("nodes_tomesd", "TomePatchModel", 0.3)


def hypertile() -> dict[str, Any]:
    return node("nodes_hypertile", "HyperTile", 64, 2, 1, False)


def shrink() -> dict[str, Any]:
    bicubic = ("bicubic", "bicubic")
    return node("nodes_model_downscale", "PatchModelAddDownscale", 3, 2.0, 0.0, 1.0, True, *bicubic)


def both() -> dict[str, Any]:
    """Two nodes: tokens are merged, and one attention of them is replaced."""
    return {**tome(), "patches_replace": own_softmax()["patches_replace"]}


def own_softmax() -> dict[str, Any]:
    """As self-attention guidance replaces an attention: with one that needs every token."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(1, 2) / 8, -1) @ v

    return {"patches_replace": {"attn1": {("middle", 0): attention, ("input", 1, 0): attention}}}


def values_only() -> dict[str, Any]:
    """As perturbed attention does."""

    def values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return v

    return {"patches_replace": {"attn1": {("middle", 0): values}}}


def masked_cross() -> dict[str, Any]:
    """As regional prompts do: a mask over all tokens, made from the shapes in the options."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        _, _, rows, columns = options["original_shape"]
        _, _, height, width = options["activations_shape"]
        assert q.shape[1] == height * width and height == -(-rows // (-(-columns // width)))
        mask = torch.linspace(0, 1, height * width)[:, None]
        scores = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
        return scores @ v * mask

    def query(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
        return n - n.mean(1, keepdim=True), context, value

    def output(n: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return n.cumsum(1) / n.shape[1]

    replaced = {"attn2": {("input", 1): attention, ("output", 3, 0): attention}}
    patches = {"attn2_patch": [query], "attn2_output_patch": [output], "middle_patch": [output]}
    return {"patches_replace": replaced, "patches": patches}


def maps() -> dict[str, Any]:
    """Patches that write into what they get, and leave notes for one another."""

    def before_skip(h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        options["note"] = h.mean()
        return h.flip(2)

    def after_skip(h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        h *= torch.linspace(0.5, 1, h.shape[2])[:, None]
        return h

    def output(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        assert options["patches"]["output_block_patch"] == [output]
        return h.roll(1, 2), torch.nn.functional.avg_pool2d(skip, 3, 1, 1) + options["note"]

    def normed(n: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return n - n.mean(1, keepdim=True) + options["note"]

    patches = {"input_block_patch": [before_skip], "input_block_patch_after_skip": [after_skip]}
    return {"patches": {**patches, "output_block_patch": [output], "attn1_output_patch": [normed]}}


def replaced_layer() -> dict[str, Any]:
    return {"patches": {"forward_timestep_embed_patch": [(torch.nn.Conv2d, override)]}}


def attends_everywhere() -> dict[str, Any]:
    """An override that needs every query of self- and of cross-attention."""

    def user(func: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert (
            q.shape[1]
            == kwargs["transformer_options"]["activations_shape"][2]
            * kwargs["transformer_options"]["activations_shape"][3]
        )
        out: torch.Tensor = func(q, *args, **kwargs)
        return out * torch.linspace(0.5, 1.5, out.shape[1])[:, None]

    return {"optimized_attention_override": user}


class Centred(torch.nn.Module):
    """A layer of a user's that looks across rows in a way that no rule knows, while it is told to."""

    on = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(2, keepdim=True) if self.on else x


def centred() -> torch.nn.Module:
    model: Any = small()
    model.input_blocks[1].insert(0, Centred())
    return model


def turned(on: bool) -> Inputs:
    def turn(emb: torch.Tensor, channels: int, options: dict[str, Any]) -> torch.Tensor:
        Centred.on = on
        return emb

    args, kwargs = low()
    return args, {**kwargs, "transformer_options": {"patches": {"emb_patch": [turn]}}}


def local(model: Callable[[], torch.nn.Module], kind: str) -> torch.nn.Module:
    """The model with layers of a kind out of the rules' reach."""
    made = model()
    for module in made.modules():
        if kind in type(module).__name__:
            module.forward = _unseen(module.forward)
    return made


def _unseen(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    return call


def without_attention(plan: Any) -> Any:
    assert isinstance(plan, RowPlan)
    return replace(plan, attention=())


sd15, sdxl, small = partial(unet, SD15), partial(unet, SDXL), partial(unet, SMALL)
labelled = partial(picture, label=20)
low = partial(picture, 16, 12)
# a hundred layers and norms, each of which rounds: ten times what a few blocks of tokens do
case = partial(Case, family="UNetModel", modes=TRUNK, tolerance=1e-5)
sd15_case, small_case = partial(case, model=sd15), partial(case, model=small)
# the self-test has to find what is wrong
control = partial(case, make=low, loud=True, wrong=True, meshes=("u2",))
refused = partial(case, raises="UnsupportedError")
DIVIDED = ("u2", "u3", "u8", "r2", "r3", "u2r2", "u4r2")
"""Meshes that share a small picture: its strips are no multiple of 5 ranks, so each of those runs it whole."""
SWITCHES = ("trunk", "turns", "synced", "wrapped", "kernel")


def patched(name: str, options: Callable[[], dict[str, Any]], **more: Any) -> Case:
    return small_case(**{"name": name, "make": partial(optioned, low, options), **more})


def patched_sd15(name: str, options: Callable[[], dict[str, Any]]) -> Case:
    return sd15_case(name=name, make=partial(optioned, picture, options))


DEFAULT = (
    small_case(name="unet", make=low, modes=SWITCHES),
    sd15_case(name="unet_sd15", make=partial(picture, 29, 19)),
    case(name="unet_sdxl", model=sdxl, make=labelled),
    sd15_case(name="unet_control", make=partial(controlled, 29, 19)),
    patched("unet_tome", tome),
    patched("unet_regions", masked_cross),
    patched("unet_maps", maps),
    patched("unet_override", attends_everywhere, ring_raises="UnsupportedError", base=low),
    patched("unet_shrink", shrink, raises="UnsupportedError", base=low),
    refused(name="unet_foreign_layer", model=centred, make=partial(turned, True), base=partial(turned, False)),
    control(name="no_unet_attention", model=small, change=without_attention),
    control(name="no_unet_norm", model=partial(local, small, "GroupNorm")),
    control(name="no_unet_halo", model=partial(local, small, "Conv2d")),
)
LARGE = (
    sd15_case(name="unet_sd15_one", make=partial(picture, batch=1)),
    sd15_case(name="unet_sd15_even", make=picture, modes=SWITCHES),
    sd15_case(name="unet_sd15_rest", make=partial(picture, 36, 9)),
    sd15_case(name="unet_sd15_tall", make=partial(picture, 67, 7)),
    sd15_case(name="unet_sd15_low", make=partial(picture, 5, 24)),
    sd15_case(name="unet_control_even", make=controlled),
    case(name="unet_inpaint", model=partial(sd15, channels=9), make=partial(picture, channels=9)),
    case(
        name="unet_sd2",
        model=partial(sd15, num_heads=-1, num_head_channels=16, use_linear_in_transformer=True),
        make=picture,
    ),
    case(name="unet_sdxl_odd", model=sdxl, make=partial(labelled, 29, 19), modes=SWITCHES),
    case(name="unet_sdxl_half", model=sdxl, make=labelled, half=True, rounded=2),
    case(
        name="unet_refiner",
        model=partial(
            sdxl,
            num_res_blocks=[2] * 4,
            channel_mult=(1, 2, 4, 4),
            transformer_depth=[0, 0, 1, 1, 1, 1, 0, 0],
            transformer_depth_middle=1,
            transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        ),
        make=labelled,
    ),
    case(name="unet_video", model=partial(sdxl, **VIDEO), make=video),
    case(name="unet_no_text", model=partial(small, channel_mult=(1, 1), context_dim=30), make=textless),
    case(
        name="unet_text_in_attention",
        model=partial(small, disable_self_attentions=[True, False], num_attention_blocks=[1, 1]),
        make=low,
    ),
    patched_sd15("unet_free_u", free_u),
    patched_sd15("unet_hypertile", hypertile),
    sd15_case(name="unet_tome_odd", make=partial(optioned, partial(picture, 29, 19), tome)),
    patched_sd15("unet_sag", own_softmax),
    patched_sd15("unet_pag", values_only),
    patched_sd15("unet_tome_sag", both),
    patched("unet_replaced_layer", replaced_layer, raises="UnsupportedError", base=low),
    refused(
        name="unet_video_tome",
        model=partial(sdxl, **VIDEO),
        make=partial(optioned, video, tome),
        base=video,
        meshes=DIVIDED,
    ),
    refused(
        name="unet_control_unknown",
        model=sd15,
        make=partial(picture, control={"middle": [random(2, 128, 7, 3)]}),
        base=picture,
        meshes=DIVIDED,
    ),
)
CASES = (*DEFAULT, *(replace(each, every=False) for each in LARGE))
