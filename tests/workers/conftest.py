"""A pool of real Ray actors on the CPU, driven without a ComfyUI in the test's own process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comfy_raylight.raylight.config import ParallelConfig, PoolConfig
from comfy_raylight.workers.pool import pool as pools
from comfy_raylight.workers.wire.messages import HostEnvironment

Acquire = Callable[..., pools.Pool]


def config(world: int, **more: object) -> PoolConfig:
    return PoolConfig(parallel=ParallelConfig(world=world, ulysses=world, ring=1, cfg=1), **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def environment(comfy_root: Path) -> HostEnvironment:
    return HostEnvironment(
        comfy_root=str(comfy_root),
        arguments=pickle.dumps({"cpu": True}),
        folders=pickle.dumps({}),
        device_type="cpu",
    )


@pytest.fixture(scope="module")
def acquire(environment: HostEnvironment) -> Iterator[Acquire]:
    def get(world: int = 2, *, interrupted: Callable[[], bool] = lambda: False, **more: object) -> pools.Pool:
        return pools.acquire(config(world, **more), environment, interrupted)

    yield get
    pools.close_all()


@pytest.fixture(autouse=True)
def quiet_threads() -> None:
    torch.set_num_threads(1)
