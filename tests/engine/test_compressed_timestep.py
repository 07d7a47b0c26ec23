"""LTX-2's modulation on a rank: its own tokens' values, from a view of its own frames."""

from __future__ import annotations

import pytest
import torch
from comfy_raylight.patches.ltx import local_timestep
from comfy_raylight.raylight.layout import Layout, Segment


class Compressed:
    """As ComfyUI's CompressedTimestep without compression, which is the path that the plan builds on."""

    __slots__ = ("batch_size", "data", "feature_dim", "num_frames", "patches_per_frame")

    def __init__(self, data: torch.Tensor, patches_per_frame: int) -> None:
        self.batch_size, self.num_frames, self.feature_dim = data.shape
        self.data, self.patches_per_frame = data, patches_per_frame

    def expand_for_computation(
        self, table: torch.Tensor, batch: int, indices: slice = slice(None)
    ) -> tuple[torch.Tensor, ...]:
        assert self.patches_per_frame == 1
        rows = self.data.reshape(batch, self.data.shape[1], table.shape[0], -1)[:, :, indices]
        return (table[indices] + rows).unbind(2)


def layout(tokens: int, *, rank: int, size: int) -> Layout:
    return Layout(segments=(Segment("v", tokens), Segment("a", 6, whole=True)), rank=rank, size=size)


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("frames, patches", ((7, 15), (3, 4), (60, 1), (1, 3)))
@pytest.mark.parametrize("size", (2, 5, 8))
def test_local_values(batch: int, frames: int, patches: int, size: int) -> None:
    table, data = torch.randn(3, 4), torch.randn(batch, frames, 12)
    whole = (table + data.view(batch, frames, 3, 4)).repeat_interleave(patches, 1)
    for rank in range(size):
        place = layout(frames * patches, rank=rank, size=size)
        start, stop = place.span("v")
        local = local_timestep(Compressed(data, patches), place)
        assert isinstance(local, Compressed)
        values = local.expand_for_computation(table, batch, slice(1, 3))
        assert torch.equal(torch.stack(values, 2), whole[:, start:stop, 1:3])


def test_nothing_is_copied() -> None:
    data = torch.randn(2, 900, 12)
    local = local_timestep(Compressed(data, 20), layout(18000, rank=3, size=8))
    assert local.data.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
    # 2250 tokens from 6750 on
    assert local.data.shape == (2, 113, 12)


def test_one_row_for_all_tokens_stays() -> None:
    value = Compressed(torch.randn(2, 1, 12), 1)
    assert local_timestep(value, layout(60, rank=1, size=2)) is value


def test_plain_tensor_per_token() -> None:
    data = torch.randn(2, 60, 12)
    assert torch.equal(local_timestep(data, layout(60, rank=1, size=2)), data[:, 30:])
