"""Brings a cold file into the page cache, read once per host: each worker reads its own share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
PROBE_BYTES = 512 << 10
"""Between the pages that are looked at: the kernel reads and drops files in runs of about that size."""
THREADS = 4


def prefetch(fd: int, size: int, *, index: int, count: int, cancelled: Callable[[], bool] = lambda: False) -> int:
    """Read the chunks of a file that are not in the page cache yet, every `count`-th from `index` on.

    Shares are interleaved, so that all workers together read the file from front to back. A file that does
    not fit into the memory that is free is left alone: its end would push out its beginning.

    Args:
        fd: the open file.
        size: of the file, in bytes.
        index: which worker of this host this is.
        count: how many workers of this host read the file.
        cancelled: whether to leave the rest to whoever needs it.

    Returns the bytes that were read; 0 where nothing can be told of the cache.
    """
    if not hasattr(os, "RWF_NOWAIT") or size > psutil.virtual_memory().available:
        return 0
    starts = [start for start in range(index * CHUNK_BYTES, size, count * CHUNK_BYTES) if _cold(fd, size, start)]
    if not starts:
        return 0
    total = 0
    with ThreadPoolExecutor(THREADS) as pool:
        reads = [pool.submit(_read, fd, start) for start in starts]
        for read in reads:
            if cancelled():
                pool.shutdown(cancel_futures=True)
                break
            total += read.result()
    log.debug("read %d bytes of a cold file, share %d of %d", total, index, count)
    return total


def _cold(fd: int, size: int, start: int) -> bool:
    """Whether some of the chunk at `start` would have to come from the disk."""
    end = min(start + CHUNK_BYTES, size)
    page = [bytearray(1)]
    try:
        for position in (*range(start, end, PROBE_BYTES), end - 1):
            os.preadv(fd, page, position, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:  # a filesystem that cannot tell
        return False
    return False


def _read(fd: int, start: int) -> int:
    # into a small buffer that is read over and over: what counts is what the kernel keeps
    buffer, done = bytearray(1 << 20), 0
    while done < CHUNK_BYTES:
        count = os.preadv(fd, [buffer], start + done)
        if not count:
            break
        done += count
    return done
