"""Nodes that set how workers run a model: a clone that carries the setting, no worker is called."""

from __future__ import annotations

from typing import Any, ClassVar

from ..raylight.config import COMPILERS
from ..workers.driver import remote


class _Setting:
    """A model goes in, and comes out with a setting of WorkerSettings changed: the node's one widget."""

    CATEGORY = "Raylight/extra"
    FUNCTION = "set"
    RETURN_TYPES = ("RAY_ACTORS",)
    RETURN_NAMES = ("ray_actors",)
    OUTPUT_TOOLTIPS = ("The model with this setting; the input is not changed.",)
    WIDGET: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ray_actors": ("RAY_ACTORS", {"tooltip": "The model on the pool."}), **cls.WIDGET}}


class RayLTXFFNChunker(_Setting):
    """Has feed-forward layers run in stretches of tokens, which lowers the peak of activation memory."""

    DESCRIPTION = (
        "Computes the feed-forward layers of LTX, and of any model that calls them ff, audio_ff, ffn or "
        "feed_forward, in stretches of tokens. Same picture; the widest activation of a step shrinks to 1 / ffn_chunks."
    )
    SEARCH_ALIASES = ("low vram", "feed forward", "ltx")
    WIDGET: ClassVar = {
        "ffn_chunks": (
            "INT",
            {"default": 8, "min": 1, "max": 64, "tooltip": "Stretches per layer and worker; 1 is off."},
        )
    }

    def set(self, ray_actors: Any, ffn_chunks: int) -> tuple[Any]:
        return (remote.with_settings(ray_actors, ffn_chunks=ffn_chunks),)


class RayTorchCompileModel(_Setting):
    """Has the workers run the blocks of a model under torch.compile, or repeat calls that they recorded."""

    DESCRIPTION = (
        "Takes Python out of a model's steps in the workers, also where they share a picture. cudagraphs records a "
        "whole step and repeats it, with the same bits; inductor compiles each block, which takes up to minutes at the "
        "first step of a new size and differs in the last bits."
    )
    SEARCH_ALIASES = ("torch.compile", "speed", "cuda graph")
    WIDGET: ClassVar = {
        "backend": (
            list(COMPILERS),
            {
                "tooltip": "inductor makes kernels of its own, block by block; cudagraphs records the kernels of a "
                "whole step and starts them at once (NVIDIA)."
            },
        )
    }

    def set(self, ray_actors: Any, backend: str) -> tuple[Any]:
        return (remote.with_settings(ray_actors, compile=backend),)
