"""Where decoded pixels go: memory of the driver that workers write to, and that the IMAGE then is."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ...raylight.errors import ConfigError
from ..wire.arena import Arena
from ..wire.vae_messages import Block

log = logging.getLogger(__name__)

LIMIT = Path("/sys/fs/cgroup/memory.max")
USED = Path("/sys/fs/cgroup/memory.current")
"""A container's own limit of memory, shared memory included, and what is used of it (cgroup v2)."""
SPARE = 0.9
"""Part of the room that is taken at most."""


@dataclass(frozen=True)
class Output:
    """A tensor of the driver, and how workers name it.

    Workers can open it as long as this lives; the memory goes when `tensor` and its views do.
    """

    tensor: torch.Tensor
    block: Block
    arena: Arena | None = None


def reserve(shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool) -> Output:
    """Memory for a result of this shape.

    Anonymous shared memory where there is room; else a file without a name on the temporary disk, said in the log.
    Nothing of either has a name, so nothing is left behind however a process ends.

    Args:
        shared: whether every worker can open this process's memory. If not, the tensor is an ordinary one, and
            the block has nothing to open.

    Raises:
        ConfigError: there is room neither in memory nor on disk.
    """
    if not shared:
        return Output(torch.empty(shape, dtype=dtype), Block(shape=shape, dtype=dtype, arena=None))
    size = max(1, torch.Size(shape).numel() * dtype.itemsize)
    return _in(_arena(size, memory_room(), tempfile.gettempdir()), shape, dtype)


def share(tensor: torch.Tensor, *, shared: bool) -> Output:
    """A copy of a tensor for all workers to read: once in shared memory, or as bytes of the message."""
    tensor = tensor.detach().cpu().contiguous()
    if not shared:
        content = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        return Output(tensor, Block(shape=tuple(tensor.shape), dtype=tensor.dtype, arena=None, inline=content))
    found = _in(Arena(max(1, tensor.nbytes)), tuple(tensor.shape), tensor.dtype)
    found.tensor.copy_(tensor)
    return found


def memory_room() -> int:
    """Bytes of memory that may still be used, by the system's and by the container's own account."""
    import psutil  # of ComfyUI's own requirements

    room = int(psutil.virtual_memory().available)
    try:
        limit = LIMIT.read_text().strip()
        return room if limit == "max" else min(room, int(limit) - int(USED.read_text()))
    except (OSError, ValueError):
        return room  # no such account on this system


def _arena(size: int, room: int, folder: str) -> Arena:
    if size <= SPARE * room:
        try:
            return Arena(size)
        except OSError as error:  # a limit of this process that the accounts do not have
            log.info("no shared memory for the decoded frames: %s", error)
    free = shutil.disk_usage(folder).free
    if size > SPARE * free:
        raise ConfigError(
            "There is no room for the decoded frames",
            f"{size >> 20} MiB, with {room >> 20} MiB of memory and {free >> 20} MiB in {folder} free",
            "Decode fewer frames at a time, or free memory or disk",
        )
    log.warning(
        "the decoded frames (%d MiB) do not fit into the %d MiB of free memory: they go to a file in %s, which "
        "disappears with them",
        size >> 20,
        room >> 20,
        folder,
    )
    try:
        return Arena(size, folder=folder)
    except OSError as error:
        raise ConfigError(
            "There is no room for the decoded frames",
            f"{size >> 20} MiB in {folder}: {error}",
            "Decode fewer frames at a time, or free memory or disk",
        ) from error


def _in(arena: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> Output:
    count = torch.Size(shape).numel() * dtype.itemsize
    block = Block(shape=shape, dtype=dtype, arena=arena.ref)
    return Output(arena.bytes[:count].view(dtype).view(shape), block, arena)
