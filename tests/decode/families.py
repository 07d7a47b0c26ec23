"""ComfyUI's own VAE classes in their smallest configurations, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

WIDTH = 4
TILED = ("kl", "wan 2.1", "ltxv noise", "wan 2.1 image, qwen image")
"""Families whose tiles are compared by default; on demand those of all."""
LOCAL = ("pixel space",)
"""Families whose rows know nothing of one another: exchanging nothing is right."""
NOISY = ("ltxv noise", "ltxv in chunks")
"""Families that draw random numbers while they decode."""
TALL = (1, 16, 2, 30, 8)
"""A latent of Wan's whose decode is weighed."""

KL: Mapping[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
HUNYUAN: Mapping[str, Any] = {
    "block_out_channels": [32, 64, 64],
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": 1,
    "z_channels": 16,
    "ffactor_spatial": 4,
    "ffactor_temporal": 2,
}
WAN: Mapping[str, Any] = {
    "dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
COSMOS: Mapping[str, Any] = {
    "z_channels": 16,
    "latent_channels": 16,
    "z_factor": 1,
    "resolution": 64,
    "in_channels": 3,
    "out_channels": 3,
    "channels": 16,
    "channels_mult": [2, 4, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
    "patch_size": 4,
    "num_groups": 1,
    "temporal_compression": 8,
    "spacial_compression": 8,
}
MOCHI: Mapping[str, Any] = {
    "out_channels": 3,
    "base_channels": 32,
    "channel_multipliers": [1, 2],
    "temporal_expansions": [3],
    "spatial_expansions": [2],
    "num_res_blocks": [1, 1, 1],
    "latent_dim": 12,
    "has_attention": [False] * 3,
    "padding_mode": "replicate",
    "output_norm": False,
    "nonlinearity": "silu",
    "output_nonlinearity": "silu",
    "causal": True,
}


def made_of(name: str, **arguments: Any) -> torch.nn.Module:
    """An instance of a class of `comfy`, by its dotted name."""
    module, _, attribute = name.rpartition(".")
    instance: torch.nn.Module = getattr(importlib.import_module(f"comfy.{module}"), attribute)(**arguments)
    return instance


def engine(encoder: str, decoder: str, config: Mapping[str, Any], **decoding: Any) -> torch.nn.Module:
    """An AutoencodingEngine of two parts, as comfy.sd builds it."""

    def part(target: str, params: Mapping[str, Any]) -> dict[str, Any]:
        return {"target": f"comfy.ldm.{target}", "params": dict(params)}

    return made_of(
        "ldm.models.autoencoder.AutoencodingEngine",
        regularizer_config=part("models.autoencoder.EmptyRegularizer", {}),
        encoder_config=part(encoder, config),
        decoder_config=part(decoder, {**config, **decoding}),
    )


def kl(**more: Any) -> torch.nn.Module:
    return made_of("ldm.models.autoencoder.AutoencoderKL", ddconfig={**KL, **more}, embed_dim=4)


def wan(module: str = "vae", **more: Any) -> torch.nn.Module:
    return made_of(f"ldm.wan.{module}.WanVAE", **{**WAN, **more})


def hunyuan(module: str = "vae_refiner", **decoding: Any) -> torch.nn.Module:
    return engine(f"hunyuan_video.{module}.Encoder", f"hunyuan_video.{module}.Decoder", HUNYUAN, **decoding)


def svd() -> torch.nn.Module:
    parts = ("modules.diffusionmodules.model.Encoder", "modules.temporal_ae.VideoDecoder")
    return engine(*parts, KL, video_kernel_size=[3, 1, 1], alpha=0.0)


def ltxv(padding: str = "zeros", *, noise: bool = False, newer: bool = False) -> torch.nn.Module:
    """LTXV; `newer` has the blocks of LTX-2's, which go up in space and in time one by one too."""
    up: list[Any] = [
        ["res_x", {"num_layers": 1, "inject_noise": noise}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x_y", 1],
        ["compress_space", {}],
        ["res_x", 1],
    ]
    down: list[Any] = [["res_x", 1]]
    if newer:
        up = [["res_x", {"num_layers": 1}], ["compress_all", {"residual": True, "multiplier": 2}], ["res_x", 1]]
        up += [["compress_time", {}], ["compress_space", {}], ["res_x", 1]]
        down = [["res_x", 1], ["compress_space_res", {"multiplier": 2}], ["compress_time_res", {"multiplier": 2}]]
        down += [["compress_all_res", {"multiplier": 2}], ["res_x", 1]]
    config = {
        "dims": 3,
        "latent_channels": 128,
        "encoder_blocks": down,
        "decoder_blocks": up,
        "decoder_base_channels": 16,
        "encoder_base_channels": 16,
        "patch_size": 2,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "spatial_padding_mode": padding,
        "timestep_conditioning": noise,
    }
    return made_of("ldm.lightricks.vae.causal_video_autoencoder.VideoVAE", config=config)


def cosmos() -> torch.nn.Module:
    return made_of("ldm.cosmos.vae.CausalContinuousVideoTokenizer", **COSMOS)


def mochi() -> torch.nn.Module:
    decoder: Any = made_of("ldm.genmo.vae.model.Decoder", **MOCHI)
    decoder.decode = decoder.forward
    return decoder


def cogvideox() -> torch.nn.Module:
    channels = (32, 32, 64, 64)
    return made_of("ldm.cogvideo.vae.AutoencoderKLCogVideoX", block_out_channels=channels, layers_per_block=1)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One VAE and a latent for it.

    Attributes:
        build: makes the module, weights unset.
        channels: of its latents.
        frames: of its latents, 0 for pictures.
        scale: rows of pixels per row of latent.
        every: whether it runs by default; the others on demand, since they repeat what others show.
        encodes: whether its encoder is tried too; `pixels` channels and `length` frames.
        chunk: bytes per row that its time chunks are given, where the class cuts time by size.
        newer: whether only newer ComfyUI has it.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    channels: int
    scale: int
    frames: int = 0
    batch: int = 1
    every: bool = True
    encodes: bool = False
    pixels: int = 3
    length: int = 0
    chunk: int = 0
    newer: bool = False

    def latent(self, rows: int, *, seed: int = 3, batch: int | None = None, frames: int | None = None) -> torch.Tensor:
        shape = self._frames(self.frames if frames is None else frames)
        return random(batch or self.batch, self.channels, *shape, rows, WIDTH, seed=seed)

    def picture(self, rows: int) -> torch.Tensor:
        return random(self.batch, self.pixels, *self._frames(self.length), rows * self.scale, 4 * self.scale, seed=5)

    @staticmethod
    def _frames(count: int) -> tuple[int, ...]:
        return (count,) if count else ()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FAMILIES = (
    Family(name="kl", build=kl, channels=4, scale=4, encodes=True),
    Family(name="kl batch", build=kl, channels=4, scale=4, batch=2, every=False),
    Family(name="flux2", build=lambda: kl(batch_norm_latent=True), channels=16, scale=8, encodes=True),
    Family(
        name="hunyuan video",
        build=lambda: kl(conv3d=True, time_compress=2),
        channels=4,
        scale=4,
        frames=5,
        encodes=True,
        length=5,
    ),
    Family(name="hunyuan 1.5", build=lambda: hunyuan(refiner_vae=False), channels=16, scale=4, frames=3),
    Family(name="hunyuan refiner", build=hunyuan, channels=16, scale=4, frames=3, encodes=True, length=5),
    Family(name="hunyuan image", build=lambda: hunyuan("vae"), channels=16, scale=4, encodes=True),
    Family(name="wan 2.1", build=wan, channels=16, scale=8, frames=3, encodes=True, length=9),
    Family(name="wan 2.1 batch", build=wan, channels=16, scale=8, frames=3, batch=2, every=False),
    Family(name="wan 2.1 two frames", build=wan, channels=16, scale=8, frames=2, every=False),
    Family(name="wan 2.1 image, qwen image", build=wan, channels=16, scale=8, frames=1, encodes=True, length=1),
    Family(
        name="qwen image layered",
        build=lambda: wan(image_channels=4, conv_out_channels=4),
        channels=16,
        scale=8,
        frames=1,
        every=False,
        newer=True,
    ),
    Family(
        name="wan 2.2",
        build=lambda: wan("vae2_2", dec_dim=16),
        channels=16,
        scale=16,
        frames=2,
        encodes=True,
        length=5,
    ),
    Family(name="ltxv zeros", build=ltxv, channels=128, scale=8, frames=3),
    Family(name="ltxv reflect", build=lambda: ltxv("reflect"), channels=128, scale=8, frames=3),
    Family(name="ltxv noise", build=lambda: ltxv(noise=True), channels=128, scale=8, frames=3),
    Family(
        name="ltxv in chunks", build=lambda: ltxv(noise=True), channels=128, scale=8, frames=5, chunk=9000, newer=True
    ),
    Family(
        name="ltx 2",
        build=lambda: ltxv(newer=True),
        channels=128,
        scale=8,
        frames=3,
        encodes=True,
        length=9,
    ),
    Family(name="svd", build=svd, channels=4, scale=4, batch=3),
    Family(name="cosmos", build=cosmos, channels=16, scale=8, frames=3, encodes=True, length=9),
    Family(name="mochi", build=mochi, channels=12, scale=2, frames=2),
    Family(name="cogvideox", build=cogvideox, newer=True, channels=16, scale=8, frames=2, encodes=True, length=9),
    Family(name="cogvideox image", build=cogvideox, channels=16, scale=8, frames=1, every=False, newer=True),
    Family(
        name="taesd",
        build=lambda: made_of("taesd.taesd.TAESD", latent_channels=4),
        channels=4,
        scale=8,
        encodes=True,
    ),
    Family(
        name="taehv",
        build=lambda: made_of("taesd.taehv.TAEHV", latent_channels=16),
        channels=16,
        scale=8,
        frames=3,
        encodes=True,
        length=9,
    ),
    Family(
        name="stage a",
        build=lambda: made_of("ldm.cascade.stage_a.StageA", levels=2, bottleneck_blocks=2, c_hidden=32),
        channels=4,
        scale=4,
        encodes=True,
    ),
    Family(
        name="stage c",
        build=lambda: made_of("ldm.cascade.stage_c_coder.StageC_coder"),
        channels=16,
        scale=8,
        every=False,
    ),
    Family(
        name="pixel space",
        build=lambda: made_of("pixel_space_convert.PixelspaceConversionVAE"),
        channels=3,
        scale=1,
        every=False,
    ),
)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight a sane random value: ComfyUI leaves them unset."""
    generator = torch.Generator().manual_seed(1)
    for key, weight in [*model.named_parameters(), *model.named_buffers()]:
        if not weight.is_floating_point() or "wavelets" in key:
            continue
        fan = weight[0].numel() if weight.ndim > 1 else 0
        scale, mean = (fan**-0.5, 0) if fan > 4 else (0.3, 0 if "bias" in key else 1)
        value = torch.randn(weight.shape, generator=generator) * scale + mean
        weight.data = value.abs() + 0.1 if "var" in key or "std" in key else value
    return model.eval()
