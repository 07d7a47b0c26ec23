"""VAE nodes: latents to pictures and back on the workers."""

from __future__ import annotations

from typing import Any

import folder_paths

from ..loaders.parts import spec_of
from ..raylight.config import ModelSpec
from ..workers.driver import decode, remote
from ..workers.wire.vae_messages import MODES, Mode, TileSizes
from .files import changed, find
from .numbers import check

FOLDERS = ("vae",)
DTYPES = {"auto": "", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

ACTORS: dict[str, Any] = {"ray_actors": ("RAY_ACTORS", {"tooltip": "The pool, by any model on it."})}


def _vae_inputs() -> dict[str, Any]:
    return {
        "vae_name": (folder_paths.get_filename_list("vae"), {"tooltip": "File in models/vae."}),
        "vae_dtype": (
            list(DTYPES),
            {"default": "auto", "tooltip": "Type to compute in. auto: what ComfyUI chooses for that VAE."},
        ),
    }


RELEASE: dict[str, Any] = {
    "release_vae": (
        "BOOLEAN",
        {"default": True, "tooltip": "Off: the workers keep the VAE, and the next prompt does not load it again."},
    )
}
TILES: dict[str, Any] = {
    "tile_size": ("INT", {"default": 512, "min": 64, "max": 4096, "step": 32, "tooltip": "Tiles: side, in pixels."}),
    "overlap": (
        "INT",
        {"default": 64, "min": 0, "max": 4096, "step": 32, "tooltip": "Tiles: what they share, in pixels."},
    ),
    "temporal_size": (
        "INT",
        {"default": 64, "min": 8, "max": 4096, "step": 4, "tooltip": "Tiles of videos: frames at a time."},
    ),
    "temporal_overlap": (
        "INT",
        {"default": 8, "min": 4, "max": 4096, "step": 4, "tooltip": "Tiles of videos: frames they share."},
    ),
}


class _VAENode:
    """What the two have in common."""

    CATEGORY = "Raylight"

    @classmethod
    def IS_CHANGED(cls, vae_name: str, **_: Any) -> str:
        """A file that was replaced is loaded again."""
        return changed(FOLDERS, vae_name)


class RayVAEDecodeDistributed(_VAENode):
    """Decodes latents on all workers."""

    DESCRIPTION = (
        "Decodes pictures and videos on all workers of the pool. seamless: each decodes a strip of rows and they "
        "exchange what borders on it, so the result is that of one whole decode. tiles: ComfyUI's tiled decode, "
        "its tiles dealt out; the sizes are those of VAE Decode (Tiled). auto: seamless where a self-test of the "
        "VAE shows it to be right and the memory of each worker allows it, else tiles."
    )
    SEARCH_ALIASES = ("vae decode", "tiled decode", "multi gpu")
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The decoded pictures or frames.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **ACTORS,
                "samples": ("LATENT", {"tooltip": "The latent to decode."}),
                **_vae_inputs(),
                **TILES,
                **RELEASE,
            },
            "optional": {
                "mode": (
                    list(MODES),
                    {"default": "auto", "tooltip": "seamless: strips of rows. tiles: as VAE Decode (Tiled)."},
                )
            },
        }

    def decode(
        self,
        *,
        ray_actors: Any,
        samples: dict[str, Any],
        vae_name: str,
        vae_dtype: str,
        tile_size: int,
        overlap: int,
        temporal_size: int,
        temporal_overlap: int,
        release_vae: bool,
        mode: Mode = "auto",
    ) -> tuple[Any]:
        sizes = {"tile_size": tile_size, "overlap": overlap}
        check(TILES, {**sizes, "temporal_size": temporal_size, "temporal_overlap": temporal_overlap})
        tiles = TileSizes(size=tile_size, overlap=overlap, frames=temporal_size, frame_overlap=temporal_overlap)
        pool = remote.on_pool(ray_actors)
        spec = _spec(pool, vae_name, vae_dtype)
        return (decode.decode(pool, samples["samples"], spec, mode=mode, tiles=tiles, keep=not release_vae),)


class RayVAEEncodeDistributed(_VAENode):
    """Encodes pictures on all workers."""

    DESCRIPTION = (
        "Encodes pictures or frames on all workers of the pool, a strip of rows each: the same latent as VAE Encode."
    )
    SEARCH_ALIASES = ("vae encode", "multi gpu")
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The encoded latent.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        pixels = {"pixels": ("IMAGE", {"tooltip": "The pictures or frames to encode."})}
        return {"required": {**ACTORS, **pixels, **_vae_inputs(), **RELEASE}}

    def encode(
        self, *, ray_actors: Any, pixels: Any, vae_name: str, vae_dtype: str, release_vae: bool
    ) -> tuple[dict[str, Any]]:
        pool = remote.on_pool(ray_actors)
        latent = decode.encode(pool, pixels, _spec(pool, vae_name, vae_dtype), keep=not release_vae)
        return ({"samples": latent},)


def _spec(pool: remote.RemotePatcher, name: str, dtype: str) -> ModelSpec:
    path = find(FOLDERS, name)
    return spec_of(path, dtype=DTYPES[dtype], options=("vae",), reader=pool.rpc.config.reader)
