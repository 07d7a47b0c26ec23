"""Every family's parity cases on GPUs: the tests' models and inputs, fp32 and bf16, N processes against one.

    python benchmarks/gpu/families.py --comfy ROOT [--gpus 2,4] [--only PATTERN] [--recorded]

Run it with a Python that has ComfyUI's packages; it installs nothing. The cases are those of tests/engine that ask for
equality. Each process computes the plain output on its own GPU as well. An error is the largest difference over the
largest value. fp32 must stay within 1e-5; bf16 within twice what bf16 does to the plain model, or 1 % where that is
less. With --recorded a case is called with other values first, as often as it takes to be recorded, and then repeated
with its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import ROOT, mesh_of, spawn
from tables import Table

TOLERANCE = 1e-5
LEAST = 1e-2
"""What is allowed in bf16 where its own noise is smaller."""
CALLS = 4
"""Until a call is recorded: the first ones may take long, and three that do are given up."""


@dataclass(frozen=True)
class Options:
    """One run of all processes."""

    comfy: str
    size: int
    only: str
    recorded: bool


def main() -> int:
    """Compare and print a table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("--gpus", default="2", help="how many, comma-separated")
    parser.add_argument("--only", default="*", help="cases whose names match")
    parser.add_argument("--recorded", action="store_true", help="repeat recorded calls")
    parser.add_argument("--table", default="families", help="name of its JSON file")
    given = parser.parse_args()
    columns = [
        "GPUs",
        "mesh",
        "cases",
        "bit-equal",
        "worst fp32",
        "where",
        "in bf16",
        "worst bf16",
        "where in bf16",
        "recorded",
        "failed",
    ]
    table = Table(given.table, columns, worst=".1e")
    failed: list[str] = []
    for size in map(int, given.gpus.split(",")):
        ranks = spawn(size, on_rank, Options(str(given.comfy.resolve()), size, given.only, given.recorded))
        for mesh in ranks[0]:
            found: dict[str, dict[str, Any]] = {}
            for rank in ranks:
                for name, result in rank[mesh].items():
                    known = found.setdefault(name, dict(result))
                    known.update({key: max(known[key], result[key]) for key in ("fp32", "bf16", "over")})
                    known["problem"] = known["problem"] or result["problem"]
            wrong = [
                f"{name} ({result['problem'] or result})"
                for name, result in found.items()
                if result["problem"] or not (result["fp32"] <= TOLERANCE and result["over"] <= 1)
            ]
            worst = {key: max(found, key=lambda name: found[name][key]) for key in ("fp32", "bf16")}
            equal = sum(result["fp32"] == 0 for result in found.values())
            half = sum(result["half"] for result in found.values())
            cells = [(found[worst[key]][key], worst[key]) for key in ("fp32", "bf16")]
            recorded = sum(result["recorded"] for result in found.values())
            table.row(size, mesh, len(found), equal, *cells[0], half, *cells[1], recorded, len(wrong))
            failed += [f"{size} {mesh}: {text}" for text in wrong]
    print("\n".join(failed))
    return int(bool(failed))


def on_rank(rank: int, store: str, options: Options) -> dict[str, Any]:
    """Errors of every case on every mesh."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from comfy_raylight.raylight.config import ParallelConfig
    from comfy_raylight.tests.engine.families import CASES

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    world = options.size
    torch.set_num_threads(1)
    # cuDNN rounds fp32 to 10 bits by default, of strips and of the whole as it likes
    torch.backends.cudnn.allow_tf32 = False
    meshes = {"ulysses": (world, 1), "ring": (1, world)}
    if world == 4:
        meshes["ulysses 2, ring 2"] = (2, 2)
    chosen = [
        case
        for case in CASES
        if case.every and not (case.wrong or case.raises or case.half or case.change)
        and case.available() and fnmatch.fnmatch(case.name, options.only)
    ]  # fmt: skip
    found: dict[str, Any] = {}
    with torch.inference_mode():
        prepared = [(case, plain) for case in chosen if (plain := plain_of(case, device))]
        for name, (ulysses, ring) in meshes.items():
            parallel = ParallelConfig(world=world, ulysses=ulysses, ring=ring, cfg=1)
            mesh = mesh_of(parallel, rank, f"{store}-{name}")
            found[name] = {
                case.name: errors(plain, mesh, device, recorded=options.recorded)
                for case, plain in prepared
                if ring == 1 or not (case.ring_raises or (case.meshes and "r" not in "".join(case.meshes)))
            }
            mesh.control.all_reduce(torch.zeros(1))
            mesh.close()
    return found


def plain_of(case: Any, device: Any) -> list[tuple[Any, Any, Any]]:
    """The case in fp32 and in bf16, each with its model on the device and the output there.

    bf16 is missing where the plain model cannot compute these inputs in it, and both where a case keeps tensors of
    its own on the CPU, or needs a package that is not there.
    """
    from comfy_raylight.tests.engine.ranks import forward_of

    found = []
    for form in (case, dataclasses.replace(case, half=True)):
        try:
            model = form.build().to(device)
            args, kwargs = inputs(form, device)
            found.append((form, model, forward_of(model)(*args, **kwargs)))
        except (ImportError, RuntimeError, TypeError) as error:
            if not form.half and not isinstance(error, ImportError) and "same device" not in str(error):
                raise
            break
    return found


def inputs(case: Any, device: Any) -> Any:
    """A fresh set on the device."""
    from comfy_raylight.raylight.cfg import mapped

    return mapped(case.inputs(), lambda item: item.to(device) if hasattr(item, "to") else item)


def other(given: Any) -> Any:
    """The same shapes with other values, where those are numbers and not indices."""
    import torch
    from comfy_raylight.raylight.cfg import mapped

    def changed(item: Any) -> Any:
        return item * 0.75 if isinstance(item, torch.Tensor) and item.is_floating_point() else item

    return mapped(given, changed)


def errors(plain: list[tuple[Any, Any, Any]], mesh: Any, device: Any, *, recorded: bool) -> dict[str, Any]:
    """Differences to the plain outputs; `over` is bf16's over what is allowed, `recorded` of the calls were."""
    import torch
    from comfy_raylight.raylight.install import install
    from comfy_raylight.raylight.sequence import kernels
    from comfy_raylight.tests.engine.ranks import difference, forward_of
    from comfy_raylight.workers.worker.recorded import Recordings

    result: dict[str, Any] = {"fp32": 0.0, "bf16": 0.0, "over": 0.0, "problem": "", "half": len(plain) > 1}
    result["recorded"] = 0
    for case, model, reference in plain:
        installation = install(model, case.plan(model), mesh, kernel=kernels.chosen(mesh.parallel, device=device))
        recordings = Recordings(device, mesh.sequence, mesh.control_of(mesh.sequence))

        def call(*args: Any, model: Any = model, installation: Any = installation, **kwargs: Any) -> Any:
            return installation.wrapper(forward_of(model), *args, **kwargs)

        try:
            for _ in range(CALLS if recorded else 0):
                args, kwargs = other(inputs(case, device))
                recordings.run(call, call, args, kwargs, state=None)
            args, kwargs = inputs(case, device)
            output = recordings.run(call, call, args, kwargs, state=None) if recorded else call(*args, **kwargs)
            result["bf16" if case.half else "fp32"] = difference(output, reference)
            result["recorded"] += recordings.count
        except torch.AcceleratorError as error:
            raise RuntimeError(f"{case.name} has lost the device") from error  # as it is for all that follows
        except Exception as error:
            result["problem"] = f"{type(error).__name__}: {error} {traceback.format_exc(limit=-2)}"
        finally:
            recordings.clear()
            installation.remove()
    if result["half"]:
        (_, _, exact), (_, _, rounded) = plain
        result["over"] = result["bf16"] / max(2 * difference(rounded, exact), LEAST)
    return result


if __name__ == "__main__":
    sys.exit(main())
