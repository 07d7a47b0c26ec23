"""Data parallel: several samplings at the same time, each on a replica of its own."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import comfy.hooks
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import torch

from ...raylight.config import ParallelConfig
from ...raylight.errors import ConfigError, UnsupportedError
from ..wire import random_states
from ..wire.pickling import copied
from . import remote

log = logging.getLogger(__name__)

T = TypeVar("T")
Sample = Callable[..., T]

KEY = "raylight_jobs"
SHARED = (
    torch.Tensor,
    torch.nn.Module,
    comfy.model_patcher.ModelPatcher,
    comfy.sd.VAE,
    comfy.sd.CLIP,
    comfy.hooks._HookRef,
)
"""What all jobs use together: data that samplings do not change, models, and what is known by its identity."""
STATE = ("model_options", "wrappers", "callbacks", "attachments")
"""Attributes of a patcher that may hold objects and functions with a state of their own."""


def replicas(model: Any, *, one_will_do: bool = False) -> int:
    """How many samplings of a MODEL can run at the same time.

    Args:
        one_will_do: whether a pool that puts all of its workers on one picture is right as well.

    Raises:
        ConfigError: it is not on the pool, or the pool puts all of its workers on one picture.
    """
    place = remote.on_pool(model).rpc.place
    if place.chooses:
        if one_will_do:
            return 1
        raise ConfigError(
            "Data parallel sampling needs a pool of several replicas",
            "Load Model (all GPUs) puts the cards on one picture, or uses one of them",
            "Load the model with Ray Init Actor, its three degrees at 0, and Load Diffusion Model (Ray)",
        )
    parallel: ParallelConfig = place.config.parallel
    count = parallel.degrees["dp"]
    if count == 1 < parallel.world and not one_will_do:
        raise ConfigError(
            "Data parallel sampling needs a pool of several replicas",
            f"ulysses_degree={parallel.ulysses}, ring_degree={parallel.ring}, cfg_degree={parallel.cfg} "
            f"put all {parallel.world} workers on one picture",
            "Set the three degrees to 0 in the Ray Init Actor node, or GPU to a multiple of their product; "
            "or sample one picture with XFuser KSampler (Advanced)",
        )
    return count


def run(model: Any, jobs: Sequence[Mapping[str, Any]], sample: Sample[T], *, one_will_do: bool = False) -> list[T]:
    """Sample several times, one job at a time on each replica of the pool; what is left waits for a free one.

    Each job is what a single run would be: it starts from torch's generators as they are now, and has copies of
    what could keep a state between steps: patches, conditioning and samplers.

    Args:
        jobs: arguments of `sample` for each run, besides `model`.
        sample: one whole sampling, in ComfyUI's own code.
        one_will_do: see `replicas`.

    Returns:
        The results in the order of the jobs.

    Raises:
        ConfigError: see `replicas`.
    """
    count = replicas(model, one_will_do=one_will_do)
    alone = False
    try:
        _detach(model.clone(), {str(number): job for number, job in enumerate(jobs)})
    except UnsupportedError as error:
        # ControlNets, hooks and closures would mix the states of jobs that run at the same time
        log.warning("data parallel: one picture after another, not side by side. %s", error)
        alone, count = True, 1
    queue = deque(range(len(jobs)))
    results: dict[int, T] = {}
    before = random_states.keep()
    after: dict[int, Callable[[], None]] = {}
    progress = _Progress(len(jobs))

    def work(replica: int) -> None:
        while queue:
            number = queue.popleft()
            clone: Any = model.at(replica)
            values = jobs[number] if alone else _detach(clone, jobs[number])
            progress.watch(clone, number)
            before()
            results[number] = sample(model=clone, **values)
            after[number] = random_states.keep()
            progress.finished(number)

    model.rpc.lanes().run([functools.partial(work, replica) for replica in range(min(count, len(jobs)))])
    after[len(jobs) - 1]()
    return [results[number] for number in range(len(jobs))]


def _detach(model: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give a model, and a copy of the values, states of their own.

    Raises:
        UnsupportedError: something in them cannot be copied.
    """
    held = {name: getattr(model, name) for name in STATE}
    held, values = copied((held, dict(values)), lambda value: isinstance(value, SHARED))
    for name, value in held.items():
        setattr(model, name, value)
    return values


class _Progress:
    """One bar for all jobs: counts everybody's steps, and shows the picture of the first one that runs."""

    def __init__(self, jobs: int) -> None:
        self._steps = [0] * jobs
        self._running = set(range(jobs))

    def watch(self, model: Any, number: int) -> None:
        """Have the sampling of a job on this model report here."""

        def wrapper(executor: Any, guider: Any, sigmas: Any, extra: Any, callback: Any, *args: Any, **more: Any) -> Any:
            def report(step: int, x0: Any, x: Any, total: int) -> None:
                self._steps[number] = step + 1
                if number == min(self._running):
                    callback(sum(self._steps) - 1, x0, x, total * len(self._steps))

            return executor(guider, sigmas, extra, report if callback is not None else None, *args, **more)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, KEY, wrapper)

    def finished(self, number: int) -> None:
        """The job has ended."""
        self._running.discard(number)
