"""Chunked feed-forward layers: the same output, a smaller inner activation, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_raylight.patches.ffn import ChunkedFeedForward
from torch import nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 6))
        self.audio_ff = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.block = nn.ModuleDict({"ff": nn.Sequential(nn.Conv1d(5, 5, 3, padding=1))})
        self.proj = nn.Linear(8, 8)


def widest(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The output of `ff`, and the most tokens that its first layer ever saw at once."""
    seen: list[int] = []

    def note(module: nn.Module, args: Any) -> None:
        seen.append(args[0].shape[1])

    handle = model.ff[0].register_forward_pre_hook(note)
    out = model.ff(x)
    handle.remove()
    return out, max(seen)


@pytest.mark.parametrize("tokens, chunks, most", [(17, 4, 5), (16, 4, 4), (5, 8, 5), (9, 9, 1), (7, 1, 7)])
def test_same_output_in_smaller_pieces(tokens: int, chunks: int, most: int) -> None:
    model, x = Model().double(), torch.randn(2, tokens, 8, dtype=torch.float64)
    want, whole = widest(model, x)
    chunked = ChunkedFeedForward(model, chunks)
    got, width = widest(model, x)
    assert (whole, width) == (tokens, most)
    assert torch.allclose(got, want, atol=1e-12, rtol=0)
    assert len(chunked) == 2


def test_what_mixes_tokens_is_left_alone() -> None:
    model, x = Model(), torch.randn(1, 5, 9)
    want = model.block["ff"](x)
    ChunkedFeedForward(model, 3)
    assert torch.equal(model.block["ff"](x), want)


def test_other_inputs_pass() -> None:
    model, x = Model(), torch.randn(4, 8)
    want = model.ff(x)
    ChunkedFeedForward(model, 2)
    assert torch.equal(model.ff(x), want)


def test_a_layer_that_failed_starts_clean() -> None:
    model, x = Model(), torch.randn(1, 6, 8)
    ChunkedFeedForward(model, 3)
    with pytest.raises(RuntimeError):
        model.ff(torch.randn(1, 6, 7))
    assert model.ff(x).shape == (1, 6, 6)


def test_remove_leaves_nothing() -> None:
    model = Model()
    chunked = ChunkedFeedForward(model, 4)
    chunked.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
