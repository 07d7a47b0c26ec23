"""Feed-forward layers computed a stretch of tokens at a time, so that their wide inner activation is never whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

NAMES = ("ff", "audio_ff", "ffn", "feed_forward")
"""What ComfyUI's models call their feed-forward layers."""
MIXES_TOKENS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def feed_forwards(model: nn.Module) -> Iterator[nn.Module]:
    """The feed-forward layers that treat every token by itself: no convolution in them (ACE-Step's has one)."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in NAMES and not any(isinstance(part, MIXES_TOKENS) for part in module.modules()):
            yield module


class ChunkedFeedForward:
    """Hooks that have a model's feed-forward layers run in `chunks` stretches of tokens; `remove` takes them off.

    The inner activation shrinks to 1/chunks. A layer is called once as usual, on the first stretch, and its
    forward once more for each further one; what it gives back is the whole. Inputs that are not [B, L, C] or
    have fewer tokens than chunks pass as they are.
    """

    def __init__(self, model: nn.Module, chunks: int) -> None:
        self._handles: list[RemovableHandle] = []
        for module in feed_forwards(model):
            layer = _Layer(chunks)
            self._handles.append(module.register_forward_pre_hook(layer.before))
            self._handles.append(module.register_forward_hook(layer.after))

    def __len__(self) -> int:
        """How many layers it found."""
        return len(self._handles) // 2

    def remove(self) -> None:
        """Leave the model exactly as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Layer:
    """One layer's hooks, and the whole input between them."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._whole: torch.Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._whole = None
        if len(args) != 1 or not isinstance(args[0], torch.Tensor):
            return None
        x = args[0]
        if x.ndim != 3 or x.shape[1] < self._chunks:
            return None
        self._whole = x
        return (x[:, : self._size(x)],)

    def after(self, module: nn.Module, args: tuple[Any, ...], first: torch.Tensor) -> torch.Tensor | None:
        x, self._whole = self._whole, None
        if x is None:
            return None
        size = self._size(x)
        out = first.new_empty(x.shape[0], x.shape[1], *first.shape[2:])
        out[:, :size] = first
        del first
        for start in range(size, x.shape[1], size):
            # not the module itself, whose hooks these are
            out[:, start : start + size] = module.forward(x[:, start : start + size])
        return out

    def _size(self, x: torch.Tensor) -> int:
        return -(-x.shape[1] // self._chunks)
