"""Settings: what is accepted, what is refused, and that the message helps."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from comfy_raylight.raylight import errors
from comfy_raylight.raylight.config import ModelSpec, ParallelConfig, PoolConfig
from comfy_raylight.raylight.errors import ConfigError, LoadError, WorkerError


@pytest.mark.parametrize(
    "world,degrees,expected",
    [
        (2, (2, 1, 1), {"dp": 1, "cfg": 1, "ring": 1, "ulysses": 2}),
        (4, (2, 1, 1), {"dp": 2, "cfg": 1, "ring": 1, "ulysses": 2}),
        (8, (2, 2, 2), {"dp": 1, "cfg": 2, "ring": 2, "ulysses": 2}),
        (3, (0, 0, 0), {"dp": 3, "cfg": 1, "ring": 1, "ulysses": 1}),
    ],
)
def test_degrees(world: int, degrees: tuple[int, int, int], expected: dict[str, int]) -> None:
    config = ParallelConfig(world=world, ulysses=degrees[0], ring=degrees[1], cfg=degrees[2])
    assert config.degrees == expected


@pytest.mark.parametrize(
    "world,degrees,words",
    [
        (2, (4, 1, 1), ("multiply to 4", "GPU is 2", "1, 2")),
        (4, (3, 1, 1), ("multiply to 3", "1, 2, 4")),
        (2, (2, 0, 1), ("ring_degree=0", "0 for all three")),
        (2, (-1, 1, 1), ("negative", "ulysses_degree=-1")),
        (0, (1, 1, 1), ("GPU is 0",)),
        (-2, (0, 0, 0), ("GPU is -2",)),
        (10**12, (7, 1, 1), ("GPU is larger than any pool can be", "1000000000000", "up to 1024")),
        (10**12, (0, 0, 0), ("GPU is larger",)),
        (2, (1, 10**4000, 1), ("ring_degree is larger",)),
    ],
)
def test_bad_degrees(world: int, degrees: tuple[int, int, int], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(world=world, ulysses=degrees[0], ring=degrees[1], cfg=degrees[2])
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("devices", [(0,), (1, 1), (-1, 0)])
def test_bad_devices(devices: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        PoolConfig(parallel=ParallelConfig(world=2), devices=devices)


@pytest.mark.parametrize("size", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_bad_object_store(size: float) -> None:
    with pytest.raises(ConfigError, match="ray_object_store_gb is no size"):
        PoolConfig(parallel=ParallelConfig(world=2), object_store_gb=size)


@pytest.mark.parametrize(
    "world,ulysses,attention,needed", [(1, 1, "TORCH", False), (1, 1, "FA", True), (2, 2, "TORCH", True)]
)
def test_when_a_plan_is_needed(world: int, ulysses: int, attention: str, needed: bool) -> None:
    config = ParallelConfig(world=world, ulysses=ulysses, ring=1, cfg=1, attention=attention)
    assert config.needs_plan is needed


def test_conditions_are_divided_without_a_plan() -> None:
    """A group of one worker has the whole sequence, whatever the family."""
    config = ParallelConfig(world=4, ulysses=1, ring=1, cfg=4)
    assert config.sequence == 1 and not config.needs_plan
    assert ParallelConfig(world=4, ulysses=2, ring=1, cfg=2).needs_plan


def test_equal_configs_are_one_pool() -> None:
    first = PoolConfig(parallel=ParallelConfig(world=2, ulysses=2, ring=1, cfg=1))
    assert {first: 1}[pickle.loads(pickle.dumps(first))] == 1


def test_spec_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    first = ModelSpec.of(path)
    assert ModelSpec.of(path) == first
    path.write_bytes(b"other")
    assert ModelSpec.of(path) != first
    with pytest.raises(LoadError, match="cannot be read"):
        ModelSpec.of(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "kind", ["ConfigError", "PlanError", "UnsupportedError", "MisfitError", "LoadError", "WorkerError"]
)
def test_errors_survive_the_way_home(kind: str) -> None:
    error = getattr(errors, kind)("What", "why", "Do this")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error) == "What: why. Do this"


def test_worker_error_keeps_its_cause() -> None:
    assert pickle.loads(pickle.dumps(WorkerError("a", cause_type="ValueError"))).cause_type == "ValueError"
