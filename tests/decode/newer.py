"""VAEs of ComfyUI 0.33, in sizes that a test can hold: ComfyUI makes them in one size only."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .families import fill, made_of

LTX_25: Mapping[str, Any] = {
    "_class_name": "CausalDiffusionVAE",
    "encoder": {
        "base_channels": 16,
        "blocks": [
            ["compress_space_res", {"multiplier": 2}],
            ["compress_time_res", {"multiplier": 2}],
            ["compress_all_res", {"multiplier": 2}],
            ["compress_all_res", {"multiplier": 1}],
            ["res_x", {"num_layers": 1}],
        ],
    },
    "decoder": {
        "head_dim": 16,
        "stage_channels": [128, 64, 32, 32, 16],
        "stage_depths": [1] * 5,
        "stage_kernels": [[3, 3, 3]] * 5,
        "stage5_kernel": [3, 3, 3],
    },
}


@dataclass(frozen=True, kw_only=True)
class Newer:
    """One VAE.

    Attributes:
        module: of `comfy`, where its class is.
        build: makes it.
        latent: shape of one.
        pixels: shape of pictures for it, () for sound.
        auto: what `auto` gives: the "whole" of VAE Decode, or the "tiles" of VAE Decode (Tiled).
        way: how that comes about, where it is not by the same name.
        refused: what an error says of strips, of decoding and of encoding; "" for none.
        metadata: of its file.
        renamed: beginnings of keys there, by what they are in the class.
        small: the class that ComfyUI builds in one size; "" where the file says the size.
    """

    module: str
    build: Callable[[], torch.nn.Module]
    latent: tuple[int, ...]
    pixels: tuple[int, ...] = ()
    auto: str
    way: str = ""
    refused: tuple[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    small: str = ""

    @property
    def exists(self) -> bool:
        """Whether this ComfyUI has it."""
        try:
            return importlib.util.find_spec(f"comfy.{self.module}") is not None
        except ModuleNotFoundError:  # not even the folder that it is in
            return False

    def state(self) -> dict[str, torch.Tensor]:
        """Its weights by the keys of a file."""
        found = {}
        for key, value in fill(self.build()).state_dict().items():
            start = next((old for old in self.renamed if key.startswith(old)), "")
            name = self.renamed[start] + key.removeprefix(start) if start else key
            found[name] = value.clone().contiguous()
        return found


def ltx() -> torch.nn.Module:
    return made_of("ldm.lightricks.vae.na_diffusion_decoder.CausalDiffusionVAE", config=dict(LTX_25))


def mage() -> torch.nn.Module:
    name = "ldm.mage_flow.vae"
    model: Any = torch.nn.Module()
    encoder = {"hidden_size": 32, "num_blocks": 1, "head_size": 32, "num_head_blocks": 1}
    decoder = {"hidden_size": 32, "hidden_size_x": 8, "num_blocks": 2, "num_cond_blocks": 1}
    model.dconv_encoder = made_of(f"{name}.DConvEncoder", **encoder)
    model.decoder_model = made_of(f"{name}.DConvDenoiser", **decoder)
    model.__class__ = CLASSES["MageVAE"]
    return model


def h3(**_: Any) -> torch.nn.Module:
    parts = {"ch": 32, "ch_mult": (1,) * 6, "num_res_blocks": 1}
    model: Any = CLASSES["MiniMaxH3VideoVAE"](**parts)
    model.decoder = made_of("ldm.minimax.vae.ViT3DDecoder", num_layers=1, heads=2, dim_head=32)
    return model


def h3_sound() -> torch.nn.Module:
    model: torch.nn.Module = CLASSES["MiniMaxH3AudioVAE"](encoder_dim=4, latent_dim=128, decoder_dim=128)
    return model


def seedvr() -> torch.nn.Module:
    module = importlib.import_module("comfy.ldm.seedvr.vae")
    module.BYTEDANCE_BLOCK_OUT_CHANNELS = (32,) * 4  # type: ignore[attr-defined]
    model: torch.nn.Module = CLASSES["VideoAutoencoderKLWrapper"]()
    return model


CLASSES: dict[str, Any] = {}
"""ComfyUI's own, by name, before they were made small."""

NEWER: Mapping[str, Newer] = {
    "ltx 2.5": Newer(
        module="ldm.lightricks.vae.na_diffusion_decoder",
        build=ltx,
        latent=(1, 128, 2, 5, 4),
        pixels=(9, 128, 64, 3),
        auto="tiles",
        refused=("self-test is off by", ""),
        metadata={"config": json.dumps({"vae": dict(LTX_25)})},
    ),
    "mage": Newer(
        module="ldm.mage_flow.vae",
        build=mage,
        latent=(1, 128, 7, 6),
        pixels=(1, 64, 48, 3),
        auto="tiles",
        refused=("cannot be divided over so many workers", "adaptive_avg_pool2d"),
        renamed={"dconv_encoder.": "student.dconv_encoder.", "decoder_model.": "pipeline."},
        small="MageVAE",
    ),
    "h3": Newer(
        module="ldm.minimax.vae",
        build=h3,
        # eight tiles: two stretches in time, of two rows of two
        latent=(1, 24, 7, 18, 20),
        # four: two stretches in time, of two rows
        pixels=(22, 288, 64, 3),
        auto="whole",
        way="own tiles",
        refused=("", ""),
        small="MiniMaxH3VideoVAE",
    ),
    "h3 sound": Newer(
        module="ldm.minimax.audio_vae",
        build=h3_sound,
        latent=(1, 32, 2, 6),
        auto="whole",
        refused=("", ""),
        small="MiniMaxH3AudioVAE",
    ),
    "seedvr2": Newer(
        module="ldm.seedvr.vae",
        build=seedvr,
        latent=(1, 16, 2, 6, 4),
        pixels=(5, 48, 32, 3),
        auto="whole",
        refused=("", "tiles of its own"),
        small="VideoAutoencoderKLWrapper",
    ),
}


def make_small() -> None:
    """Have this process's ComfyUI build them in these sizes."""
    for one in NEWER.values():
        if one.exists and one.small:
            module = importlib.import_module(f"comfy.{one.module}")
            CLASSES[one.small] = getattr(module, one.small)
            setattr(module, one.small, one.build)
