"""Goes wrong in every way a new ComfyUI may make cases go wrong: `python -m engine.unsteady ROOT RESULTS`.

The report is that of `ranks` on CASES, and of `in_step` on PARTS.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.mesh import Mesh

from .case import Case, build, without
from .families import wan
from .in_step import Agreement, Parts
from .ranks import compare, fork, judge, mesh_of, write

ON = ("u2", "u3")
GOOD = next(case for case in wan.CASES if case.name == "wan_t2v")


def failing(fail: Callable[[], None]) -> Any:
    """A small Wan in whose second block something happens."""
    model: Any = wan.wan()
    model.blocks[1].ffn.register_forward_pre_hook(lambda *_: fail())
    return model


def on_last_rank() -> None:
    """Raises there, while the others go on to the next collective and wait."""
    if dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("on the last rank alone")


def on_every_rank() -> None:
    if dist.is_initialized():
        raise ValueError("on every rank")


def dies() -> None:
    """One rank of three ends as if the system had killed it."""
    if dist.is_initialized() and dist.get_rank() == 1 and dist.get_world_size() == 3:
        os._exit(9)


def unknown_parameter() -> torch.nn.Module:
    return build("comfy.ldm.wan.model.WanModel", {"nobody_knows_this": 1})


def case(name: str, **changed: Any) -> Case:
    return replace(GOOD, name=name, meshes=ON, modes=("trunk", "block"), **changed)


CASES = (
    case("unbuilt", model=unknown_parameter),
    case("last_rank", model=partial(failing, on_last_rank)),
    case("every_rank", model=partial(failing, on_every_rank)),
    case("right"),
    case("differs", change=partial(without, attention=False)),
    case("absent", needs=("comfy.no_such_module", "")),
    case("dies", model=partial(failing, dies)),
    case("after"),
)


def all_reduced(mesh: Mesh) -> dict[str, Any]:
    return {"sum": mesh.axis("world").all_reduce(torch.ones(1)).item()}


def raises_on(ranks: tuple[int, ...], mesh: Mesh) -> dict[str, Any]:
    if mesh.rank in ranks:
        raise ValueError("here")
    return all_reduced(mesh)


def counts_alone(mesh: Mesh) -> dict[str, Any]:
    mesh.axis("world").meter.repeat(int(mesh.rank == 0), Counter())
    return {}


def killed(mesh: Mesh) -> dict[str, Any]:
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return all_reduced(mesh)


PARTS: dict[str, Callable[[Mesh], dict[str, Any]]] = {
    "all well": all_reduced,
    "one raises": partial(raises_on, (1,)),
    "after it": all_reduced,
    "all raise": partial(raises_on, (0, 1, 2)),
    "after them": all_reduced,
    "counts": counts_alone,
    "after that": all_reduced,
    "killed": killed,
    "after all": all_reduced,
}


def steps(rank: int, size: int, path: str, agreement: Agreement) -> dict[str, Any]:
    """What a rank has of each part."""
    parallel = ParallelConfig(world=size, ulysses=size, ring=1, cfg=1)
    parts = Parts(lambda number: mesh_of(parallel, rank=rank, path=f"{path}{number}"), rank=rank, agreement=agreement)
    found = {name: parts.run(part) for name, part in PARTS.items()}
    parts.close()
    return found


def main(root: str, result: str) -> int:
    """As `ranks.main`."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    report = compare(root, CASES)
    report["steps"] = fork(3, steps, agreement=Agreement(3))
    return judge(CASES, write(result, report))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
