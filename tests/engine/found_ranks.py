"""Finds and proves plans of ComfyUI's real classes, and runs them over gloo: `python -m engine.found_ranks ROOT OUT`.

More arguments are patterns of names of cases. The report has for each what was found, and for 2, 3 and 5 ranks how far
every rank is from the model alone: for the inputs of the case, and for all that were made longer.
"""

from __future__ import annotations

import fnmatch
import logging
import sys
import time
import traceback
from typing import Any

import torch
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.found import find as found
from comfy_raylight.raylight.found import proof
from comfy_raylight.raylight.found.source import source
from comfy_raylight.raylight.found.values import Refused, copied
from comfy_raylight.raylight.install import install
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.workers.worker import unplanned as unplanned_worker

from . import families, unplanned
from .case import Case
from .ranks import difference, enter_comfy, fork, forward_of, mesh_of, same_on_all, write

SIZES = (2, 3, 5)
CASES = (*unplanned.CASES, *families.CASES)


def able(case: Case) -> bool:
    """Whether it is of a kind that finding is for: tokens of a plain model in fp32."""
    return not (case.wrong or case.raises or case.half or case.change or case.family == "UNetModel")


def examine(case: Case) -> dict[str, Any]:
    """What is found for one case; with what ranks need of it, where it is proved."""
    # not in inference mode, so that ranks may run what was made here
    with torch.no_grad():
        model = case.build().requires_grad_(False)
    forward, start = forward_of(model), time.perf_counter()
    try:
        known = found.find(model, forward, case.inputs())
        held = proof.prove(model, forward.__name__, known.plan, known.inputs)
    except Refused as why:
        return {"family": case.family, "refused": str(why)}
    with torch.no_grad():
        wanted = [forward(*args, **kwargs) for args, kwargs in map(copied, known.inputs)]
    return {
        "family": case.family,
        "error": held.error,
        "share": held.share,
        "notes": [*known.notes, *held.notes],
        "seconds": time.perf_counter() - start,
        "plan": source(held.plan),
        "run": (model, held.plan, known.inputs, wanted),
    }


def on_gloo(rank: int, size: int, path: str, prepared: dict[str, Any]) -> dict[str, Any]:
    """Each proved plan on real ranks: its largest error, and whether all ranks have the same bytes."""
    results: dict[str, Any] = {}
    mesh = mesh_of(ParallelConfig(world=size, ulysses=size, ring=1, cfg=1), rank=rank, path=path)
    for name, (model, plan, every, wanted) in prepared.items():
        installation, errors, same = install(model, plan, mesh), [], []
        before = mesh.collectives
        with torch.no_grad():
            for (args, kwargs), whole in zip(map(copied, every), wanted, strict=True):
                out = installation.wrapper(forward_of(model), *args, **kwargs)
                errors.append(difference(out, whole))
                same.append(same_on_all(out, mesh))
        results[name] = {"error": max(errors), "same": all(same), "collectives": mesh.collectives - before}
        installation.remove()
        if size == SIZES[0]:
            results[name]["worker"] = on_worker(mesh, model, every, wanted)
    mesh.close()
    return results


def on_worker(mesh: Mesh, model: torch.nn.Module, every: Any, wanted: Any) -> dict[str, Any]:
    """The same calls, each twice, as a worker makes them that was given no plan."""
    forward = forward_of(model)
    alone, errors, exchanges = unplanned_worker.Unplanned(model, mesh, None, grain=4), [], []
    for (args, kwargs), whole in [pair for pair in zip(every, wanted, strict=True) for _ in range(2)]:
        before = mesh.collectives
        with torch.inference_mode():
            out = alone.run(forward.__name__, lambda f, a, k: f(*a, **k), copied((args, kwargs)), state="")
        errors.append(difference(out, whole))
        exchanges.append(mesh.collectives - before)
    said = [text for _, text in alone.lines()]
    alone.close()
    return {"error": max(errors), "shared": exchanges, "said": said}


def one_of_each() -> tuple[str, ...]:
    """The first case of each family that has a written plan, and all of those that have none."""
    first = {case.family: case.name for case in reversed(families.CASES) if able(case)}
    return (*(case.name for case in unplanned.CASES), *first.values())


def main(root: str, out: str, *patterns: str) -> int:
    """Write the report."""
    torch.set_num_threads(1)
    enter_comfy(root)
    logging.disable(logging.WARNING)
    report: dict[str, Any] = {"absent": [], "found": {}}
    prepared = {}
    for case in CASES:
        if not able(case) or not any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns or one_of_each()):
            continue
        if not case.available():
            report["absent"].append(case.name)
            continue
        try:
            report["found"][case.name] = entry = examine(case)
        except Exception:
            report["found"][case.name] = entry = {"family": case.family, "raised": traceback.format_exc()}
        if "run" in entry:
            prepared[case.name] = entry.pop("run")
        sys.stdout.write(f"{case.name}: {entry}\n")
        sys.stdout.flush()
    report["ranks"] = {size: fork(size, on_gloo, prepared) for size in SIZES}
    write(out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
