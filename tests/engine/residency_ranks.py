"""Runs models whose blocks' weights are divided over P ranks: `python -m engine.residency_ranks ROOT RESULTS [CASES]`.

One case of every family, by itself and with its sequence divided; each beside the same with resident weights, whose
bits it must have. Results are one JSON object.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from comfy_raylight.loaders.residency import Leaf, Shards, Streams, from_map, pack
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.install import install
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.packing import footprint
from comfy_raylight.raylight.residency import Rotation
from comfy_raylight.raylight.sequence import kernels
from comfy_raylight.tests.host.large import LARGE

from .case import Case, patched, skip
from .families import CASES, wan
from .in_step import Agreement, Parts
from .ranks import enter_comfy, fork, forward_of, leaves, mesh_of

MESHES: dict[str, tuple[int, int]] = {"u2": (2, 1), "u3": (3, 1), "u2r2": (2, 2)}
"""Ulysses and ring degrees by name."""
KINDS = ("sharded", "streamed")
CPU = torch.device("cpu")
FAST = ("WanModel", "Flux", "NextDiT", "UNetModel")
"""Families that run in every variant by default; the others in one of each kind."""


def mixed(**_: Any) -> torch.nn.Module:
    """Several dtypes in one block, bytes of no size that divides by anything, and a weight in two blocks."""
    model: Any = wan.wan()
    linears = [m for block in model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    for linear in linears[::3]:
        linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    for linear in linears[1::3]:
        linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.bfloat16), requires_grad=False)
    for linear in linears:
        linear.comfy_cast_weights = True  # type: ignore[assignment]
    for block in model.blocks:
        block.self_attn.odd = torch.nn.Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)
    model.blocks[1].self_attn.q.weight = model.blocks[0].self_attn.q.weight
    return model


def skips() -> Any:
    return patched(wan.video, lambda: skip(("double_block", 1)))


SPECIAL = (
    Case(name="wan_mixed", family="WanModel", model=mixed, make=wan.video, modes=()),
    Case(name="wan_skips", family="WanModel", model=wan.wan, make=skips, base=wan.video, modes=()),
)


def chosen(pattern: str = "*") -> list[Case]:
    """The first case of every family, and the special ones."""
    first: dict[str, Case] = {}
    for case in CASES:
        if not (case.wrong or case.raises or case.half or case.change) and case.available():
            first.setdefault(case.family, case)
    return [case for case in (*first.values(), *SPECIAL) if fnmatch.fnmatch(case.name, pattern)]


def built(case: Case) -> Any:
    """The case's model; its parameters are normal tensors, as ComfyUI's loader makes them."""
    with torch.inference_mode(False), torch.no_grad():
        return case.build().requires_grad_(False)


def leaf_of(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> Leaf | None:
    def put(tensor: torch.Tensor) -> None:
        parameter.data = tensor

    return Leaf(parameter.data, parameter.dtype, put, parameter.shape) if parameter.is_contiguous() else None


@contextlib.contextmanager
def divided(model: torch.nn.Module, mesh: Mesh, kind: str, *, prefetch: bool) -> Iterator[tuple[Rotation, list[Any]]]:
    """The model with its blocks' weights in parts, and as it was afterwards."""
    comm = mesh.axis("weights")
    with torch.inference_mode(False):
        blocks = pack(model, leaf_of, ranks=comm.size, device=CPU)
        rotation = Rotation(comm, len(blocks))
        parts: Any = (
            Shards(blocks, comm.rank, from_map, CPU)
            if kind == "sharded"
            else Streams(blocks, comm.rank, from_map, CPU, ahead=prefetch)
        )
        rotation.open(blocks, parts, CPU, prefetch=prefetch)
    needed = footprint(kind, [block.packing for block in blocks], outside=0, prefetch=prefetch)
    assert needed.total == parts.bytes + rotation.bytes, (needed, parts.bytes, rotation.bytes)
    try:
        yield rotation, blocks
    finally:
        with torch.inference_mode(False):
            rotation.close()
            parts.close()
            for block in blocks:
                for leaf in block.leaves:
                    leaf.put(leaf.host)


def equal(left: Any, right: Any) -> bool:
    pairs = zip(leaves(left), leaves(right), strict=True)
    return all(bool(a.isfinite().all()) and torch.equal(a, b) for a, b in pairs)


def run(
    model: Any, call: Callable[[], Any], reference: Any, mesh: Mesh, kind: str, *, prefetch: bool
) -> dict[str, Any]:
    """Two calls in a row, the first of which learns the order of the blocks."""
    with divided(model, mesh, kind, prefetch=prefetch) as (rotation, blocks):
        outs, wasted = [], []
        for _ in range(2):
            before = rotation.wasted
            with rotation.call("forward"):
                outs.append(call())
            wasted.append(rotation.wasted - before)
        sizes = [block.packing.total for block in blocks]
    after = equal(call(), reference)
    return {
        "equal": [equal(out, reference) for out in outs],
        "after": after,
        "wasted": wasted,
        "blocks": len(blocks),
        "part": sum(sizes) / sum(p.nbytes for p in model.parameters()),
    }


def by_itself(case: Case, model: Any, reference: Any, mesh: Mesh, variants: list[tuple[str, bool]]) -> dict[str, Any]:
    """Every rank computes all of it."""

    def call() -> Any:
        args, kwargs = case.inputs()
        return forward_of(model)(*args, **kwargs)

    return {
        f"{kind} {'ahead' if prefetch else 'late'}": run(model, call, reference, mesh, kind, prefetch=prefetch)
        for kind, prefetch in variants
    }


def with_sequence(case: Case, model: Any, mesh: Mesh, variants: list[tuple[str, bool]]) -> dict[str, Any]:
    """The ranks share the tokens as well, in both granularities; or the rows of a UNet, which has none."""
    found = {}
    modes: list[str] = [mode for mode in ("trunk", "block") if mode in case.modes] or list(case.modes[:1])
    for granularity in modes if LARGE or case.family in FAST else modes[-1:]:
        installation = install(
            model,
            case.plan(model),
            mesh,
            kernel=kernels.chosen(mesh.parallel),
            granularity=granularity if granularity in ("trunk", "block") else None,  # type: ignore[arg-type]
        )

        def call(installation: Any = installation) -> Any:
            args, kwargs = case.inputs()
            return installation.wrapper(forward_of(model), *args, **kwargs)

        reference = call()
        for kind, prefetch in variants:
            name = f"{granularity} {kind} {'ahead' if prefetch else 'late'}"
            found[name] = run(model, call, reference, mesh, kind, prefetch=prefetch)
        installation.remove()
    return found


def changes_of_path(mesh: Mesh) -> dict[str, Any]:
    """Blocks that are left out, and come back: one gather in vain each time, and no wrong bit."""
    case = SPECIAL[1]
    model = built(case)

    def call(inputs: Any) -> Any:
        args, kwargs = inputs
        return forward_of(model)(*args, **kwargs)

    plain, without = call(case.plain()), call(case.inputs())
    good, wasted = [], []
    with divided(model, mesh, "sharded", prefetch=True) as (rotation, _):
        for inputs, reference in [
            (case.plain, plain),
            (case.inputs, without),
            (case.inputs, without),
            (case.plain, plain),
            (case.plain, plain),
        ]:
            before = rotation.wasted
            with rotation.call("forward"):
                good.append(equal(call(inputs()), reference))
            wasted.append(rotation.wasted - before)
    return {"equal": good, "wasted": wasted}


def goes_wrong(mesh: Mesh) -> dict[str, Any]:
    """Errors on every rank inside a block, weights that are read elsewhere, blocks inside blocks; then a good call."""
    case = SPECIAL[1]
    model = built(case)
    args, kwargs = case.plain()
    plain = forward_of(model)(*args, **kwargs)
    said: list[str] = []

    def fail(*_: Any) -> None:
        raise ValueError("in a block")

    def stray(*_: Any) -> None:
        model.blocks[2].self_attn.q.weight.sum()

    def nested(*inputs: Any) -> None:
        model.blocks[0](torch.zeros(1, 4, 60), e=torch.zeros(1, 1, 6, 60), freqs=None, context=None)

    with divided(model, mesh, "streamed", prefetch=True) as (rotation, blocks):
        for hook in (stray, nested, fail):
            handle = model.blocks[1].ffn.register_forward_pre_hook(hook)
            try:
                args, kwargs = case.plain()
                with rotation.call("forward"):
                    forward_of(model)(*args, **kwargs)
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
            handle.remove()
            stubs = all(leaf.host.untyped_storage().nbytes() > 0 for block in blocks for leaf in block.leaves)
            views = [p for block in blocks for p in block.module.parameters() if p.untyped_storage().nbytes() > 8]
            assert stubs and not views, "an error leaves views of the buffer"
        try:
            model.blocks[0].ffn[0].weight.data.add_(1)
        except RuntimeError as error:
            said.append(str(error))
        args, kwargs = case.plain()
        with rotation.call("forward"):
            good = equal(forward_of(model)(*args, **kwargs), plain)
    return {"said": said, "equal": good}


ALL = [(kind, prefetch) for kind in KINDS for prefetch in (True, False)]
AHEAD = ALL[::2]


def variants_of(case: Case, name: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Kinds with and without prefetch: by itself, and with the sequence divided as well."""
    if LARGE:
        return ALL, AHEAD
    if case.family not in FAST:
        return AHEAD, []
    return (ALL, AHEAD) if name == "u2" else (AHEAD, AHEAD[:1])


def ranks_of(case: Case) -> tuple[str, ...]:
    """The meshes that a case runs on."""
    return tuple(MESHES) if LARGE or case.family == FAST[0] else ("u2",)


def on_mesh(
    mesh: Mesh, *, case: Case, model: Any, reference: Any, variants: tuple[list[tuple[str, bool]], ...]
) -> dict[str, Any]:
    """A case in all its variants."""
    alone, together = variants
    return by_itself(case, model, reference, mesh, alone) | with_sequence(case, model, mesh, together)


def parity(rank: int, size: int, path: str, agreement: Agreement, *, name: str, prepared: list[Any]) -> dict[str, Any]:
    """Every case on one mesh; "broke" says why there is nothing of one."""
    ulysses, ring = MESHES[name]
    parallel = ParallelConfig(world=size, ulysses=ulysses, ring=ring, cfg=1, residency="sharded")

    def make(number: int) -> Mesh:
        return mesh_of(parallel, rank=rank, path=f"{path}{number}")

    jobs: dict[str, Callable[[Mesh], dict[str, Any]]] = {
        case.name: partial(on_mesh, case=case, model=model, reference=reference, variants=variants_of(case, name))
        for case, model, reference in prepared
    }
    jobs |= {"changes of path": changes_of_path, "goes wrong": goes_wrong}
    results: dict[str, Any] = {}
    with torch.inference_mode():
        parts = Parts(make, rank=rank, agreement=agreement)
        for title, job in jobs.items():
            results[title], well = parts.run(job)
            if not well:
                results[title].setdefault("broke", "another rank did not come through with as many collectives")
        parts.close()
    return results


def main(root: str, result: str, pattern: str = "*") -> None:
    """Compute the references, then all ranks' results, and write them down."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    enter_comfy(root)
    prepared: list[tuple[Case, Any, Any]] = []
    unbuilt: dict[str, Any] = {}
    with torch.inference_mode():
        for case in chosen(pattern):
            try:
                model = built(case)
                args, kwargs = case.inputs()
                prepared.append((case, model, forward_of(model)(*args, **kwargs)))
            except Exception:
                unbuilt[case.name] = {"broke": traceback.format_exc()}
    found: dict[str, dict[int, Any]] = {}
    for name, (ulysses, ring) in MESHES.items():
        size, there = ulysses * ring, [each for each in prepared if name in ranks_of(each[0])]
        ranks = fork(size, partial(parity, name=name, prepared=there), agreement=Agreement(size))
        found[name] = {
            rank: {**table, **unbuilt} if isinstance(table, dict) else table for rank, table in ranks.items()
        }
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:4])
