"""Runs the engine on P ranks over gloo, all in one command: `python -m engine.ranks COMFYUI_ROOT RESULTS [CASES]`.

With "" for the root the collectives run by themselves, else all cases whose names match the pattern. The
ranks are forked from one process that has imported everything and computed the references, since importing
ComfyUI once per rank would take longer than all cases. Results are one JSON object.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
import zlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from comfy_raylight.patches.control import control_plan_for
from comfy_raylight.raylight import cost, kernels
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.hooks import install
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.tests.host.host_waits import HostWaits
from comfy_raylight.tests.host.large import LARGE

from . import collectives, row_bytes
from .case import Case, cast
from .families import CASES, even

MESHES: dict[str, tuple[int, int]] = {
    "u2": (2, 1),
    "u3": (3, 1),
    "u5": (5, 1),
    "u8": (8, 1),
    "r2": (1, 2),
    "r3": (1, 3),
    "u2r2": (2, 2),
    "u4r2": (4, 2),
}
"""Ulysses and ring degrees by name; a case's `meshes` are some of these."""
ALWAYS = ("u2",)
"""Whether every case runs on all of its meshes; by default on ALWAYS, and on one of the others by its name."""
GROUPS = (2, 3, 8)
"""World sizes at which the collectives run by themselves."""
TIMEOUT = timedelta(seconds=60)
SWITCHES: dict[str, dict[str, Any]] = {
    "synced": {"sync_ulysses": True},
    "turns": {"overlap": 3},
    "kernel": {"attention": "TORCH_MATH"},
}


def meshes_of(case: Case) -> tuple[str, ...]:
    """The meshes that a case runs on."""
    if not (case.every or LARGE):
        return ()
    found = case.meshes or tuple(MESHES)
    others = [name for name in found if name not in ALWAYS]
    if LARGE or case.all_meshes or case in even.CASES or not others:
        return found
    one = others[zlib.crc32(case.name.encode()) % len(others)]
    return tuple(name for name in found if name in (*ALWAYS, one))


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


def leaves(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output: one, a list of several, or the residuals of a ControlNet."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [leaf for part in parts for leaf in leaves(part)]


def difference(output: Any, reference: Any) -> float:
    """Maximum error relative to the maximum of the reference, over all tensors."""
    pairs = zip(map(torch.Tensor.float, leaves(output)), map(torch.Tensor.float, leaves(reference)), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs if b.numel())


def same_on_all(output: Any, mesh: Mesh) -> bool:
    """Whether every rank has rank 0's bytes."""
    different = sum((leaf != mesh.control.broadcast(leaf)).any().int() for leaf in leaves(output))
    return mesh.control.all_reduce(torch.as_tensor(different), op="max").item() == 0


def run_case(case: Case, model: Any, reference: Any, mesh: Mesh, mode: str) -> dict[str, Any]:
    """One case in one mode against the single-process output."""
    used = copy.copy(mesh)
    used.parallel = dataclasses.replace(mesh.parallel, **SWITCHES.get(mode, {}))
    granularity: Any = mode if mode in ("trunk", "block") else None
    installation = install(model, case.plan(model), used, kernel=kernels.chosen(used.parallel), granularity=granularity)
    before, sent = mesh.collectives, mesh.bytes
    result: dict[str, Any] = {}
    try:
        args, kwargs = case.inputs()
        if mode == "wrapped":
            # as ComfyUI itself would call it
            wrappers = {"diffusion_model": {"raylight": [installation.wrapper]}}
            kwargs["transformer_options"] = {**kwargs.get("transformer_options", {}), "wrappers": wrappers}
            out = model(*args, **kwargs)
        elif mesh.rank == 0 and mode == case.modes[0]:
            with HostWaits() as waits:
                out = installation.wrapper(forward_of(model), *args, **kwargs)
            result["asked"], result["brought"] = sorted(waits.asked), sorted(waits.brought)
        else:
            out = installation.wrapper(forward_of(model), *args, **kwargs)
        result["sent"] = {kind: count - sent.get(kind, 0) for kind, count in mesh.bytes.items()}
        result["least"] = least_bytes(installation, mesh)
        result["error"] = difference(out, reference)
        result["bytes"] = float(sum(leaf.double().sum().item() for leaf in leaves(out))).hex()
        result["same"] = same_on_all(out, mesh)
    except Exception as problem:
        result.update(raised=type(problem).__name__, text=str(problem))
        if case.raises or case.ring_raises:
            # the next forward must start clean
            args, kwargs = case.plain()
            out = installation.wrapper(forward_of(model), *args, **kwargs)
            installation.remove()
            args, kwargs = case.plain()
            result["clean"] = difference(out, forward_of(model)(*args, **kwargs))
        elif not case.wrong:
            raise
    finally:
        installation.remove()
    result["collectives"] = mesh.collectives - before
    return result


def least_bytes(installation: Any, mesh: Mesh) -> dict[str, float]:
    """What the last forward's attentions and exits have to send from one rank, in closed form."""
    works, axes = installation.works.values(), mesh.parallel.degrees
    return {
        "attention": sum(cost.attention_bytes(w, ulysses=axes["ulysses"], ring=axes["ring"]) for w in works),
        "exit": sum(cost.exit_bytes(w, ranks=mesh.sequence.size) for w in works),
    }


def forward_of(model: Any) -> Any:
    """What a worker runs: the forward below ComfyUI's wrappers."""
    return model.forward if control_plan_for(model) else getattr(model, "_forward", model.forward)


def parity(rank: int, size: int, path: str, name: str, prepared: list[Any]) -> dict[str, Any]:
    """Every case that runs on a mesh, in all of its modes."""
    ulysses, ring = MESHES[name]
    mesh = mesh_of(ParallelConfig(world=size, ulysses=ulysses, ring=ring, cfg=1), rank=rank, path=path)
    results: dict[str, Any] = {}
    # as ComfyUI runs prompts
    with torch.inference_mode():
        for case, model, reference in prepared:
            if name in meshes_of(case):
                modes = case.modes_on(name, size)
                try:
                    results[case.name] = {m: run_case(case, model, reference, mesh, m) for m in modes}
                except Exception as error:
                    error.add_note(f"in {case.name} on {name}")
                    raise
    # one that leaves early would break connections that others still make
    mesh.control.all_reduce(torch.zeros(1))
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
            return dict(results.get(timeout=900) for _ in processes)
        finally:
            for process in processes:
                process.join(10)
                process.kill()


def reference_of(case: Case) -> tuple[Any, Any]:
    """The case's model, and what it returns in one process."""
    model = case.build()
    assert type(model).__name__ == case.family, (case.name, type(model))
    args, kwargs = case.inputs()
    return model, None if case.raises else forward_of(model)(*args, **kwargs)


def noise_of(case: Case, reference: Any) -> float:
    """What computing in bf16 does to a case's output: its distance from the same weights and inputs in fp32."""
    args, kwargs = case.inputs()
    args, kwargs = cast(args, torch.float32), cast(kwargs, torch.float32)
    return difference(reference, forward_of(case.build().float())(*args, **kwargs))


ALONE = {"wan_t2v": ("TORCH", "TORCH_MATH"), "wan_override": ("TORCH",), "flux": ("TORCH", "TORCH_MATH")}
"""Cases that also run on a mesh of one process, and the kernels they run with."""


def one_process(prepared: list[tuple[Case, Any, Any]]) -> dict[str, float]:
    """Errors on one process without torch.distributed: the engine must change nothing, or only the kernel."""
    results = {}
    with torch.inference_mode():
        for case, model, reference in prepared:
            for attention in ALONE.get(case.name, ()):
                mesh = Mesh.single(ParallelConfig(world=1, attention=attention))
                installation = install(model, case.plan(model), mesh, kernel=kernels.chosen(mesh.parallel))
                args, kwargs = case.inputs()
                out = installation.wrapper(forward_of(model), *args, **kwargs)
                installation.remove()
                results[f"{case.name}-{attention}"] = difference(out, reference)
    return results


def main(root: str, result: str, chosen: str = "*") -> None:
    """Compute the chosen cases' references, then all ranks' results, and write them down."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    everything: dict[str, Any] = {}
    if root:
        enter_comfy(root)
        prepared: list[tuple[Any, Any, Any]] = []
        # inference mode throughout, as ComfyUI runs prompts: tensors made in it cannot be used outside
        with torch.inference_mode():
            for case in CASES:
                if meshes_of(case) and case.available() and fnmatch.fnmatch(case.name, chosen):
                    prepared.append((case, *reference_of(case)))
            everything["noise"] = {case.name: noise_of(case, reference) for case, _, reference in prepared if case.half}
        everything["alone"] = one_process(prepared)
        with torch.inference_mode():
            built = {name: (build(), make) for name, (build, make) in row_bytes.MODELS.items()}
        everything["rows"] = {size: fork(size, row_bytes.job, built) for size in row_bytes.SIZES}
        everything["ranks"] = {
            name: fork(ulysses * ring, parity, name, prepared) for name, (ulysses, ring) in MESHES.items()
        }
    else:
        everything["ranks"] = {size: fork(size, alone) for size in GROUPS}
    with open(result, "w", encoding="utf-8") as file:
        json.dump(everything, file)


if __name__ == "__main__":
    main(*sys.argv[1:4])
