"""Ranks arranged by axis, and the process groups between them: the only place where groups are made."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from . import strangers
from .comm import Comm, Meter
from .config import AXES, ParallelConfig
from .layout import Layout, Segment


class Mesh:
    """This process's rank, how the ranks are arranged, and one `Comm` per axis.

    Ranks are numbered row by row over the axes dp, cfg, ring, ulysses, so ulysses ranks are neighbours.
    Make one with `create` or `single`; `close` it when done.

    Attributes:
        rank: this process's rank in the world.
        parallel: sizes of the axes and the engine's switches.
    """

    def __init__(
        self,
        parallel: ParallelConfig,
        *,
        rank: int,
        comms: Mapping[str, Comm],
        controls: Mapping[tuple[int, ...], Comm],
        meter: Meter,
        timeout: timedelta = timedelta(0),
    ) -> None:
        self.parallel = parallel
        self.rank = rank
        self._controls = dict(controls)
        self._comms = MappingProxyType(dict(comms))
        self._meter = meter
        self._first: dict[int, Comm | None] = {}
        self._parts: dict[int, Comm] = {}
        self._timeout = timeout

    @classmethod
    @strangers.refused()
    def create(
        cls, parallel: ParallelConfig, *, rank: int, store: dist.Store, backend: str, timeout: timedelta
    ) -> Mesh:
        """Join the other ranks; every rank of the world must call this with the same arguments but its rank.

        Args:
            parallel: `parallel.world` ranks take part.
            rank: this process's rank.
            store: where the ranks find each other; not used by another mesh.
            backend: "nccl" on CUDA (the process has chosen its device before), "gloo" on CPU.
            timeout: bound of every collective, and of the meeting itself.

        Raises:
            RuntimeError or torch.distributed.DistError: the ranks did not meet in time.
            WorkerError: another user of the machine has come between them.
        """
        world = parallel.world
        assert 0 <= rank < world, (rank, world)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timeout, pg_options=_options(backend, timeout)
        )
        meter = Meter()
        everyone = tuple(range(world))
        comms = {"world": cls._comm(everyone, rank=rank, group=dist.group.WORLD, meter=meter)}
        sizes = [parallel.degrees[axis] for axis in AXES]
        grid = torch.arange(world).view(sizes)
        for dim, axis in enumerate(AXES):
            # every rank makes every group, in this order, also those it is not in
            for row in grid.movedim(dim, -1).reshape(-1, sizes[dim]).tolist():
                group: dist.ProcessGroup | None = None
                if len(row) == world:
                    group = dist.group.WORLD
                elif len(row) > 1:
                    group = dist.new_group(row, timeout=timeout, backend=backend, pg_options=_options(backend, timeout))
                if rank in row:
                    comms[axis] = cls._comm(tuple(row), rank=rank, group=group, meter=meter)
        both = parallel.degrees["ring"] > 1 and parallel.degrees["ulysses"] > 1
        comms["sequence"] = comms["ulysses" if parallel.degrees["ulysses"] > 1 else "ring"]
        comms["weights"] = cls._comm((rank,), rank=rank, group=None, meter=meter)
        wanted = {"sequence": both, "weights": parallel.residency != "resident" and parallel.sequence > 1}
        for name in (name for name in wanted if wanted[name]):
            for row in grid.view(-1, parallel.sequence).tolist():
                group = dist.group.WORLD
                # weights on connections of their own: a block must not stand in front of attention's exchange
                if len(row) < world or name == "weights":
                    group = dist.new_group(row, timeout=timeout, backend=backend, pg_options=_options(backend, timeout))
                if rank in row:
                    comms[name] = cls._comm(tuple(row), rank=rank, group=group, meter=meter)
        controls: dict[tuple[int, ...], Comm] = {}
        for row in (everyone, *map(tuple, grid.view(-1, parallel.sequence).tolist())):
            # uncounted, and on connections of their own
            if len(row) in (1, world) and controls:
                continue
            group = dist.new_group(list(row), timeout=timeout, backend="gloo")
            if rank in row:
                controls[row] = cls._comm(row, rank=rank, group=group, meter=Meter(meter.place))
        return cls(parallel, rank=rank, comms=comms, controls=controls, meter=meter, timeout=timeout)

    @classmethod
    def single(cls, parallel: ParallelConfig | None = None) -> Mesh:
        """A mesh of this process alone, without torch.distributed.

        Args:
            parallel: the engine's switches, with a world of one; None takes the defaults.
        """
        parallel = parallel or ParallelConfig(world=1)
        assert parallel.world == 1, parallel
        meter = Meter()
        comms = {
            axis: cls._comm((0,), rank=0, group=None, meter=meter) for axis in ("world", *AXES, "sequence", "weights")
        }
        controls: dict[tuple[int, ...], Comm] = {(0,): cls._comm((0,), rank=0, group=None, meter=Meter())}
        return cls(parallel, rank=0, comms=comms, controls=controls, meter=meter)

    @staticmethod
    def _comm(ranks: tuple[int, ...], *, rank: int, group: dist.ProcessGroup | None, meter: Meter) -> Comm:
        return Comm(group if len(ranks) > 1 else None, ranks=ranks, rank=ranks.index(rank), meter=meter)

    def axis(self, name: str) -> Comm:
        """The ranks that differ from this one only on axis `name` ("dp", "cfg", "ring", "ulysses").

        "sequence" is ring and ulysses together, ulysses innermost, and "world" all ranks. "weights" is those that
        hold the parts of a block: the sequence's, which make the same model calls, on a group of their own; this
        rank alone where weights are resident.
        """
        return self._comms[name]

    def first(self, count: int) -> Comm | None:
        """The first `count` ranks of the world, None on the others; every rank must ask for it at the same point."""
        world = self._comms["world"]
        if count == world.size:
            return world
        if count not in self._first:
            ranks = tuple(range(count))
            with strangers.refused():
                group = dist.new_group(list(ranks), timeout=self._timeout) if count > 1 else None
                control = dist.new_group(list(ranks), timeout=self._timeout, backend="gloo") if count > 1 else None
            mine = self.rank < count
            self._first[count] = self._comm(ranks, rank=self.rank, group=group, meter=self._meter) if mine else None
            if mine:
                meter = Meter(self._meter.place)
                self._controls.setdefault(ranks, self._comm(ranks, rank=self.rank, group=control, meter=meter))
        return self._first[count]

    def part(self, size: int) -> Mesh:
        """A mesh in which only `size` consecutive ranks share a sequence, all of them on the ulysses axis.

        Every rank of this rank's sequence must ask for it at the same point; `size` divides their number.
        """
        sequence = self.sequence
        assert sequence.size % size == 0, (sequence.ranks, size)
        if size == sequence.size:
            return self
        if size not in self._parts:
            start = sequence.rank // size * size
            ranks = sequence.ranks[start : start + size]
            group = None
            if size > 1:
                # the ranks of other sequences are somewhere else
                with strangers.refused():
                    group = dist.new_group(list(ranks), timeout=self._timeout, use_local_synchronization=True)
            self._parts[size] = self._comm(ranks, rank=self.rank, group=group, meter=self._meter)
        part, comm = copy.copy(self), self._parts[size]
        alone = self._comm((self.rank,), rank=self.rank, group=None, meter=self._meter)
        part._comms = MappingProxyType({**self._comms, "sequence": comm, "ulysses": comm, "ring": alone})
        return part

    @property
    def speeds(self) -> tuple[float, ...]:
        """Relative speeds of the ranks that share this one's sequence, in their order; () where they are alike."""
        found = tuple(self.parallel.speeds[rank] for rank in self.sequence.ranks) if self.parallel.speeds else ()
        return found if len(set(found)) > 1 else ()

    def laid(self, segments: Sequence[Segment]) -> Layout:
        """How the ranks of a sequence hold some segments."""
        comm = self.sequence
        return Layout(segments=tuple(segments), rank=comm.rank, size=comm.size, speeds=self.speeds)

    @property
    def control(self) -> Comm:
        """All ranks, always on gloo and on its own connections, for small agreements on CPU tensors.

        It does not count into `collectives`.
        """
        return self._controls[tuple(range(self.parallel.world))]

    def control_of(self, comm: Comm) -> Comm:
        """The same for the ranks of `sequence`, `axis("world")`, or a `first` that was asked for."""
        known = self._controls.get(comm.ranks)
        return known or self._comm(comm.ranks, rank=self.rank, group=None, meter=Meter())

    @property
    def sequence(self) -> Comm:
        """The ranks that share one sequence."""
        return self._comms["sequence"]

    @property
    def collectives(self) -> int:
        """Collectives entered so far on this rank, `control`'s not counted."""
        return self._meter.count

    @property
    def waits(self) -> float:
        """For how many seconds this rank has been waiting for others, `control` included; 0 while it does not."""
        since = self._meter.place.since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def seconds(self) -> float:
        """Wall clock spent inside those collectives."""
        return self._meter.seconds

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes that this rank has sent to others in those collectives, by kind (see `Meter`)."""
        return dict(self._meter.bytes_sent)

    def close(self) -> None:
        """Leave the groups; harmless when there are none (any more)."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _options(backend: str, timeout: timedelta) -> Any:
    """What a group of a backend is made with; None takes the defaults."""
    if backend != "nccl":
        return None
    # an exchange that runs beside a kernel gets its few multiprocessors before that one's next blocks do
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options
