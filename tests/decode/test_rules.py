"""The rules on one process, and what they refuse."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfy_raylight.raylight.errors import Cancelled, UnsupportedError
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.rows.row_rules import RowParallel
from comfy_raylight.raylight.rows.strips import Rows, Strips
from comfy_raylight.raylight.watch import LONG_S, SKIPPED, Watch
from comfy_raylight.vae import budget
from comfy_raylight.vae.divided import strip_of
from comfy_raylight.vae.frames import counting, last_convolution
from comfy_raylight.vae.tiles import deal


def rows(height: int = 4) -> Rows:
    return Rows(Mesh.single().axis("world"), Strips.of(height, ranks=1, rank=0))


X = torch.arange(96.0).reshape(1, 4, 4, 6)
UNFOLDED = F.unfold(X, 2)

REFUSED = {
    "even kernel": lambda: F.conv2d(X, torch.ones(4, 4, 4, 3), padding=1),
    "same": lambda: F.conv2d(X, torch.ones(4, 4, 3, 3), padding="same"),
    "bilinear": lambda: F.interpolate(X, scale_factor=2.0, mode="bilinear"),
    "to half a row": lambda: F.interpolate(X, size=(6, 6)),
    "overlapping windows": lambda: F.max_pool2d(X, 3, stride=1, padding=1),
    "norm over rows": lambda: F.layer_norm(X, (4, 6)),
    "statistics of the batch": lambda: F.batch_norm(X, None, None, training=True),
    "instance norm": lambda: F.instance_norm(X),
    "unfold": lambda: F.unfold(X, 2),
    "circular": lambda: F.pad(X, (1, 1, 1, 1), mode="circular"),
    "cut rows": lambda: F.pad(X, (0, 0, -1, 0)),
    "transposed": lambda: F.conv_transpose2d(X, torch.ones(4, 4, 3, 3), stride=2),
    "other draws": lambda: torch.empty(1, 4, 4, 6).normal_(),
    "direct group norm": lambda: torch.group_norm(X, 2),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refused_by_name(call: Callable[[], torch.Tensor]) -> None:
    call()
    with pytest.raises(UnsupportedError, match="divided over workers by rows.*tiles"), RowParallel(rows()):
        call()


ALLOWED = {
    "conv": lambda: F.conv2d(X, torch.ones(2, 4, 3, 3), padding=1),
    "strided": lambda: F.conv2d(X, torch.ones(2, 4, 3, 3), stride=2, padding=(1, 0)),
    "strided, even kernel": lambda: F.conv2d(X, torch.ones(2, 4, 4, 4), stride=2, padding=1),
    "patches": lambda: F.conv2d(X, torch.ones(2, 4, 2, 2), stride=2),
    "transposed": lambda: F.conv_transpose2d(X, torch.ones(4, 2, 4, 4), stride=2, padding=1),
    "reflect": lambda: F.pad(X, (1, 1, 1, 2), mode="reflect"),
    "below only": lambda: F.conv2d(F.pad(X, (0, 1, 0, 1)), torch.ones(2, 4, 3, 3), stride=2),
    "group norm": lambda: F.group_norm(X, 2, torch.arange(4.0), torch.ones(4)),
    "nearest": lambda: F.interpolate(X, scale_factor=2.0),
    "patch mean": lambda: F.avg_pool2d(X, 2),
}


@pytest.mark.parametrize("call", ALLOWED.values(), ids=ALLOWED)
def test_one_strip_is_the_whole(call: Callable[[], torch.Tensor]) -> None:
    expected = call()
    with RowParallel(rows()):
        found = call()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_joined_frames_leave_room_for_rows(layout: torch.memory_format) -> None:
    """From the second time on that a convolution over rows gets them, and only then; the result is the same."""
    kept, new = torch.rand(2, 1, 4, 2, 5, 6).unbind()
    weight = torch.rand(3, 4, 3, 3, 3)

    def joined() -> torch.Tensor:
        return torch.cat([kept.to(memory_format=layout), new.to(memory_format=layout)], 2)

    def step() -> tuple[bool, torch.Tensor]:
        x = joined()
        return x.storage_offset() > 0, F.conv3d(x, weight, padding=(0, 1, 1))

    _, expected = step()
    with RowParallel(rows(5)):
        assert joined().flatten(2).shape == (1, 4, 4 * 5 * 6)
        for roomy in (False, True, True):
            found, result = step()
            assert found == roomy and torch.allclose(result, expected, rtol=1e-5)
        once = joined()
        assert torch.equal(once, torch.cat([kept, new], 2))
        torch.cat([new, new], 2)
        assert torch.allclose(F.conv3d(once, weight, padding=(0, 1, 1)), expected, rtol=1e-5)


def test_attention_comes_back_after_an_error() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.optimized_attention = len

    block = Block()
    with pytest.raises(ValueError, match="inside"), strip_of(block, rows(), lambda q, k, v: q):
        assert block.optimized_attention is not len
        raise ValueError("inside")
    assert block.optimized_attention is len


def test_uneven_strips() -> None:
    strips = Strips.of(7, ranks=3, rank=1)
    assert strips.sizes == (3, 2, 2) and (strips.start, strips.height, strips.total) == (3, 2, 7)
    assert strips.heights(8) == (12, 8, 8) and strips.least(8) == 8
    assert torch.equal(strips.own(torch.arange(14.0)[:, None])[:, 0], torch.arange(6.0, 10.0))
    with pytest.raises(UnsupportedError):
        strips.heights(5)


def test_tiles_go_to_whoever_has_least() -> None:
    assert deal([4, 4, 2, 2, 1], 2) == [0, 1, 0, 1, 0]
    assert deal([1, 8, 1, 1, 1], 2) == [0, 1, 0, 0, 0]


class Foreign(torch.overrides.TorchFunctionMode):
    """Someone else's, which changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreign", [False, True])
def test_rules_can_be_suspended(foreign: bool) -> None:
    """Whole pictures are computed as they are, also under a mode entered later, and the rules hold again afterwards."""
    mode = RowParallel(rows())
    with mode, Foreign() if foreign else contextlib.nullcontext():
        with mode.suspended():
            assert torch.equal(F.unfold(X, 2), UNFOLDED)
        with pytest.raises(UnsupportedError, match="unfold"):
            F.unfold(X, 2)
        with pytest.raises(ZeroDivisionError), mode.suspended():
            raise ZeroDivisionError
        with pytest.raises(UnsupportedError, match="unfold"):
            F.unfold(X, 2)
    assert torch.equal(F.unfold(X, 2), UNFOLDED)


def test_time_is_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of uneven strips gives the same number of chunks, and the function is back afterwards."""
    import sys

    def own(device: torch.device) -> int:
        return 1000

    class Model(torch.nn.Module):
        pass

    here = sys.modules[Model.__module__]
    monkeypatch.setattr(here, budget.NAME, own, raising=False)
    model = Model()
    assert budget.budget(model, torch.device("cpu")) == 1000
    for made in range(1, 4000, 37):  # bytes per row
        chunks = set()
        for rank in range(3):
            strips = Strips.of(7, ranks=3, rank=rank)
            with budget.agreed(model, strips, 3000):
                limit = getattr(here, budget.NAME)(None)
            chunks.add((made * strips.height + limit - 1) // limit)
        assert len(chunks) == 1
    assert getattr(here, budget.NAME) is own


def test_watch_ends_soon_and_tells_every_step() -> None:
    told: list[int] = []
    watch = Watch(
        Mesh.single().control, total=30, report=lambda done, total: told.append(done), wanted=lambda: len(told) >= 3
    )
    with pytest.raises(Cancelled):
        for _ in range(30):
            watch.step(2)
    assert told == [2 * step + 2 for step in range(len(told))]
    assert 3 < len(told) <= 3 + 2 * SKIPPED + 1


def test_watch_asks_at_once_after_a_long_step() -> None:
    steps = 0
    watch = Watch(Mesh.single().control, wanted=lambda: steps == 4)
    with pytest.raises(Cancelled):
        for steps in range(1, 9):  # noqa: B007, the last one is what counts
            time.sleep(LONG_S + 0.01)
            watch.step()
    assert steps == 4


def test_frames_are_counted_at_the_last_convolution() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.SiLU(), torch.nn.Conv2d(1, 1, 1), torch.nn.SiLU())
    x = torch.ones(5, 1, 2, 2)
    _, last = last_convolution(model, lambda: model(x))
    assert last is model[2]
    told: list[int] = []
    watch = Watch(Mesh.single().control, total=10, report=lambda done, total: told.append(done), wanted=lambda: False)
    with counting(last, watch):
        model(x)
    model(x)
    assert told == [5]
