"""Checks of Comm, Mesh and Ulysses that need ranks but no ComfyUI: each returns names and whether they held."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from comfy_raylight.raylight.attention import Ulysses
from comfy_raylight.raylight.layout import Layout, Segment, gather
from comfy_raylight.raylight.mesh import Mesh

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same numbers on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.float(), b.float())


def local_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None, **kwargs: Any
) -> Any:
    """ComfyUI's signature over PyTorch's attention."""
    if not kwargs.get("skip_reshape"):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    assert q.shape[1] == heads
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def check(mesh: Mesh) -> dict[str, bool]:
    """Collectives with uneven sizes and every dtype, and Ulysses against attention over the whole."""
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
        found[f"broadcast {dtype}"] = equal(
            comm.broadcast(whole[comm.rank] if comm.rank < 0 else values(3, seed=comm.rank, dtype=dtype)),
            values(3, seed=0, dtype=dtype),
        )
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
    return found | check_ulysses(mesh)


def check_ulysses(mesh: Mesh) -> dict[str, bool]:
    """Ulysses in every form of its arguments."""
    comm = mesh.axis("ulysses")
    found: dict[str, bool] = {}
    for lengths in ((17,), (1, 17), (9, 17), (17, 2, 9), (1, 1)):
        segments = tuple(Segment(f"s{i}", length) for i, length in enumerate(lengths))
        layout = Layout(segments=segments, rank=comm.rank, size=comm.size)
        order = tuple(segment.name for segment in segments)
        total = layout.total(order)
        for batch in (1, 2):
            for heads in (5, 8):
                q, k, v = (values(batch, heads, total, 4, seed=seed) / 4 for seed in (1, 2, 3))
                mask = values(batch, 1, 1, total, seed=4) / 4
                want = local_attention(q, k, v, heads, mask=mask, skip_reshape=True)
                cut = [layout.split(t, dim=2, over=order) for t in (q, k, v)]
                flat = [t.transpose(1, 2).flatten(2) for t in cut]
                short = layout.split(mask, dim=3, over=order)
                name = f"{lengths} batch {batch} heads {heads}"
                outs = []
                for pack in (False, True):
                    ulysses = Ulysses(comm, layout=layout, order=order, pack=pack, sync=True)
                    outs.append(ulysses(local_attention, *cut, heads, mask=mask, skip_reshape=True))
                    outs.append(ulysses(local_attention, *flat, heads, mask))
                    outs.append(ulysses(local_attention, *flat, heads, mask=short))
                    turned = ulysses(local_attention, *flat, heads, mask=mask, skip_output_reshape=True)
                    outs.append(turned.transpose(1, 2).flatten(2))
                got = gather(outs[0], dim=1, over=order, layout=layout, comm=comm)
                found[name] = torch.allclose(got, want, rtol=0, atol=1e-6)
                found[name + " forms"] = all(torch.equal(outs[0], out) for out in outs)
    return found


def check_grid(mesh: Mesh) -> dict[str, bool]:
    """Eight ranks as dp=2, cfg=2, ulysses=2: groups hold the right neighbours and work side by side."""
    rank = mesh.rank
    want = {
        "ulysses": (rank // 2 * 2, rank // 2 * 2 + 1),
        "ring": (rank,),
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
