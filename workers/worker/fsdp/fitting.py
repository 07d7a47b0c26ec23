"""Whether a model fits on the devices: what to switch on where it does not, and how its parts fail together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from comfy import model_management
from torch import nn

from ....loaders.source import Source
from ....raylight.comm import Comm
from ....raylight.errors import LoadError
from ....raylight.mesh import Mesh
from ....raylight.packing import Footprint, advice
from ...mapping.adopt import Home
from ...mapping.mapped_patcher import device_bytes
from .block_weights import BlockWeights


def advised(
    model: nn.Module, homes: Mapping[str, Home], source: Source, comm: Comm, *, size: int, activations: int
) -> str:
    """What to switch on where weights and a call do not fit on this worker's device; "" where they do.

    Args:
        size: bytes of all weights.
        activations: bytes that a call takes beside them.
    """
    device = model_management.get_torch_device()
    if device.type == "cpu":
        return ""
    room = int(model_management.get_total_memory(device))
    needs = {"resident": Footprint(outside=size)}
    if size + activations > room:
        for kind in ("sharded", "streamed") if comm.size > 1 else ("streamed",):
            blocks = BlockWeights(model, homes, source, comm, residency=kind, prefetch="auto", device=device)
            inside = blocks.inside
            needs[kind] = blocks.footprint(sum(device_bytes(home) for key, home in homes.items() if key not in inside))
    return advice(needs, room=room, activations=activations)


@contextlib.contextmanager
def failing_together(mesh: Mesh, sharing: Comm) -> Iterator[None]:
    """Ranks that hold parts of each other's weights fail together, or some would gather what others do not have.

    Whether there is anything to do inside is for each rank to know, so they ask one another at every call.

    Args:
        sharing: those ranks.

    Raises:
        LoadError: another rank failed.
    """
    control = mesh.control_of(sharing)
    try:
        yield
    except Exception:
        control.all_reduce(torch.tensor(mesh.rank), op="max")
        raise
    failed = int(control.all_reduce(torch.tensor(-1), op="max").item())
    if failed >= 0:
        raise LoadError(
            f"Worker {failed} has no room for its part of the weights, or cannot read them",
            "all workers have left the call",
            "Free memory on its device, use more workers, or switch FSDP_CPU_OFFLOAD on",
        )
