"""SequenceAttention on every grid of ranks against attention over the whole: `python -m engine.ring_cases "" RESULTS`.

Each check puts a number under a name: an error relative to the largest value, or 0.0 and 1.0 for what holds and
what does not. `LIMITS` says what the tests ask of them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.errors import UnsupportedError
from comfy_raylight.raylight.layout import Layout, Segment, gather
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.sequence import kernels, overrides
from comfy_raylight.raylight.sequence.attention import SequenceAttention
from comfy_raylight.raylight.sequence.masks import QueryMask, QueryMasks

from .named import named
from .ranks import fork, mesh_of

GRIDS = ((2, 1), (3, 1), (5, 1), (8, 1), (1, 2), (1, 3), (1, 5), (1, 8), (2, 2), (2, 3), (3, 2), (4, 2))
"""Ulysses and ring degrees."""
WIDTH = 8
SHAPES: tuple[tuple[tuple[Segment, ...], int, int], ...] = tuple(
    (segments, batch, heads)
    for segments in (
        (Segment("a", 17),),
        (Segment("a", 1), Segment("b", 17)),
        (Segment("a", 9), Segment("b", 17)),
        (Segment("a", 17), Segment("b", 2), Segment("c", 9)),
        (Segment("a", 12, whole=True), Segment("b", 11)),
        (Segment("a", 1), Segment("b", 1)),
    )
    for batch, heads in ((1, 5), (2, 8), (2, 1))
)
"""Segments, batch and heads: uneven, shorter than most grids, kept whole on request, and nothing to cut at all."""
LIMITS = {"error": (0.0, 1e-6), "half": (0.0, 0.012), "held": (1.0, 1.0), "wrong": (1e-3, float("inf"))}
"""Bounds by the first word of a name. "wrong" ones are controls: mistakes that the errors would show."""


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """The same normal numbers on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    *,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """ComfyUI's attention over PyTorch's."""
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    assert q.shape[1] == heads
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    gqa = options.get("enable_gqa", False)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def flat(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).flatten(2)


class Grid:
    """One rank's view of one grid, and what it has found."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.kernel = kernels.resolve("TORCH", ring=mesh.axis("ring").size > 1)
        self.found: dict[str, float] = {}

    def layout(self, segments: tuple[Segment, ...]) -> tuple[Layout, tuple[str, ...]]:
        sequence = self.mesh.sequence
        layout = Layout(segments=segments, rank=sequence.rank, size=sequence.size)
        return layout, tuple(segment.name for segment in segments)

    def attention(self, layout: Layout, order: tuple[str, ...], **options: Any) -> Any:
        mesh = copy.copy(self.mesh)
        switches = {name: options.pop(name) for name in ("sync_ulysses", "overlap") if name in options}
        mesh.parallel = dataclasses.replace(mesh.parallel, **switches)
        return SequenceAttention(mesh, layout=layout, order=order, kernel=options.pop("kernel", self.kernel), **options)

    def whole(self, out: torch.Tensor, layout: Layout, order: tuple[str, ...]) -> torch.Tensor:
        return gather(out, dim=1, over=order, layout=layout, comm=self.mesh.sequence)

    def note(self, name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        assert name not in self.found, name
        shape = got.shape == want.shape and got.dtype == want.dtype
        error = (got.double() - want.double()).abs().max() / want.double().abs().max() if shape else None
        self.found[name] = float("nan") if error is None else error.item()

    def hold(self, name: str, held: bool) -> None:
        assert name not in self.found, name
        self.found[f"held {name}"] = float(held)

    def same(self, x: torch.Tensor) -> bool:
        """Whether all ranks have these bytes."""
        different = torch.tensor(int(not torch.equal(x, self.mesh.control.broadcast(x))))
        return self.mesh.control.all_reduce(different, op="max").item() == 0

    def kept(self, out: torch.Tensor, layout: Layout, order: tuple[str, ...]) -> torch.Tensor:
        """The rows of replicated segments."""
        parts = out.split([layout.local((name,)) for name in order], 1)
        kept = [part for name, part in zip(order, parts, strict=True) if layout.replicated(name)]
        return torch.cat([out[:, :0], *kept], 1)


def shapes(grid: Grid) -> None:
    """Every shape in every form of the arguments, with the same bits."""
    for segments, batch, heads in SHAPES:
        layout, order = grid.layout(segments)
        name = f"{'+'.join(str(s.length) + '!' * s.whole for s in segments)} batch {batch} heads {heads}"
        total = layout.total(order)
        q, k, v = (numbers(batch, heads, total, WIDTH, seed=seed) for seed in (1, 2, 3))
        cut = [layout.split(t, dim=2, over=order) for t in (q, k, v)]
        outs = [grid.attention(layout, order)(plain, *cut, heads, skip_reshape=True)]
        for switches in ({}, {"overlap": 2}, {"sync_ulysses": True}):
            attention = grid.attention(layout, order, **switches)
            outs.append(attention(plain, *map(flat, cut), heads))
            outs.append(flat(attention(plain, *cut, heads, skip_reshape=True, skip_output_reshape=True)))
        grid.note(f"error {name}", grid.whole(outs[0], layout, order), plain(q, k, v, heads, skip_reshape=True))
        grid.hold(f"forms {name}", all(torch.equal(out, outs[0]) for out in outs))
        grid.hold(f"bytes {name}", grid.same(grid.kept(outs[0], layout, order)))
        # a query of its own, whole on all ranks
        query = numbers(batch, heads, 7, WIDTH, seed=4)
        attention = grid.attention(layout, order, replicated_query=True)
        outs = [attention(plain, query, *cut[1:], heads, skip_reshape=True)]
        outs.append(attention(plain, *map(flat, (query, *cut[1:])), heads))
        outs.append(flat(attention(plain, query, *cut[1:], heads, skip_reshape=True, skip_output_reshape=True)))
        outs.append(
            grid.attention(layout, order, replicated_query=True, sync_ulysses=True)(
                plain, query, *cut[1:], heads, skip_reshape=True
            )
        )
        grid.note(f"error whole query {name}", outs[0], plain(query, k, v, heads, skip_reshape=True))
        grid.hold(f"forms of whole query {name}", all(torch.equal(out, outs[0]) for out in outs))
        grid.hold(f"bytes of whole query {name}", grid.same(outs[0]))


def all_masks(layout: Layout, order: tuple[str, ...], *, heads: int, rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Masks of every form; the square ones hide all keys of the first rank, or of all ranks, from some rows."""
    total = layout.total(order)
    some = numbers(2, 1, rows, total, seed=5) > 0
    some[..., total // 2] = True
    yield "1 x keys", numbers(1, total, seed=6)
    yield "batch x 1 x keys", numbers(2, 1, total, seed=6)
    yield "batch x 1 x 1 x keys", numbers(2, 1, 1, total, seed=6)
    yield "bool keys", some[:1, :, :1]
    yield "rows x keys", numbers(rows, total, seed=7)
    yield "batch x rows x keys", numbers(2, rows, total, seed=7)
    yield "bool rows x keys", some
    yield "heads", numbers(1, heads, rows, total, seed=8)
    yield "bool heads and keys", numbers(2, heads, 1, total, seed=8) > -1
    yield "rows", numbers(rows, 1, seed=9)
    hidden = numbers(1, 1, rows, total, seed=10)
    hidden[:, :, : rows // 2, : total // 2] = -torch.inf
    yield "hidden from some", hidden
    for name, low in (("-inf", -torch.inf), ("lowest", torch.finfo().min), ("-1e9", -1e9)):
        square = torch.zeros(1, 1, rows, total)
        square[:, :, ::3] = low
        square[:, :, 1::3, : total // 2] = low
        yield f"no key, {name}", square
    yield "no key, bool", torch.arange(rows)[:, None] % 3 != torch.zeros(1, total)


def masks(grid: Grid) -> None:
    """Masks of every form, for local and for whole queries."""
    heads = 5
    for segments in ((Segment("a", 17), Segment("b", 2), Segment("c", 9)), (Segment("a", 23),)):
        layout, order = grid.layout(segments)
        total = layout.total(order)
        q, k, v = (numbers(2, heads, total, WIDTH, seed=seed) for seed in (1, 2, 3))
        cut = [layout.split(t, dim=2, over=order) for t in (q, k, v)]
        for name, mask in all_masks(layout, order, heads=heads, rows=total):
            want = plain(q, k, v, heads, mask, skip_reshape=True)
            out = grid.attention(layout, order)(plain, *cut, heads, mask, skip_reshape=True)
            grid.note(f"error {len(order)} mask {name}", grid.whole(out, layout, order), want)
            grid.hold(f"{len(order)} mask {name} bytes", grid.same(grid.kept(out, layout, order)))
            if mask.ndim > 1 and mask.shape[-2] == 1 and mask.shape[-1] == total:
                short = layout.split(mask, dim=mask.ndim - 1, over=order)
                again = grid.attention(layout, order)(plain, *map(flat, cut), heads, mask=short)
                grid.hold(f"{len(order)} short mask {name}", torch.equal(again, out))
        query = numbers(2, heads, 7, WIDTH, seed=4)
        for name, mask in all_masks(layout, order, heads=heads, rows=7):
            want = plain(query, k, v, heads, mask, skip_reshape=True)
            attention = grid.attention(layout, order, replicated_query=True)
            out = attention(plain, query, *cut[1:], heads, mask, skip_reshape=True)
            grid.note(f"error {len(order)} whole query, mask {name}", out, want)
        for name, wrong in (("length", numbers(total + 1, seed=1)), ("rows", numbers(total - 1, total, seed=1))):
            call = partial(grid.attention(layout, order), plain, *map(flat, cut), heads, wrong)
            grid.hold(f"{len(order)} mask of another {name} is refused", refuses(grid, call))


def parted(grid: Grid) -> None:
    """A mask for each stretch of queries is what the whole mask of all of them is."""
    heads = 5
    for segments in ((Segment("a", 17), Segment("b", 2), Segment("c", 9)), (Segment("a", 23),)):
        layout, order = grid.layout(segments)
        total = layout.total(order)
        q, k, v = (numbers(2, heads, total, WIDTH, seed=seed) for seed in (1, 2, 3))
        cut = [layout.split(t, dim=2, over=order) for t in (q, k, v)]
        low, rows = torch.zeros(1, 1, 1, total), numbers(1, heads, total - 13, total, seed=5)
        low[..., 7:11], rows[..., 3] = torch.finfo().min, -torch.inf
        given = QueryMasks(
            (
                QueryMask(0, 9, low, exact=True),
                QueryMask(9, 9, rows),
                QueryMask(9, total - 4, rows),
                QueryMask(total - 4, total),
            )
        )
        whole = torch.zeros(1, heads, total, total)
        whole[:, :, :9], whole[:, :, 9 : total - 4] = low, rows
        want = plain(q, k, v, heads, whole, skip_reshape=True)
        outs = []
        for switches in ({}, {"overlap": 2}):
            attention = grid.attention(layout, order, **switches)
            outs.append(attention(plain, *cut, heads, given, skip_reshape=True))
            outs.append(attention(plain, *map(flat, cut), heads, mask=given))
        grid.note(f"error {len(order)} parted mask", grid.whole(outs[0], layout, order), want)
        grid.hold(f"{len(order)} parted mask forms", all(torch.equal(out, outs[0]) for out in outs))
        swapped = QueryMasks((QueryMask(0, total - 13, rows), QueryMask(total - 13, total, low)))
        out = grid.attention(layout, order)(plain, *cut, heads, swapped, skip_reshape=True)
        grid.note(f"wrong {len(order)} parts of a mask", grid.whole(out, layout, order), want)


def refuses(grid: Grid, call: Callable[[], object], words: str = "", *, collectives: int | None = 0) -> bool:
    """Whether the call raises UnsupportedError on this rank, after so many collectives (None: as many on all)."""
    before = grid.mesh.collectives
    try:
        call()
    except UnsupportedError as error:
        grown = torch.tensor(grid.mesh.collectives - before)
        equal = grid.same(grown) if collectives is None else grown.item() == collectives
        return equal and words in str(error)
    return False


def options(grid: Grid) -> None:
    """Keywords of the call: grouped heads, a scale, dtypes."""
    layout, order = grid.layout((Segment("a", 17), Segment("b", 2), Segment("c", 9)))
    total = layout.total(order)
    q = numbers(2, 6, total, WIDTH, seed=1)
    k, v = (numbers(2, 2, total, WIDTH, seed=seed) for seed in (2, 3))
    cut = [layout.split(t, dim=2, over=order) for t in (q, k, v)]
    for query, whole in ((cut[0], False), (numbers(2, 6, 7, WIDTH, seed=4), True)):
        attention = grid.attention(layout, order, replicated_query=whole)
        out = attention(plain, query, *cut[1:], 6, skip_reshape=True, enable_gqa=True, scale=0.7)
        asked = query if whole else q
        want = plain(asked, k, v, 6, skip_reshape=True, enable_gqa=True, scale=0.7)
        grid.note(f"error grouped heads, whole query {whole}", out if whole else grid.whole(out, layout, order), want)
        usual = plain(asked, k, v, 6, skip_reshape=True, enable_gqa=True)
        grid.note(f"wrong scale, whole query {whole}", usual, want)
    grid.hold(
        "grouped heads need the keyword",
        refuses(grid, lambda: grid.attention(layout, order)(plain, *cut, 6, skip_reshape=True), "fewer key"),
    )
    grid.hold(
        "another token count is refused",
        refuses(
            grid,
            lambda: grid.attention(layout, order)(plain, *(t[:, :, 1:] for t in cut), 6, skip_reshape=True),
            "number of tokens",
        ),
    )
    q, k, v = (numbers(2, 5, total, 64, seed=seed) for seed in (1, 2, 3))
    exact = plain(q, k, v, 5, skip_reshape=True)
    for dtype in (torch.bfloat16, torch.float16):
        cut = [layout.split(t.to(dtype), dim=2, over=order) for t in (q, k, v)]
        out = grid.whole(grid.attention(layout, order)(plain, *cut, 5, skip_reshape=True), layout, order)
        grid.hold(f"dtype {dtype}", out.dtype == dtype)
        grid.note(f"half {dtype}", out.float(), exact)
        alone = plain(q.to(dtype), k.to(dtype), v.to(dtype), 5, skip_reshape=True)
        grid.note(f"half plain {dtype}", alone.float(), exact)


class Watching(kernels.LocalKernel):
    """Notes how many collectives had begun at each call."""

    def __init__(self, kernel: kernels.LocalKernel, mesh: Mesh) -> None:
        self.kernel = kernel
        self.mesh = mesh
        self.seen: list[int] = []

    def with_lse(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(self.mesh.collectives)
        return self.kernel.with_lse(*args, **kwargs)


class Zeros(Watching):
    """A kernel that gives no log-sum-exp but zeros, as some do."""

    def with_lse(self, *args: Any, **kwargs: Any) -> Any:
        out, lse = self.kernel.with_lse(*args, **kwargs)
        return out, torch.zeros_like(lse)


def traffic(grid: Grid) -> None:
    """Bytes of each kind against their closed forms, collectives, and that transfers start before the work."""
    mesh = grid.mesh
    u, r = mesh.axis("ulysses"), mesh.axis("ring")
    batch, heads = 2, 5
    for segments in ((Segment("a", 17), Segment("b", 2), Segment("c", 9)), (Segment("a", 23),)):
        layout, order = grid.layout(segments)
        cut = tuple(name for name in order if not layout.replicated(name))
        rest = sum(layout.length(name) for name in order if name not in cut)
        q, k, v = (numbers(batch, layout.local(order), heads * WIDTH, seed=seed) for seed in (1, 2, 3))
        watching = None if grid.kernel is None else Watching(grid.kernel, mesh)
        before, count = mesh.bytes, mesh.collectives
        grid.attention(layout, order, kernel=watching)(plain, q, k, v, heads)
        sent = {kind: value - before.get(kind, 0) for kind, value in mesh.bytes.items()}
        mine = heads // u.size + (u.rank < heads % u.size)
        unit = batch * WIDTH * 4
        others = [layout.local(order, rank=r.rank * u.size + other) for other in range(u.size) if other != u.rank]
        want = {"all_to_all": unit * (3 * layout.local(cut) * (heads - mine) + mine * sum(others))}
        if u.size == 1:
            want["all_to_all"] = 0
        stretches = [
            sum(layout.local(cut, rank=index * u.size + other) for other in range(u.size)) for index in range(r.size)
        ]
        want["ring"] = unit * 2 * mine * sum(stretches[r.rank - step] for step in range(r.size - 1))
        want["broadcast"] = unit * mine * rest * (r.size - 1) if r.rank == 0 else 0
        held = all(sent.get(kind, 0) == value for kind, value in want.items())
        grid.hold(f"{len(order)} bytes", held and sum(sent.values()) == sum(want.values()))
        steps = (r.size - 1) + bool(rest and r.size > 1)
        ways = 0 if u.size == 1 else 2
        grid.hold(f"{len(order)} collectives", mesh.collectives - count == steps + ways)
        if watching is not None and mine:
            begun = count + (1 if ways else 0)
            grid.hold(
                f"{len(order)} transfers first",
                watching.seen == [begun + min(step + 1, r.size - 1) for step in range(r.size)],
            )


def controls(grid: Grid) -> None:
    """Mistakes, to show that the errors above would tell."""
    layout, order = grid.layout((Segment("a", 17), Segment("b", 2), Segment("c", 9)))
    total = layout.total(order)
    q, k, v = (numbers(2, 5, total, WIDTH, seed=seed) for seed in (1, 2, 3))
    want = plain(q, k, v, 5, skip_reshape=True)
    cut = [layout.split(t, dim=2, over=order) for t in (q, k, v)]
    if grid.kernel is None:
        return
    attention = grid.attention(layout, order, kernel=Zeros(grid.kernel, grid.mesh))
    out = attention(plain, *cut, 5, skip_reshape=True)
    grid.note("wrong merge by plain averages", grid.whole(out, layout, order), want)
    more, again = (torch.cat([t, t[:, :, 17:19]], 2) for t in (k, v))
    grid.note("wrong count of replicated keys", plain(q, more, again, 5, skip_reshape=True), want)
    mask = numbers(total, total, seed=4)
    turned = plain(q, k, v, 5, mask.roll(1, 1), skip_reshape=True)
    grid.note("wrong columns of a mask", turned, plain(q, k, v, 5, mask, skip_reshape=True))
    # without the broadcast, each ring index has replicated rows of its own rounding
    alone = copy.copy(grid.mesh.axis("ring"))
    alone.broadcast = lambda x: x  # type: ignore[method-assign]
    attention = grid.attention(layout, order)
    attention._ring = alone
    differ = not grid.same(grid.kept(attention(plain, *cut, 5, skip_reshape=True), layout, order))
    grid.hold("control: bytes differ without the broadcast", differ or not any(map(layout.replicated, order)))


def users(grid: Grid) -> None:
    """Overrides of the user's: whole options, refused alike on all ranks, and usable ranks afterwards."""
    ring = grid.mesh.axis("ring").size > 1
    heads = 2
    layout, order = grid.layout((Segment("a", 17), Segment("b", 2)))
    q, k, v = (numbers(1, heads, layout.total(order), WIDTH, seed=seed) for seed in (1, 2, 3))
    cut = [layout.split(t, dim=2, over=order) for t in (q, k, v)]
    seen: list[bool] = []

    def hotter(func: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs["transformer_options"] is whole)
        return func(q * 1.1, *args, **kwargs)

    def random(func: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return func(q + torch.rand(1), *args, **kwargs)

    def broken(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise UnsupportedError("Broken")

    def call(user: Any) -> torch.Tensor:
        whole["optimized_attention_override"] = user
        override = overrides.compose(grid.attention(layout, order), grid.kernel, whole)
        return override(plain, *cut, heads, skip_reshape=True, transformer_options={})

    whole: dict[str, Any] = {}
    if ring:
        grid.hold("override is refused", refuses(grid, lambda: call(hotter), "ring_degree to 1"))
    else:
        want = plain(q * 1.1, k, v, heads, skip_reshape=True)
        grid.note("error override", grid.whole(call(hotter), layout, order), want)
        grid.hold("whole options", all(seen) and bool(seen) == (grid.mesh.sequence.rank < heads))
        torch.manual_seed(grid.mesh.rank)
        for name, user in (("random", random), ("broken", broken)):
            grid.hold(f"{name} override is refused", refuses(grid, partial(call, user), collectives=None))
    whole.clear()
    override = overrides.compose(grid.attention(layout, order), grid.kernel, whole)
    out = override(plain, *cut, heads, skip_reshape=True, transformer_options={})
    grid.note("error afterwards", grid.whole(out, layout, order), plain(q, k, v, heads, skip_reshape=True))


def groups(grid: Grid) -> None:
    """The sequence's ranks, in their order."""
    mesh = grid.mesh
    u, r = mesh.axis("ulysses"), mesh.axis("ring")
    grid.hold("ranks", mesh.sequence.ranks == tuple(range(u.size * r.size)))
    grid.hold("rank", mesh.sequence.rank == r.rank * u.size + u.rank and mesh.axis("sequence") is mesh.sequence)
    total = mesh.sequence.all_reduce(torch.tensor(mesh.rank))
    grid.hold("sum", total.item() == sum(range(u.size * r.size)))


CHECKS = (groups, shapes, masks, parted, options, traffic, controls, users, named)


def check(rank: int, size: int, path: str, ulysses: int, ring: int) -> dict[str, float]:
    """All checks on one rank of a grid."""
    parallel = ParallelConfig(world=size, ulysses=ulysses, ring=ring, cfg=1)
    grid = Grid(mesh_of(parallel, rank=rank, path=path))
    with torch.inference_mode():
        for run in CHECKS:
            run(grid)
            count = torch.tensor(grid.mesh.collectives)
            grid.hold(f"equal collectives of {run.__name__}", grid.same(count))
    grid.mesh.close()
    return grid.found


def two_sequences(rank: int, size: int, path: str) -> dict[str, float]:
    """Eight ranks as cfg 2 x ring 2 x ulysses 2: two sequences side by side, each with numbers of its own."""
    mesh = mesh_of(ParallelConfig(world=8, ulysses=2, ring=2, cfg=2), rank=rank, path=path)
    grid = Grid(mesh)
    first = rank // 4 * 4
    grid.hold("ranks", mesh.sequence.ranks == tuple(range(first, first + 4)))
    layout, order = grid.layout((Segment("a", 17), Segment("b", 2)))
    with torch.inference_mode():
        q, k, v = (numbers(1, 5, 19, WIDTH, seed=seed + first) for seed in (1, 2, 3))
        cut = [layout.split(t, dim=2, over=order) for t in (q, k, v)]
        out = grid.attention(layout, order)(plain, *cut, 5, skip_reshape=True)
        grid.note("error", grid.whole(out, layout, order), plain(q, k, v, 5, skip_reshape=True))
    mesh.close()
    return grid.found


def main(_: str, result: str) -> None:
    """Run every grid and write down what each rank found; no ComfyUI takes part."""
    torch.set_num_threads(1)
    found = {f"{u}x{r}": fork(u * r, check, u, r) for u, r in GRIDS}
    found["2x2 twice"] = fork(8, two_sequences)
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:3])
