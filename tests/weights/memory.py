"""What the workers of a pool occupy together, by the kernel's accounting, while they load and run a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from comfy_raylight.raylight.config import ModelSpec, WorkerSettings
from comfy_raylight.workers.driver.group import Call, Group, Patches
from comfy_raylight.workers.pool.pool import Pool
from comfy_raylight.workers.wire.messages import LoadRequest

PERIOD_S = 0.02
LATENT = (1, 16, 1, 4, 8)
CONTEXT = (1, 4, 4096)


def proportional(pids: Iterable[int]) -> int:
    """Bytes that processes occupy together (Pss): a page that n processes map counts as 1/n in each of them.

    The kernel walks every page for it, 20 to 50 ms per GiB.
    """
    return _sum(pids, "smaps_rollup", "Pss:")


def private(pids: Iterable[int]) -> int:
    """Bytes of them that belong to no file and to no shared memory (RssAnon), which the kernel just knows."""
    return _sum(pids, "status", "RssAnon:")


def _sum(pids: Iterable[int], file: str, field: str) -> int:
    return sum(
        int(line.split()[1]) << 10
        for pid in pids
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines()
        if line.startswith(field)
    )


class Watch:
    """Measures processes while its block runs: when it begins and ends, and every PERIOD_S or as often as it can.

    Attributes:
        peak: the largest size that was seen, in bytes.
        last: the size at the end of the block.
    """

    def __init__(self, measure: Callable[[Iterable[int]], int], pids: Iterable[int]) -> None:
        self._measure = measure
        self._pids = list(pids)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_on)
        self.peak = self.last = 0

    def __enter__(self) -> Watch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _look_on(self) -> None:
        next_look = time.monotonic()
        while not self._done.wait(max(0.0, next_look - time.monotonic())):
            next_look = time.monotonic() + PERIOD_S
            self._look()

    def _look(self) -> None:
        self.last = self._measure(self._pids)
        self.peak = max(self.peak, self.last)


class Pooled:
    """A Wan model on all workers of a pool, called below ComfyUI's sampling code."""

    def __init__(self, pool: Pool, spec: ModelSpec) -> None:
        self.pool = pool
        self.spec = spec
        self.group = Group(pool, pool.replicas[0], lambda _: None)

    @property
    def pids(self) -> list[int]:
        return [member.place.pid for member in self.pool.members]

    def load(self) -> None:
        """As the driver on a CPU has it loaded: ComfyUI keeps float32 there, whatever the file has."""
        self.group.load(LoadRequest(spec=self.spec, dtype="float32"), self)

    def forward(self, patches: Patches | None = None) -> torch.Tensor:
        """One call on few tokens. Every weight is used, so every page of the file is touched."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(LATENT, generator=generator)
        call = Call(
            spec=self.spec,
            method="_forward",
            args=(x, torch.tensor([500.0]), torch.randn(CONTEXT, generator=generator)),
            kwargs={"transformer_options": {"sigmas": torch.ones(1), "cond_or_uncond": [0]}},
            functions=(),
            patches=patches or Patches(),
            fresh=(x,),
            random=None,
            settings=WorkerSettings(),
        )
        output: torch.Tensor = self.group.run(call)[0]
        return output

    def offload(self) -> None:
        self.group.offload(self.spec)

    def release(self) -> None:
        """Have the workers forget the model."""
        self.pool.call("release", self.spec)
