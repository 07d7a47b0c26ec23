"""Which device each worker gets, on machines that are only told of."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_raylight.raylight.config import ParallelConfig, PoolConfig
from comfy_raylight.raylight.errors import ConfigError
from comfy_raylight.workers.pool import devices, launch, limits
from comfy_raylight.workers.wire.messages import HostEnvironment


def config(world: int, *indices: int) -> PoolConfig:
    return PoolConfig(parallel=ParallelConfig(world=world, ulysses=world, ring=1, cfg=1), devices=indices)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Four accelerators, none hidden; NVIDIA's driver tells nothing until folders are made in the result."""
    for variable in devices.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(devices, "_count", lambda device_type: 4)
    monkeypatch.setattr(devices, "NVIDIA", tmp_path / "gpus")
    return tmp_path / "gpus"


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("device_type", devices.VARIABLES)
def test_first_ones_or_those_that_are_named(device_type: str) -> None:
    assert devices.chosen(config(2), device_type) == ["0", "1"]
    assert devices.chosen(config(2, 3, 1), device_type) == ["3", "1"]
    assert devices.chosen(config(2, 3, 1, 0), device_type) == ["3", "1"]


def test_windows_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    there = HostEnvironment(comfy_root="", arguments=b"", folders=b"", device_type="cpu")
    limits.check(config(1), there, local=True)
    monkeypatch.setattr(limits.platform, "system", lambda: "Windows")
    with pytest.raises(ConfigError, match=r"do not run on Windows.*WSL2"):
        limits.check(config(1), there, local=True)


@pytest.mark.usefixtures("machine")
def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not have: 7, 4; there are 0, 1, 2, 3"):
        devices.chosen(config(3, 0, 7, 4), "cuda")
    with pytest.raises(ConfigError, match="GPU is 5, ComfyUI sees 4: 0, 1, 2, 3"):
        devices.chosen(config(5), "cuda")
    with pytest.raises(ConfigError, match="cannot pin workers to tpu"):
        devices.chosen(config(1), "tpu")


def test_devices_hidden_from_comfyui(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get those that ComfyUI sees; gpu_indices may name the others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 0")
    assert devices.chosen(config(2), "cuda") == ["2", "0"]
    with pytest.raises(ConfigError, match="ComfyUI sees 2: 2, 0"):
        devices.chosen(config(3), "cuda")
    assert devices.chosen(config(2, 1, 9), "cuda") == ["1", "9"], "nobody knows what is hidden"
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (machine / name).mkdir(parents=True)
    assert devices.chosen(config(2, 1, 2), "cuda") == ["1", "2"]
    with pytest.raises(ConfigError, match="9; there are 0, 1, 2"):
        devices.chosen(config(2, 1, 9), "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="ComfyUI sees 0: none"):
        devices.chosen(config(1), "cuda")


@pytest.mark.usefixtures("machine")
def test_variables_of_a_worker() -> None:
    def variables(of: PoolConfig, device_type: str, rank: int) -> dict[str, str]:
        environment = HostEnvironment(comfy_root="", arguments=b"", folders=b"", device_type=device_type)
        return launch.worker_variables(of, environment)[rank]

    assert variables(config(2, 3, 1), "cuda", 1)["CUDA_VISIBLE_DEVICES"] == "1"
    assert variables(config(2), "xpu", 1)["ZE_AFFINITY_MASK"] == "1"
    on_cpu = variables(config(2, 7, 8), "cpu", 0)
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == ""
