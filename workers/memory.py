"""Memory that a worker is done with goes back to the machine: to the device, and from its heap to the system."""

from __future__ import annotations

import ctypes
import logging

from comfy import model_management

log = logging.getLogger(__name__)


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
