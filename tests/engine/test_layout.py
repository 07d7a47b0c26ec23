"""Layout is arithmetic: every token belongs to exactly one rank, and what is cut can be joined."""

from __future__ import annotations

import itertools

import pytest
import torch
from comfy_raylight.raylight.cuts import PerFrame, Ranges, Rope, Split
from comfy_raylight.raylight.errors import UnsupportedError
from comfy_raylight.raylight.layout import Layout, Segment, share

LENGTHS = ((45,), (47,), (7, 15), (1, 22), (0, 9), (3, 40, 8), (2, 2))
OVER = tuple(itertools.product(LENGTHS, (1, 2, 3, 8)))


def layouts(lengths: tuple[int, ...], size: int) -> tuple[list[Layout], tuple[str, ...]]:
    segments = tuple(Segment(f"s{i}", length) for i, length in enumerate(lengths))
    ranks = [Layout(segments=segments, rank=rank, size=size) for rank in range(size)]
    return ranks, tuple(segment.name for segment in segments)


@pytest.mark.parametrize("total, size", [(5, 8), (45, 8), (47, 3), (0, 2), (8, 8)])
def test_share_deals_everything_once(total: int, size: int) -> None:
    spans = [share(total, rank=rank, size=size) for rank in range(size)]
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(total))
    counts = [stop - start for start, stop in spans]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("lengths, size", OVER)
def test_spans_cover_each_segment(lengths: tuple[int, ...], size: int) -> None:
    ranks, over = layouts(lengths, size)
    for name, length in zip(over, lengths, strict=True):
        spans = [layout.span(name) for layout in ranks]
        assert spans == [ranks[0].span(name, rank=rank) for rank in range(size)]
        if length < size:
            assert ranks[0].replicated(name) and set(spans) == {(0, length)}
        else:
            assert [i for start, stop in spans for i in range(start, stop)] == list(range(length))
            assert all(start < stop for start, stop in spans)


@pytest.mark.parametrize("lengths, size", OVER)
def test_join_undoes_split(lengths: tuple[int, ...], size: int) -> None:
    ranks, over = layouts(lengths, size)
    whole = torch.randn(2, sum(lengths), 3)
    chunks = [layout.split(whole, dim=1, over=over) for layout in ranks]
    assert [chunk.shape[1] for chunk in chunks] == [layout.local(over) for layout in ranks]
    assert torch.equal(ranks[-1].join(chunks, dim=1, over=over), whole)
    for layout, chunk in zip(ranks, chunks, strict=True):
        assert torch.equal(whole[:, layout.positions(over, device=whole.device)], chunk)


def test_join_takes_replicated_tokens_from_rank_0() -> None:
    ranks, over = layouts((1, 9), 2)
    whole = torch.randn(1, 10, 3)
    chunks = [layout.split(whole, dim=1, over=over) for layout in ranks]
    chunks[1][:, 0] = 7
    assert torch.equal(ranks[1].join(chunks, dim=1, over=over), whole)


@pytest.mark.parametrize("size", (1, 2))
def test_split_owns_its_memory(size: int) -> None:
    (layout, *_), over = layouts((6,), size)
    whole = torch.zeros(1, 6, 2)
    part = layout.split(whole, dim=1, over=over)
    part += 1
    assert part.is_contiguous() and not whole.any()
    assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("lengths, size", OVER)
def test_boundary_counts_local_tokens(lengths: tuple[int, ...], size: int) -> None:
    ranks, over = layouts(lengths, size)
    for layout in ranks:
        positions = layout.positions(over, device=torch.device("cpu"))
        for at in range(sum(lengths) + 3):
            assert layout.boundary(at, over=over) == int((positions < at).sum())


@pytest.mark.parametrize("size", (2, 3))
def test_ranges_select_the_same_tokens(size: int) -> None:
    ranks, over = layouts((7, 15), size)
    whole = torch.arange(22)
    wanted = [(0, 5, 0), (5, 9, 1), (9, None, 2)]
    for layout in ranks:
        local = layout.split(whole, dim=0, over=over)
        marks = torch.full_like(local, -1)
        for start, stop, mark in Ranges(*over)(wanted, layout):
            assert start < stop
            marks[start:stop] = mark
        assert torch.equal(marks, (local >= 5).long() + (local >= 9).long())
    assert Ranges(*over)([], ranks[0]) == []


def test_rope_finds_its_dim() -> None:
    ranks, over = layouts((7, 15), 2)
    rope = Rope(*over)
    for shape in ((1, 22, 1, 4), (1, 1, 22, 4), (2, 3, 22, 4)):
        table = torch.randn(*shape)
        dim = shape.index(22)
        assert torch.equal(rope(table, ranks[1]), ranks[1].split(table, dim=dim, over=over))
    with pytest.raises(UnsupportedError, match="23"):
        rope(torch.randn(1, 23, 1, 4), ranks[0])
    with pytest.raises(UnsupportedError):
        rope(torch.randn(1, 22, 22, 4), ranks[0])


def repeat(e: torch.Tensor, length: int) -> torch.Tensor:
    """Wan's rule, written as ComfyUI has it."""
    repeats = length // e.size(1)
    if repeats * e.size(1) == length:
        return torch.repeat_interleave(e, repeats, dim=1)
    return torch.repeat_interleave(e, repeats + 1, dim=1)[:, :length]


@pytest.mark.parametrize("frames, length", [(3, 45), (3, 46), (3, 47), (45, 45), (5, 6)])
def test_per_frame_follows_the_model(frames: int, length: int) -> None:
    ranks, over = layouts((length,), 3)
    e = torch.randn(2, frames, 6, 4)
    entry = PerFrame(1, over, ndim=4)
    for layout in ranks:
        assert torch.equal(entry(e, layout), layout.split(repeat(e, length), dim=1, over=over))


def test_per_frame_leaves_the_rest() -> None:
    (layout, *_), over = layouts((45,), 3)
    one, other = torch.randn(2, 1, 6, 4), torch.randn(2, 6, 4)
    entry = PerFrame(1, over, ndim=4)
    assert entry(one, layout) is one and entry(other, layout) is other


def test_split_entry_names_its_segments() -> None:
    assert Split(1) == Split(1, "x") and Split(1).over == ("x",)
    assert Split(1, "txt", "img").over == ("txt", "img") and Split(1, "txt") != Split(1, "img")
