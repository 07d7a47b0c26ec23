"""Ranks of one process: threads that trade tensors, so that a plan can be carried out without other processes.

What a forward asks of a group is here; rings, rows and divided weights are not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ..comm import Comm, Meter, Passing
from ..config import AXES, ParallelConfig
from ..mesh import Mesh

WAIT_S = 300.0
"""After which a rank gives up on the others."""


class _Table:
    """Where ranks lay down what they give, and meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=WAIT_S)
        self._laid: list[tuple[str, Any]] = [("", None)] * size

    def trade(self, rank: int, kind: str, value: Any) -> list[Any]:
        """Every rank's value, when all have laid down one.

        Raises:
            BrokenBarrierError: another rank has failed.
            RuntimeError: the ranks do not do the same.
        """
        self._laid[rank] = kind, value
        self.barrier.wait()
        found = list(self._laid)
        self.barrier.wait()
        if len({there for there, _ in found}) > 1:
            raise RuntimeError(f"ranks came to different exchanges: {[there for there, _ in found]}")
        return [value for _, value in found]


class _ThreadComm(Comm):
    """A group whose ranks are threads."""

    def __init__(self, table: _Table, *, rank: int, size: int, meter: Meter) -> None:
        super().__init__(None, ranks=(rank,), rank=0, meter=meter)
        self.ranks, self.rank, self.size = tuple(range(size)), rank, size
        self._table = table

    def _exchange(self, flat: torch.Tensor, send: list[int], receive: list[int], kind: str) -> Passing:
        # as bytes: a rank without heads may see them in another dtype
        pieces = flat.clone().view(torch.uint8).split([count * flat.element_size() for count in send])
        with self.meter.collective(kind, flat.nbytes):
            every = self._table.trade(self.rank, kind, pieces)
        return Passing([], [torch.cat([given[self.rank] for given in every]).view(flat.dtype)], [], self.meter)

    def start_swap(self, going: Sequence[Sequence[torch.Tensor]], coming: Sequence[Sequence[torch.Tensor]]) -> Passing:
        """As a group of processes does it."""
        with self.meter.collective("all_to_all", 0):
            every = self._table.trade(self.rank, "swap", [[t.clone() for t in tensors] for tensors in going])
        for rank, given in enumerate(every):
            for place, got in zip(coming[rank], given[self.rank], strict=True) if rank != self.rank else ():
                place.copy_(got)
        return Passing([], [], [], self.meter)

    def _stacked(self, x: torch.Tensor, sent: int) -> torch.Tensor:
        with self.meter.collective("all_gather", sent):
            return torch.stack(self._table.trade(self.rank, "gather", x.clone()))

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """As a group of processes does it."""
        with self.meter.collective("broadcast", 0):
            first: torch.Tensor = self._table.trade(self.rank, "broadcast", x.clone())[0]
        return first.clone()

    def all_reduce(self, x: torch.Tensor, *, op: Literal["sum", "max"] = "sum") -> torch.Tensor:
        """As a group of processes does it."""
        with self.meter.collective("all_reduce", 0):
            every = torch.stack(self._table.trade(self.rank, "reduce", x.clone()))
        return every.sum(0) if op == "sum" else every.amax(0)


def on_ranks(size: int, job: Callable[[Mesh], Any]) -> list[Any]:
    """What a job returns on each of so many ranks, which share a sequence by Ulysses.

    Raises:
        Exception: what the job raised on the first rank that failed by itself.
    """
    table = _Table(size)
    results: list[Any] = [None] * size
    errors: list[tuple[bool, int, Exception]] = []

    def work(rank: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = job(_mesh(table, rank, size))
        except Exception as error:
            errors.append((isinstance(error, threading.BrokenBarrierError), rank, error))
            table.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda error: error[:2])[2]
    return results


def _mesh(table: _Table, rank: int, size: int) -> Mesh:
    meter = Meter()
    alone = Comm(None, ranks=(rank,), rank=0, meter=meter)
    whole = _ThreadComm(table, rank=rank, size=size, meter=meter)
    shared = ("world", "ulysses", "sequence")
    comms = {axis: whole if axis in shared else alone for axis in (*AXES, "world", "sequence", "weights")}
    parallel = ParallelConfig(world=size, ulysses=size, ring=1, cfg=1)
    return Mesh(parallel, rank=rank, comms=comms, controls={whole.ranks: whole}, meter=meter)
