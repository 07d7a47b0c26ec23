"""Patches that misbehave or look around inside the model, under the pack's name: workers import it too."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any


def on_rank(rank: int, action: Callable[[], None]) -> Callable[..., Any]:
    """An attention override that acts on one rank (-1: on all) and else does what ComfyUI does."""

    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        import torch.distributed

        if rank in (-1, torch.distributed.get_rank()):
            action()
        return function(*args, **kwargs)

    return override


def in_worker(pool: Any, look: Callable[[Any], Any], *, rank: int = 0) -> Any:
    """What a function finds in a worker's process, which it gets the actor of."""
    import ray

    asked = pool.members[rank].actor.__ray_call__.options(concurrency_group="control").remote(look)
    return ray.get(asked, timeout=120)


def where_it_runs(worker: Any) -> tuple[str, list[str]]:
    """A worker's current folder, and its search path."""
    return os.getcwd(), list(sys.path)


def wait_for_python(worker: Any) -> None:
    """In a worker: have its device seem to wait for Python, which a CPU never does, until `end_waiting`."""
    for known in worker._runner._models.values():
        known._recordable = known._waits.seen = True
        known.note = lambda queued, took, args: None


def end_waiting(worker: Any) -> None:
    """In a worker: leave it as `wait_for_python` found it."""
    for known in worker._runner._models.values():
        del known.note
        known._recordable = known._waits.seen = False


def fail() -> None:
    raise ValueError("a patch went wrong")


def dawdle() -> None:
    time.sleep(0.2)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def times_chunked_layers(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention times 1 + the layers of this worker that have a hook on their output as feed-forwards in chunks do."""
    import torch

    layers = [m for m in gc.get_objects() if isinstance(m, torch.nn.Sequential) and m._forward_hooks]
    return func(*args, **kwargs) * (1 + len(layers))


def times_compiled_graphs(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention times 1 + the graphs that this worker has compiled."""
    import torch._dynamo.utils

    return func(*args, **kwargs) * (1 + torch._dynamo.utils.counters["stats"]["unique_graphs"])
