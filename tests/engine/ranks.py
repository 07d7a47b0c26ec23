"""Runs the engine on P ranks over gloo, all in one command: `python -m engine.ranks COMFYUI_ROOT RESULTS [CASES]`.

With "" for the root the collectives run by themselves, else all cases whose names match the pattern. The
ranks are forked from one process that has imported everything and computed the references, since importing
ComfyUI once per rank would take longer than all cases. Results are one JSON object. What is wrong is printed,
and the exit code is 1 then: a case that cannot be built or that raises is one wrong case, and all others run.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import gc
import json
import logging
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from comfy_raylight.patches.control import control_plan_for
from comfy_raylight.raylight import cost
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.install import install
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.sequence import kernels
from comfy_raylight.tests.host.host_waits import HostWaits

from . import collectives, row_bytes
from .case import UNEQUAL, Case, cast
from .families import CASES
from .in_step import Agreement, Parts
from .meshes import ALONE, MESHES, meshes_of
from .verdicts import summary

GROUPS = (2, 3, 8)
"""World sizes at which the collectives run by themselves."""
TIMEOUT = timedelta(seconds=60)
FINISH_S = 900.0
"""Bound of all that is run on one mesh."""
SWITCHES: dict[str, dict[str, Any]] = {
    "synced": {"sync_ulysses": True},
    "turns": {"overlap": 3},
    "kernel": {"attention": "TORCH_MATH"},
}

SPEEDS = (1.7, 1.0, 3.1, 0.6, 1.0, 1.0, 2.2, 0.9)
"""Of ranks that are not alike."""


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


def run_case(mesh: Mesh, *, case: Case, model: Any, reference: Any, mode: str) -> dict[str, Any]:
    """One case in one mode against the single-process output; it may raise on any of the ranks."""
    used = copy.copy(mesh)
    switches = {"speeds": SPEEDS[: mesh.parallel.world]} if mode == UNEQUAL else SWITCHES.get(mode, {})
    used.parallel = dataclasses.replace(mesh.parallel, **switches)
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
        if not (case.raises or case.ring_raises):
            raise
        result.update(raised=type(problem).__name__, text=str(problem))
        # the next forward must start clean
        args, kwargs = case.plain()
        out = installation.wrapper(forward_of(model), *args, **kwargs)
        installation.remove()
        args, kwargs = case.plain()
        result["clean"] = difference(out, forward_of(model)(*args, **kwargs))
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


def parity(
    rank: int, size: int, path: str, agreement: Agreement, *, name: str, prepared: list[Any]
) -> dict[str, dict[str, Any]]:
    """Every case on one mesh, in its modes up to the first that goes wrong on any rank."""
    ulysses, ring = MESHES[name]
    parallel = ParallelConfig(world=size, ulysses=ulysses, ring=ring, cfg=1)

    def make(number: int) -> Mesh:
        return mesh_of(parallel, rank=rank, path=f"{path}{number}")

    results: dict[str, dict[str, Any]] = {}
    # as ComfyUI runs prompts
    with torch.inference_mode():
        parts = Parts(make, rank=rank, agreement=agreement)
        for case, model, reference in prepared:
            found = results[case.name] = {}
            for mode in case.modes_on(name, size):
                run = partial(run_case, case=case, model=model, reference=reference, mode=mode)
                found[mode], well = parts.run(run)
                if not (well or case.wrong):
                    break
        parts.close()
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
    # what came with the fork is there to stay: collections in this process need not look at it, nor copy its pages
    gc.freeze()
    try:
        results.put((rank, job(rank, *args)))
    except Exception:
        results.put((rank, traceback.format_exc()))


def fork(size: int, job: Any, *extra: Any, agreement: Agreement | None = None) -> dict[int, Any]:
    """Run a job on `size` ranks; what each returned, by rank, or a text that says why it did not.

    Args:
        agreement: of the ranks, which hear by it of one that is gone; the job gets it after `extra`.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    if agreement is not None:
        extra = (*extra, agreement)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        processes = [
            context.Process(target=work, args=(rank, results, job, size, path, *extra)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        end = time.monotonic() + FINISH_S
        try:
            while len(found) < size:
                # before the look: what they had to say is there by now
                ended = [rank for rank, process in enumerate(processes) if not process.is_alive()]
                try:
                    rank, result = results.get(timeout=1)
                    found[rank] = result
                except queue.Empty:
                    late = range(size) if time.monotonic() > end else ended
                    for rank in set(late) - found.keys():
                        code = processes[rank].exitcode
                        why = f"ended with code {code}" if rank in ended else f"did not finish in {FINISH_S:.0f} s"
                        found[rank] = f"rank {rank} {why}"
                        if agreement is not None:
                            agreement.leave()
            return dict(sorted(found.items()))
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


def one_process(prepared: list[tuple[Case, Any, Any]]) -> dict[str, float | str]:
    """Errors on one process without torch.distributed: the engine must change nothing, or only the kernel."""
    results: dict[str, float | str] = {}
    with torch.inference_mode():
        for case, model, reference in prepared:
            for attention in ALONE.get(case.name, ()):
                try:
                    results[f"{case.name}-{attention}"] = single(case, model, reference, attention)
                except Exception:
                    results[f"{case.name}-{attention}"] = traceback.format_exc()
    return results


def single(case: Case, model: Any, reference: Any, attention: str) -> float:
    """The error of one case with one kernel on a mesh of this process."""
    mesh = Mesh.single(ParallelConfig(world=1, attention=attention))
    installation = install(model, case.plan(model), mesh, kernel=kernels.chosen(mesh.parallel))
    try:
        args, kwargs = case.inputs()
        return difference(installation.wrapper(forward_of(model), *args, **kwargs), reference)
    finally:
        installation.remove()


def rows() -> dict[str, dict[int, Any]]:
    """What ranks that share a picture send, by model and number of ranks; a text where a model is not to be built."""
    found: dict[str, dict[int, Any]] = {}
    for name, (build, make) in row_bytes.MODELS.items():
        try:
            with torch.inference_mode():
                model = build()
        except Exception:
            why = traceback.format_exc()
            found[name] = {size: {0: why} for size in row_bytes.SIZES}
        else:
            found[name] = {size: fork(size, row_bytes.job, model, make) for size in row_bytes.SIZES}
    return found


def prepare(cases: Sequence[Case]) -> tuple[list[tuple[Case, Any, Any]], dict[str, Any]]:
    """Models and references of all that can be built, and of the others why not; the noise of those in bf16."""
    prepared: list[tuple[Case, Any, Any]] = []
    about: dict[str, Any] = {"noise": {}, "absent": [], "unbuilt": {}}
    # inference mode throughout, as ComfyUI runs prompts: tensors made in it cannot be used outside
    with torch.inference_mode():
        for case in cases:
            try:
                if not case.available():
                    about["absent"].append(case.name)
                    continue
                model, reference = reference_of(case)
                if case.half:
                    about["noise"][case.name] = noise_of(case, reference)
            except Exception:
                about["unbuilt"][case.name] = traceback.format_exc()
            else:
                prepared.append((case, model, reference))
    return prepared, about


def compare(root: str, cases: Sequence[Case]) -> dict[str, Any]:
    """Compute the references of cases with the ComfyUI at `root`, then all ranks' results."""
    enter_comfy(root)
    prepared, report = prepare(cases)
    report["alone"] = one_process(prepared)
    report["ranks"] = {}
    for name, (ulysses, ring) in MESHES.items():
        size, there = ulysses * ring, [each for each in prepared if name in meshes_of(each[0])]
        job = partial(parity, name=name, prepared=there)
        report["ranks"][name] = fork(size, job, agreement=Agreement(size))
    return report


def main(root: str, result: str, chosen: str = "*") -> int:
    """Run what is asked for, write it down, say what is wrong; 1 if anything is."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if not root:
        write(result, {"ranks": {size: fork(size, alone) for size in GROUPS}})
        return 0
    cases = [case for case in CASES if meshes_of(case) and fnmatch.fnmatch(case.name, chosen)]
    report = compare(root, cases)
    report["rows"] = rows()
    return judge(cases, write(result, report))


def write(path: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Write a report, and return it as those read it who load the file."""
    text = json.dumps(report)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    found: dict[str, Any] = json.loads(text)
    return found


def judge(cases: Sequence[Case], report: Mapping[str, Any]) -> int:
    """Print which cases are right and which are not; 1 if any is wrong or cannot be built."""
    found = summary(cases, report)
    sys.stdout.write(found.text())
    return int(found.bad)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
