"""The cores that ComfyUI's process leaves to workers on GPUs while it samples."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from comfy_raylight.workers.driver import cores

MANY = 64
"""More threads than the machine has cores."""


@pytest.fixture(autouse=True)
def usual() -> Iterator[int]:
    """The threads of before, however many a test sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(MANY)
    yield MANY
    torch.set_num_threads(before)


def sampling(device: str, *, workers: int) -> int:
    """Threads while a MODEL on a pool samples."""
    config = SimpleNamespace(parallel=SimpleNamespace(world=workers))
    patcher = SimpleNamespace(load_device=torch.device(device), rpc=SimpleNamespace(config=config))

    class Executor:
        class_obj = SimpleNamespace(model_patcher=patcher)

        def __call__(self) -> int:
            return torch.get_num_threads()

    return cores.leave(Executor())


def test_workers_on_gpus_have_two_cores_each(usual: int) -> None:
    assert sampling("cuda", workers=1) == max(1, cores.usable_cores() - 3)
    assert sampling("cuda", workers=1000) == 1
    assert torch.get_num_threads() == usual


def test_workers_on_cpus_leave_the_threads(usual: int) -> None:
    assert sampling("cpu", workers=4) == usual


def test_few_threads_stay(usual: int) -> None:
    torch.set_num_threads(1)
    assert sampling("cuda", workers=1) == 1
    assert torch.get_num_threads() == 1


def test_an_error_brings_the_threads_back(usual: int) -> None:
    with pytest.raises(KeyError), cores.leaving(2):
        raise KeyError
    assert torch.get_num_threads() == usual


def test_threads_that_sample_side_by_side(usual: int) -> None:
    """One that begins while another samples must not restore the few, which new threads would take over."""
    begun, end = threading.Event(), threading.Event()

    def other() -> None:
        with cores.leaving(2):
            begun.set()
            end.wait(10)

    with cores.leaving(2):
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(10)
    end.set()
    thread.join()
    assert torch.get_num_threads() == usual
    found = []
    fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert found == [usual]
