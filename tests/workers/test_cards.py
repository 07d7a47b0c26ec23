"""Which cards a text means, on machines that are only told of."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_raylight.raylight.errors import ConfigError
from comfy_raylight.workers.pool import cards, devices, limits, processes


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four accelerators, none hidden, and six cores."""
    for variable in (*devices.VARIABLES.values(), limits.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(devices, "_count", lambda device_type: 4)
    monkeypatch.setattr(devices, "NVIDIA", tmp_path / "gpus")
    monkeypatch.setattr(processes, "usable_cores", lambda: 6)
    monkeypatch.setattr(limits, "WORKER_BYTES", 1)


@pytest.mark.parametrize("text", ("all", " ALL ", ""))
def test_all(text: str) -> None:
    found = cards.pool_of(text, "cuda")
    assert found.devices == (0, 1, 2, 3) and found.parallel.world == 4
    assert found.parallel.degrees == {"dp": 4, "cfg": 1, "ring": 1, "ulysses": 1}, "each by itself, until one is chosen"


def test_some() -> None:
    assert cards.pool_of("0, 2", "cuda").devices == (0, 2)
    assert cards.pool_of("3;1", "cuda").devices == (3, 1)
    assert cards.pool_of("2", "cuda").parallel.world == 1


def test_hidden_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ComfyUI sees counts for all; names that are no numbers are those that it has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert cards.pool_of("all", "cuda").devices == (2, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2")
    found = cards.pool_of("all", "cuda")
    assert found.devices == () and found.parallel.world == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="sees no card"):
        cards.pool_of("all", "cuda")


@pytest.mark.parametrize(
    "text,why",
    (
        ("x", "not a list of cards: 'x'"),
        ("0,x", "not a list"),
        ("-1", "not a list"),
        ("1.0", "not a list"),
        ("٣", "not a list"),
        ("9" * 400, "not a list"),
        ("7", "does not have: 7; there are 0, 1, 2, 3"),
        ("0,0", "a card twice"),
        ("0,00", "a card twice"),
    ),
)
def test_what_is_no_card(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as raised:
        cards.pool_of(text, "cuda")
    assert len(str(raised.value)) < 400


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on each core, four at most, fewer where memory or the user's own limit says so."""
    assert cards.pool_of("all", "cpu").parallel.world == limits.MANY == 4
    assert cards.pool_of("0,3", "cpu").parallel.world == 2
    with pytest.raises(ConfigError, match="7; there are 0, 1, 2, 3"):
        cards.pool_of("7", "cpu")
    monkeypatch.setattr(processes, "usable_cores", lambda: 2)
    assert cards.pool_of("all", "cpu").parallel.world == 2
    monkeypatch.setenv(limits.VARIABLE, "1")
    assert cards.pool_of("all", "cpu").parallel.world == 1
    monkeypatch.delenv(limits.VARIABLE)
    monkeypatch.setattr(limits, "WORKER_BYTES", 1 << 60)
    assert cards.pool_of("all", "cpu").parallel.world == 1, "one there always is"


def test_another_device() -> None:
    with pytest.raises(ConfigError, match="cannot put workers on mps"):
        cards.pool_of("all", "mps")
