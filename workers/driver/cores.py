"""Leaves cores of the host to the workers on GPUs while ComfyUI's process samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..pool.processes import usable_cores


def leave(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of ComfyUI's sampling, for a MODEL on the pool."""
    patcher = executor.class_obj.model_patcher
    if patcher.load_device.type == "cpu":  # the workers rest while this process computes, and its threads are wanted
        return executor(*args, **kwargs)
    with leaving(patcher.rpc.config.parallel.world):
        return executor(*args, **kwargs)


@contextlib.contextmanager
def leaving(workers: int) -> Iterator[None]:
    """Have this thread compute with so few threads that every worker has two cores.

    OpenMP's threads do not sleep for milliseconds after they have computed, one on each core: who is to begin a call
    meanwhile waits for them. A core that is taken makes them wait for each other, too.
    """
    usual, few = torch.get_num_threads(), max(1, usable_cores() - 2 * workers - 1)
    if usual <= few:  # also where another thread, which began before, does it
        yield
        return
    torch.set_num_threads(few)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
