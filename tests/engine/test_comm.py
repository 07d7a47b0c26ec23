"""Collectives, mesh and Ulysses on real ranks over gloo, and on a mesh of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_raylight.raylight.config import AXES, ParallelConfig
from comfy_raylight.raylight.mesh import Mesh

from .ranks import GROUPS


@pytest.mark.parametrize("size", GROUPS)
def test_on_ranks(run_ranks: Any, size: int) -> None:
    for rank, found in run_ranks("")["ranks"][str(size)].items():
        assert isinstance(found, dict), found
        assert found and not [name for name, held in found.items() if not held], rank
    assert ("ranks of cfg" in found) == (size == 8)


def test_single_returns_its_input() -> None:
    mesh = Mesh.single()
    x = torch.ones(2, 3)
    for axis in (*AXES, "world"):
        comm = mesh.axis(axis)
        assert (comm.rank, comm.size, comm.ranks) == (0, 1, (0,))
        assert comm.broadcast(x) is comm.all_reduce(x) is x
        assert comm.all_gather(x, dim=1, sizes=[3])[0] is comm.all_to_all([x], shapes=[(2, 3)])[0] is x
    assert mesh.control.all_reduce(x) is x
    assert mesh.collectives == 0 and mesh.seconds == 0
    mesh.close()


def test_single_keeps_switches() -> None:
    parallel = ParallelConfig(world=1, sync_ulysses=True)
    assert Mesh.single(parallel).parallel is parallel
