"""One host copy of a model, whatever the number of workers: what they occupy together, from the kernel's accounting.

Counted is the proportional set size (Pss) of all worker processes, summed. A page of the page cache counts once it is
mapped and was touched, as 1/n in each of n processes: the sum has it once. The first forward touches every weight.
What the workers occupied before is subtracted: interpreter, torch, ComfyUI, Ray, and what running a small model leaves
behind. Pages of shared libraries are divided among all processes of the machine that map them, so other runs of torch
should not end meanwhile.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from comfy_raylight.raylight.config import ModelSpec
from comfy_raylight.tests.conftest import SLOW, comfy_roots
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.weights.memory import Pooled, Watch, private, proportional
from comfy_raylight.tests.workers import conftest as workers
from comfy_raylight.workers.driver.group import Patches
from comfy_raylight.workers.pool import pool as pools

# pytest finds fixtures by the names they have here
acquire, environment, quiet_threads = workers.acquire, workers.environment, workers.quiet_threads

Start = Callable[[int], pools.Pool]

LEAST_BYTES = 1 << 30
DIM, FFN = 1536, 6144
LAYERS = {"float32": 7, "bfloat16": 15}
"""1.1 GiB each. On a CPU, ComfyUI computes in float32: a forward of the other one casts every weight."""
CASES = [
    ("float32", 1),
    ("float32", 4),
    ("float32", 2),
    pytest.param("bfloat16", 2, marks=SLOW),
]
"""Dtype of the file, and workers."""
ALLOWED = 1.05
"""Times the file."""
COUNTED = 0.9
"""Part of what must be there that must be seen: the measure works, give or take pages of shared libraries."""
BASE_BYTES = 64 << 20
"""Allowed for each worker besides: the model's modules, message buffers, and what the allocator keeps of a forward's
activations and of weights that were cast, of which the largest takes 36 MiB."""
CYCLES = {1: 1, 2: 3, 4: 1}
"""Offloads and reloads, by number of workers: what accumulates is seen on two."""
DRIFT_BYTES = 32 << 20
"""Private memory that a worker may add in further cycles, for its allocator: less than half of one block's weights."""
SLACK_BYTES = 2 << 20
"""And in an offload alone."""
BLOCK = "diffusion_model.blocks.{}.ffn.0.weight"
DIFFS = 6
"""Patches of a whole weight each, in float32: 216 MiB."""


@pytest.fixture(scope="session")
def large_wan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Checkpoints by dtype, each written once."""
    folder = tmp_path_factory.mktemp("large")

    def get(dtype: str) -> Path:
        path = folder / f"{dtype}.safetensors"
        size = {"dim": DIM, "ffn": FFN, "layers": LAYERS[dtype]}
        job = Job(family="wan", path=path, dtype=dtype, size=size)
        write([job], comfy_root=comfy_roots()[0], python=Path(sys.executable))
        assert path.stat().st_size >= LEAST_BYTES
        return path

    yield get
    shutil.rmtree(folder)


@pytest.fixture
def ready(acquire: workers.Acquire, tiny_wan: Path) -> Start:
    """Starts a pool that has run a small model, and forgot it."""

    def get(world: int) -> pools.Pool:
        pool = acquire(world)
        model = Pooled(pool, ModelSpec.of(tiny_wan))
        model.load()
        model.forward()
        model.release()
        return pool

    return get


def from_disk(path: Path) -> None:
    """Take a file out of the page cache, so that loading reads it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Grown:
    """Bytes that workers added since the base, by the points of a story.

    Attributes:
        total: by point, and at the peak of those that are no forwards.
        private: the part of it that no file and no shared memory is.
        peak: the largest private part while a model was loaded or offloaded.
    """

    total: dict[str, int] = field(default_factory=dict)
    private: dict[str, int] = field(default_factory=dict)
    peak: int = 0


def story(model: Pooled) -> Grown:
    """Load, run, offload and run again.

    Forwards are not watched: what they need while they run is no copy of the model.
    """
    total, own = proportional(model.pids), private(model.pids)
    grown = Grown()

    def point(name: str) -> None:
        grown.total[name] = proportional(model.pids) - total
        grown.private[name] = private(model.pids) - own

    def watched(name: str, act: Callable[[], None]) -> None:
        with Watch(proportional, model.pids) as whole, Watch(private, model.pids) as part:
            act()
        grown.total[f"peak of {name}"] = whole.peak - total
        grown.peak = max(grown.peak, part.peak - own)
        point(name)

    from_disk(Path(model.spec.path))
    watched("load", model.load)
    outputs = [model.forward()]
    point("run")
    for cycle in range(1, CYCLES[len(model.pids)] + 1):
        watched(f"offload {cycle}", model.offload)
        outputs.append(model.forward())
        point(f"reload {cycle}")
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    return grown


def bound(model: Pooled) -> int:
    return int(ALLOWED * model.spec.size) + len(model.pids) * BASE_BYTES


def over(grown: dict[str, int], limit: int) -> dict[str, str]:
    """Points that are over the limit, in MiB."""
    return {name: f"{size >> 20} > {limit >> 20} MiB" for name, size in grown.items() if size > limit}


@pytest.mark.parametrize(("dtype", "world"), CASES)
def test_workers_hold_a_model_once(ready: Start, large_wan: Callable[[str], Path], dtype: str, world: int) -> None:
    model = Pooled(ready(world), ModelSpec.of(large_wan(dtype)))
    grown = story(model)
    assert grown.total["run"] >= COUNTED * model.spec.size  # all of it was touched, and counted
    assert not over(grown.total, bound(model))
    # pages of the file count once at most: with them, this is the most there can have been between two looks
    assert grown.peak + model.spec.size <= bound(model)
    for cycle in range(1, CYCLES[world] + 1):
        before = grown.private["run" if cycle == 1 else f"reload {cycle - 1}"]
        assert grown.private[f"offload {cycle}"] <= before + world * SLACK_BYTES
        assert grown.private[f"reload {cycle}"] <= grown.private["reload 1"] + world * DRIFT_BYTES
    model.release()


def test_copies_of_their_own_would_be_seen(ready: Start, large_wan: Callable[[str], Path]) -> None:
    model = Pooled(ready(2), ModelSpec.of(large_wan("float32"), reader="private"))
    grown = story(model)
    assert set(over(grown.total, bound(model))) == set(grown.total)
    assert grown.peak >= 2 * model.spec.size
    model.release()


def test_workers_hold_patches_once(ready: Start, large_wan: Callable[[str], Path]) -> None:
    """Measured after an offload: on a CPU, as on any device, patched weights themselves are each worker's own."""
    model = Pooled(ready(2), ModelSpec.of(large_wan("float32")))
    model.load()
    plain = model.forward()
    model.offload()
    total, own = proportional(model.pids), private(model.pids)
    diffs = [torch.full((FFN, DIM), 0.01 * (number + 1)) for number in range(DIFFS)]
    weights = {BLOCK.format(n): [(1.0, ("diff", (diff,)), 1.0, None, None)] for n, diff in enumerate(diffs)}
    patched = model.forward(Patches(fingerprint=("patched",), weights=weights))
    model.offload()
    total, own = proportional(model.pids) - total, private(model.pids) - own
    size = sum(diff.nbytes for diff in diffs)
    assert (patched - plain).abs().max() > 0.01 * plain.abs().max()
    assert COUNTED * size <= total <= 1.2 * size + 2 * DRIFT_BYTES
    assert own <= 2 * DRIFT_BYTES
    model.release()
