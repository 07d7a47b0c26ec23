"""Memory of a worker: what it has, and how what it is done with goes back to the device and the system."""

from __future__ import annotations

import ctypes
import logging

import psutil
import torch
from comfy import model_management

log = logging.getLogger(__name__)


def private_bytes() -> int:
    """Host memory of this process that no other process shares: mapped model files are not in it."""
    return int(psutil.Process().memory_full_info().uss)


def device_bytes(device: torch.device) -> int:
    """What this process has taken of its accelerator; 0 on a CPU."""
    return 0 if device.type == "cpu" else int(torch.get_device_module(device).memory_reserved(device))


def give_back() -> None:
    """Empty the device's cache, and the C library's of freed heap where it has a call for that (glibc: malloc_trim).

    glibc keeps freed pieces of up to 32 MiB for later, hundreds of MiB after a model was patched on a CPU.
    """
    model_management.soft_empty_cache()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no library of no name
        log.debug("no malloc_trim here: freed heap is the C library's to return")
        return
    trim(0)
