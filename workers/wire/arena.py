"""Anonymous shared memory between the driver and the workers on its host."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
import uuid
import weakref
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)

PROBE_BYTES = 1 << 12


@dataclass(frozen=True)
class ArenaRef:
    """Names a driver's shared memory: file descriptor `fd` of process `pid`, `size` bytes.

    Descriptors are reused; `name` tells one arena from the next.
    """

    pid: int
    fd: int
    size: int
    name: str


class Arena:
    """Anonymous shared memory of the driver; a worker on the same host opens it through /proc.

    It has no name, so nothing is left behind however either process ends. `supported()` is False where
    the system has no such memory; parcels then carry their bytes.
    """

    def __init__(self, size: int, *, folder: str = "") -> None:
        """Args:
        size: bytes.
        folder: make it a file there that has no name any more, for what memory has no room for.

        Raises:
            OSError: the folder's disk has no room.
        """
        if folder:
            self._fd, path = tempfile.mkstemp(dir=folder, prefix="raylight")
            weakref.finalize(self, os.close, self._fd)
            os.unlink(path)
            os.posix_fallocate(self._fd, 0, size)
        else:
            self._fd = os.memfd_create("raylight", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self._fd)
            os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.ref = ArenaRef(os.getpid(), self._fd, size, uuid.uuid4().hex)

    @staticmethod
    def probe() -> Arena:
        """One that others try to open, to see whether they can; see `is_open`."""
        probe = Arena(PROBE_BYTES)
        probe.bytes[: len(probe.ref.name)] = torch.frombuffer(bytearray(probe.ref.name.encode()), dtype=torch.uint8)
        return probe

    @staticmethod
    def supported() -> bool:
        return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def is_open(ref: ArenaRef) -> bool:
    """Whether this process can open another one's probe.

    On another host, or in another container, the same number may be another process's, with other files.
    """
    try:
        content = open_arena(ref)[: len(ref.name)]
    except (OSError, ValueError) as error:
        log.info("no shared memory with the driver: %s", error)
        return False
    return bytes(content.tolist()) == ref.name.encode()


def pin(storage: torch.Tensor, device: torch.device) -> None:
    """Page-lock mapped memory, so that an accelerator copies from and to it at the rate of its link.

    Where that cannot be, copies are as right and slower.

    Args:
        storage: what `Arena.bytes` and `open_arena` give; it is released before it is unmapped.
    """
    if device.type != "cuda":
        return
    runtime: Any = torch.cuda.cudart()
    address = storage.data_ptr()
    problem = int(runtime.cudaHostRegister(address, storage.nbytes, 0))
    if problem:
        log.info("the memory shared with the workers stays pageable: error %d", problem)
        return
    weakref.finalize(storage.untyped_storage(), runtime.cudaHostUnregister, address).atexit = False


def open_arena(ref: ArenaRef, *, private: bool = False) -> torch.Tensor:
    """Map another process's arena: a uint8 tensor of `ref.size` bytes.

    Args:
        private: what is written here stays here; pages that are only read are still the one copy.

    Raises:
        OSError: the process is not on this host, or its memory may not be opened.
    """
    fd = os.open(f"/proc/{ref.pid}/fd/{ref.fd}", os.O_RDWR)
    try:
        mapped = mmap.mmap(fd, ref.size, mmap.MAP_PRIVATE if private else mmap.MAP_SHARED)
        return torch.frombuffer(mapped, dtype=torch.uint8)
    finally:
        os.close(fd)
