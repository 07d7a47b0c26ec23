"""Checks of Comm and Mesh that need ranks but no ComfyUI: each returns names and whether they held."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from comfy_raylight.raylight.errors import Cancelled
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.watch import LONG_S, SKIPPED, Watch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same numbers on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.float(), b.float())


def check(mesh: Mesh) -> dict[str, bool]:
    """Collectives with uneven sizes and every dtype, and what the mesh counts of them."""
    comm = mesh.axis("ulysses")
    found: dict[str, bool] = {}
    sizes = [rank % 3 for rank in range(comm.size)]
    for dtype in DTYPES:
        # what rank a sends to rank b: (a + b) % 3 rows, so some pieces are empty
        pieces = [values((comm.rank + b) % 3, 5, seed=comm.rank * 10 + b, dtype=dtype) for b in range(comm.size)]
        got = comm.all_to_all(pieces, shapes=[((a + comm.rank) % 3, 5) for a in range(comm.size)])
        want = [values((a + comm.rank) % 3, 5, seed=a * 10 + comm.rank, dtype=dtype) for a in range(comm.size)]
        found[f"all_to_all {dtype}"] = all(equal(a, b) for a, b in zip(got, want, strict=True))
        whole = [values(2, size, 3, seed=rank, dtype=dtype) for rank, size in enumerate(sizes)]
        parts = comm.all_gather(whole[comm.rank], dim=1, sizes=sizes)
        found[f"all_gather {dtype}"] = all(equal(a, b) for a, b in zip(parts, whole, strict=True))
        every = [values(2, 3, seed=rank, dtype=dtype) for rank in range(comm.size)]
        found[f"stack {dtype}"] = equal(comm.stack(every[comm.rank].mT.mT), torch.stack(every))
        for width in (1, 4):
            # strips of 3, 4, 5, ... rows: a row of the strip above, two of the one below
            strips = [values(2, rank + 3, width, seed=rank, dtype=dtype) for rank in range(comm.size)]
            for above, below in ((1, 2), (1, 0)):
                halo = comm.start_halo(strips[comm.rank], dim=1, above=above, below=below)()
                ends = [None, *(strip[:, -above:] for strip in strips)]
                starts = [*(strip[:, :below] if below else None for strip in strips), None]
                beside = ends[comm.rank], starts[comm.rank + 1]
                found[f"halo {dtype} {width} {below}"] = all(
                    a is b is None or (a is not None and b is not None and equal(a, b))
                    for a, b in zip(halo, beside, strict=True)
                )
        found[f"broadcast {dtype}"] = equal(
            comm.broadcast(whole[comm.rank] if comm.rank < 0 else values(3, seed=comm.rank, dtype=dtype)),
            values(3, seed=0, dtype=dtype),
        )
        # rank a passes (a % 3, 5) and (1, a) on; on three ranks and more, one of the first is empty
        before = (comm.rank - 1) % comm.size
        given = [values(comm.rank % 3, 5, seed=comm.rank, dtype=dtype), values(1, comm.rank, seed=9, dtype=dtype)]
        passed = comm.pass_on(given, shapes=[(before % 3, 5), (1, before)]).wait()
        want = [values(before % 3, 5, seed=before, dtype=dtype), values(1, before, seed=9, dtype=dtype)]
        found[f"pass_on {dtype}"] = all(equal(a, b) for a, b in zip(passed, want, strict=True))
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        mine = torch.full((2, 3), comm.rank + 1).to(dtype)
        found[f"sum {dtype}"] = equal(comm.all_reduce(mine), torch.full((2, 3), sum(range(1, comm.size + 1))).to(dtype))
        found[f"max {dtype}"] = equal(comm.all_reduce(mine, op="max"), torch.full((2, 3), comm.size).to(dtype))
        found[f"input kept {dtype}"] = bool((mine == comm.rank + 1).all())
    scalar = comm.broadcast(torch.tensor(float(comm.rank)))
    found["scalar"] = scalar.ndim == 0 and scalar.item() == 0
    before, seconds = mesh.collectives, mesh.seconds
    comm.broadcast(scalar)
    found["counted"] = mesh.collectives == before + 1 == comm.count and mesh.seconds > seconds
    mesh.control.broadcast(scalar)
    found["control not counted"] = mesh.collectives == before + 1
    lone = mesh.axis("ring")
    found["size 1"] = lone.size == 1 and lone.broadcast(scalar) is scalar and lone.all_reduce(scalar) is scalar
    found["sequence"] = mesh.sequence is mesh.axis("ulysses")
    return found | check_bytes(mesh) | check_watch(mesh)


def check_watch(mesh: Mesh) -> dict[str, bool]:
    """Ranks that are told to stop at different steps leave at the same one, soon, whether steps are short or long."""
    found: dict[str, bool] = {}
    control = mesh.control_of(mesh.sequence)
    draw = random.Random(5)
    for run in range(20):
        told = [draw.randrange(8) for _ in range(control.size)]
        pause = LONG_S + 0.01 if run % 4 == 3 else 0.0
        left = 0
        watch = Watch(control, wanted=lambda: left >= told[control.rank])  # noqa: B023, called in the loop below
        try:
            for left in range(40):  # noqa: B007, the last one is what counts
                watch.step()
                # ranks are not equally fast
                time.sleep(pause if control.rank == 0 else 0)
        except Cancelled:
            pass
        same = control.all_reduce(torch.tensor([left, -left]), op="max")
        found[f"left together {run}"] = same[0].item() == -same[1].item() == left
        first = min(told)
        # the first two steps of a run may still be short for all; of short ones not each asks, nor hears what it asked
        late = 2 * SKIPPED + 1 if pause == 0 else int(first < 2)
        found[f"left soon {run}"] = first <= left <= first + late
    watch = Watch(control, wanted=lambda: False)
    for _ in range(3):
        watch.step()
    watch.finish()
    found["stays"] = True
    return found


def check_bytes(mesh: Mesh) -> dict[str, bool]:
    """What each kind of collective counts as sent, next to its closed form."""
    comm = mesh.axis("ulysses")
    rank, others = comm.rank, comm.size - 1
    x = torch.zeros(rank + 1, 5, dtype=torch.bfloat16)

    def shapes(last: int) -> list[tuple[int, int]]:
        return [(other + 1, last) for other in range(comm.size)]

    runs: dict[str, tuple[Any, int]] = {
        # rank a gives rank b a tensor of b + 1 bytes
        "all_to_all": (
            lambda: comm.all_to_all(
                [torch.zeros(b + 1, dtype=torch.uint8) for b in range(comm.size)], shapes=[(rank + 1,)] * comm.size
            ),
            sum(range(1, comm.size + 1)) - rank - 1,
        ),
        "all_gather": (
            lambda: comm.all_gather(x, dim=0, sizes=[rows for rows, _ in shapes(5)]),
            10 * (rank + 1) * others,
        ),
        "broadcast": (lambda: comm.broadcast(x[:1]), 0 if rank else 10 * others),
        "all_reduce": (lambda: comm.all_reduce(x[:1]), 10 * others),
        "ring": (lambda: comm.pass_on([x], shapes=[shapes(5)[rank - 1]]).wait(), 10 * (rank + 1)),
    }
    found = {}
    for kind, (run, sent) in runs.items():
        before, count = mesh.bytes, mesh.collectives
        run()
        grown = {name: value - before.get(name, 0) for name, value in mesh.bytes.items()}
        found[f"bytes of {kind}"] = {name for name, value in grown.items() if value} <= {kind} and grown[kind] == sent
        found[f"count of {kind}"] = mesh.collectives == count + 1
    # what is empty on all ranks is counted and not sent
    count = mesh.collectives
    comm.broadcast(x[:0])
    comm.all_gather(x[:, :0], dim=0, sizes=[rows for rows, _ in shapes(0)])
    comm.pass_on([x[:0]], shapes=[(0, 5)]).wait()
    found["empty"] = mesh.collectives == count + 3
    return found


def check_grid(mesh: Mesh) -> dict[str, bool]:
    """Eight ranks as dp=2, cfg=2, ulysses=2: groups hold the right neighbours and work side by side."""
    rank = mesh.rank
    want = {
        "ulysses": (rank // 2 * 2, rank // 2 * 2 + 1),
        "ring": (rank,),
        "sequence": (rank // 2 * 2, rank // 2 * 2 + 1),
        "cfg": (rank // 4 * 4 + rank % 2, rank // 4 * 4 + rank % 2 + 2),
        "dp": (rank % 4, rank % 4 + 4),
        "world": tuple(range(8)),
    }
    found = {f"ranks of {axis}": mesh.axis(axis).ranks == ranks for axis, ranks in want.items()}
    for axis, ranks in want.items():
        total = mesh.axis(axis).all_reduce(torch.tensor(rank))
        found[f"sum over {axis}"] = total.item() == sum(ranks)
        first = mesh.axis(axis).broadcast(torch.tensor(rank))
        found[f"first of {axis}"] = first.item() == ranks[0]
    return found
