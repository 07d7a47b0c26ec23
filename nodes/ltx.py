"""Nodes that set how workers run a model: a clone that carries the setting, no worker is called."""

from __future__ import annotations

from typing import Any

from ..workers import remote


class RayLTXFFNChunker:
    """Has feed-forward layers run in stretches of tokens, which lowers the peak of activation memory."""

    CATEGORY = "Raylight/extra"
    DESCRIPTION = (
        "Computes the feed-forward layers of LTX, and of any model that calls them ff, audio_ff, ffn or "
        "feed_forward, in stretches of tokens. Same picture; the widest activation of a step shrinks to 1 / ffn_chunks."
    )
    FUNCTION = "chunk"
    RETURN_TYPES = ("RAY_ACTORS",)
    RETURN_NAMES = ("ray_actors",)
    OUTPUT_TOOLTIPS = ("The model with this setting; the input is not changed.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ray_actors": ("RAY_ACTORS", {"tooltip": "The model on the pool."}),
                "ffn_chunks": (
                    "INT",
                    {"default": 8, "min": 1, "max": 64, "tooltip": "Stretches per layer and worker; 1 is off."},
                ),
            }
        }

    def chunk(self, ray_actors: Any, ffn_chunks: int) -> tuple[Any]:
        return (remote.with_settings(ray_actors, ffn_chunks=ffn_chunks),)
