"""The link test of a new pool: what the connections between workers carry, and whether that is enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ...raylight import cost
from ...raylight.config import ParallelConfig
from ...raylight.errors import WorkerError
from ...raylight.mesh import Mesh

BYTES = 16 << 20
ROUNDS = 5
LIMIT_S = 60.0
"""For the whole test; a link that does not work may never answer."""
VIDEO = cost.Work(tokens=32760, width=5120, blocks=40, weights=3.5e8, context=512)
"""Wan 2.1 14B at 81 frames of 832 x 480: where links are too slow for this, they are for less as well."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one axis carries: GB/s that a rank sends in each kind of collective, and seconds for one of four bytes."""

    reduce: float
    exchange: float
    latency: float


def measure(mesh: Mesh, device: torch.device) -> dict[str, Link]:
    """Time collectives on every axis with more than one rank; every rank calls it.

    Raises:
        WorkerError: a result is wrong, so a link does not carry what it is given.
    """
    return {axis: _link(mesh, axis, device) for axis, size in mesh.parallel.degrees.items() if size > 1}


def _link(mesh: Mesh, axis: str, device: torch.device) -> Link:
    comm = mesh.axis(axis)
    payload = torch.full((BYTES // 4,), float(comm.rank + 1), device=device)
    share = payload.numel() // comm.size
    pieces, shapes = [payload[:share]] * comm.size, [(share,)] * comm.size

    def timed(run: Callable[[], object]) -> float:
        run()  # the first one sets the connections up
        finish(device)
        started = time.perf_counter()
        for _ in range(ROUNDS):
            run()
        finish(device)
        return (time.perf_counter() - started) / ROUNDS

    total = comm.all_reduce(payload)
    got = comm.all_to_all(pieces, shapes=shapes)
    wanted = sum(range(1, comm.size + 1))
    seen = (total.min().item(), total.max().item(), *(piece[0].item() for piece in got))
    if seen != (wanted, wanted, *map(float, range(1, comm.size + 1))):
        raise WorkerError(
            f"The link test over the {axis} axis gave a wrong result",
            f"{seen}, where the sum is {wanted}",
            "Check the links between the GPUs (for example with NCCL_P2P_DISABLE=1), then try again",
        )
    sent = (comm.size - 1) / comm.size * BYTES
    small = torch.ones(1, device=device)
    return Link(
        reduce=2 * sent / timed(lambda: comm.all_reduce(payload)) / 1e9,
        exchange=sent / timed(lambda: comm.all_to_all(pieces, shapes=shapes)) / 1e9,
        latency=timed(lambda: comm.all_reduce(small)),
    )


def finish(device: torch.device) -> None:
    """Wait until a device has done everything that is queued."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def described(links: Mapping[str, Link]) -> str:
    """For the log."""
    parts = [
        f"{axis}: all-reduce {link.reduce:.2f} GB/s, all-to-all {link.exchange:.2f} GB/s, {link.latency * 1e6:.0f} us"
        for axis, link in links.items()
    ]
    return "; ".join(parts) or "none, one worker"


def machine(links: Mapping[str, Link], device_type: str) -> cost.Machine | None:
    """The rates assumed of a type of device, with the slowest of these links; None where nothing is assumed of it."""
    assumed = cost.RATES.get(device_type)
    found = _of_sequence(links)
    if assumed is None or not found:
        return assumed
    slowest = min(found, key=lambda link: link.exchange)
    return replace(assumed, link=slowest.exchange * 1e9, latency=slowest.latency)


def _of_sequence(links: Mapping[str, Link]) -> list[Link]:
    """Those between workers that share a sequence."""
    return [links[axis] for axis in ("ulysses", "ring") if axis in links]


def warning(links: Mapping[str, Link], parallel: ParallelConfig, device_type: str) -> str:
    """What to tell the user where these links make sharing a sequence pointless; "" where they do not."""
    seen, degrees = machine(links, device_type), parallel.degrees
    if seen is None or not _of_sequence(links):
        return ""
    gain = cost.speedup([VIDEO], seen, ulysses=degrees["ulysses"], ring=degrees["ring"])
    if gain >= cost.PAYS:
        return ""
    return (
        f"the links between these {parallel.sequence} workers carry {seen.link / 1e9:.2f} GB/s: even a long video is "
        f"predicted to run at {gain:.1f}x the speed of one worker. Use cfg_degree or data parallel, whose workers send "
        "each other next to nothing, or fewer workers"
    )
