"""Runs the engine on P ranks over gloo: `python -m engine.ranks RESULTS [COMFYUI_ROOT]`, one process per ComfyUI.

Without a ComfyUI root the collectives run by themselves, else all cases do. The ranks are forked from one
process that has imported everything and computed the references, since importing ComfyUI once per rank
would take longer than all cases. Results are one JSON object.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.hooks import install
from comfy_raylight.raylight.mesh import Mesh

from . import cases, collectives

RANKS = (2, 3, 8)
TIMEOUT = timedelta(seconds=60)
SWITCHES: dict[str, dict[str, Any]] = {
    "packed": {"pack_qkv": True},
    "synced": {"sync_ulysses": True},
    "kernel": {"attention": "TORCH_MATH"},
}


def enter_comfy(root: str) -> None:
    """Make this process's `comfy` the one at `root`, on the CPU."""
    sys.path.insert(0, root)
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True


def mesh_of(parallel: ParallelConfig, *, rank: int, path: str) -> Mesh:
    """Join a gloo mesh through a file that no other mesh uses."""
    store = dist.FileStore(path, parallel.world)
    return Mesh.create(parallel, rank=rank, store=store, backend="gloo", timeout=TIMEOUT)


def run_case(case: cases.Case, model: Any, reference: Any, mesh: Mesh, mode: str) -> dict[str, Any]:
    """One case in one mode against the single-process output."""
    used = copy.copy(mesh)
    used.parallel = dataclasses.replace(mesh.parallel, **SWITCHES.get(mode, {}))
    granularity: Any = mode if mode in ("trunk", "block") else None
    installation = install(model, case.plan(type(model)), used, granularity=granularity)
    before = mesh.collectives
    result: dict[str, Any] = {}
    try:
        args, kwargs = case.inputs()
        if mode == "wrapped":
            # as ComfyUI itself would call it
            wrappers = {"diffusion_model": {"raylight": [installation.wrapper]}}
            kwargs["transformer_options"] = {**kwargs.get("transformer_options", {}), "wrappers": wrappers}
            out = model(*args, **kwargs)
        else:
            out = installation.wrapper(model._forward, *args, **kwargs)
        result["error"] = ((out - reference).abs().max() / reference.abs().max()).item()
        result["bytes"] = out.double().sum().item().hex()
        different = (out != mesh.control.broadcast(out)).any().int()
        result["same"] = mesh.control.all_reduce(different, op="max").item() == 0
    except Exception as problem:
        result.update(raised=type(problem).__name__, text=str(problem))
        if case.raises:
            # the next forward must start clean
            args, kwargs = copy.deepcopy(case.base())
            out = installation.wrapper(model._forward, *args, **kwargs)
            installation.remove()
            result["clean"] = ((out - model(*args, **kwargs)).abs().max() / out.abs().max()).item()
        elif not case.wrong:
            raise
    finally:
        installation.remove()
    result["collectives"] = mesh.collectives - before
    return result


def parity(rank: int, size: int, path: str, prepared: list[Any]) -> dict[str, Any]:
    """Every case that runs on `size` ranks, in all of its modes."""
    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    results: dict[str, Any] = {}
    # as ComfyUI runs prompts
    with torch.inference_mode():
        for case, model, reference in prepared:
            if size in case.ranks:
                results[case.name] = {m: run_case(case, model, reference, mesh, m) for m in case.modes_on(size)}
    mesh.close()
    return results


def alone(rank: int, size: int, path: str) -> dict[str, Any]:
    """The collectives and Ulysses on `size` ranks, then the same ranks as a grid."""
    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    results = collectives.check(mesh)
    mesh.close()
    mesh.close()
    if size == 8:
        parallel = ParallelConfig(world=8, ulysses=2, ring=1, cfg=2)
        mesh = mesh_of(parallel, rank=rank, path=path + "-grid")
        results |= collectives.check_grid(mesh)
        mesh.close()
    return results


def work(rank: int, results: Any, job: Any, *args: Any) -> None:
    """One forked rank: put (rank, what the job returns, or a traceback) into `results`."""
    torch.set_num_threads(1)
    try:
        results.put((rank, job(rank, *args)))
    except Exception:
        results.put((rank, traceback.format_exc()))


def fork(size: int, job: Any, *extra: Any) -> dict[int, Any]:
    """Run a job on `size` ranks; what each returned, by rank."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        processes = [
            context.Process(target=work, args=(rank, results, job, size, path, *extra)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            return dict(results.get(timeout=150) for _ in processes)
        finally:
            for process in processes:
                process.join(10)
                process.kill()


def main(result: str, root: str) -> None:
    """Compute all references, then all ranks' results, and write them down."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    everything: dict[str, Any] = {}
    if root:
        enter_comfy(root)
        prepared: list[tuple[Any, Any, Any]] = []
        with torch.no_grad():
            for case in cases.available():
                model = case.model()
                args, kwargs = case.inputs()
                prepared.append((case, model, None if case.raises else model(*args, **kwargs)))
        everything["alone"] = cases.alone(prepared)
        everything["ranks"] = {size: fork(size, parity, prepared) for size in RANKS}
    else:
        everything["ranks"] = {size: fork(size, alone) for size in RANKS}
    with open(result, "w", encoding="utf-8") as file:
        json.dump(everything, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
