"""Whose connections a process group's are: gloo's ports on loopback take whoever comes first, and ask nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import WorkerError

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""Linux's: all sockets, with the user of each. There is nothing to look at elsewhere."""
OWN = Path("/proc/self/fd")
LISTENING, CONNECTED = "0A", "01"
ROOT = 0
END = len("0100007F:1234")
"""Of an address: the same for IPv4 and for IPv4 within IPv6."""


@dataclass(frozen=True)
class _Socket:
    """A row of a table: both ends as the kernel writes them, user, inode."""

    here: str
    there: str
    state: str
    user: int
    inode: str


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """See that whoever connects to the ports that this process opens in the block, to make a group, is of its user.

    A group's connections are all there when it is made, and its ranks take none later.

    Raises:
        WorkerError: another user has connected.
    """
    before = _ports(_table())
    yield
    table = _table()
    opened = _ports(table) - before
    strangers = {row.user for row in table if row.state == CONNECTED and row.there in opened} - {os.geteuid(), ROOT}
    if strangers:
        raise WorkerError(
            "Another user of this machine has connected to the workers",
            f"user {', '.join(map(str, sorted(strangers)))}, as they met",
            "Queue the prompt again, and have a look at what that user does",
        )


def _ports(table: list[_Socket]) -> set[str]:
    """Ends at which this process listens."""
    mine = set()
    for entry in OWN.iterdir() if OWN.is_dir() else ():
        with contextlib.suppress(OSError):  # the descriptor that lists the folder is one of them
            mine.add(os.readlink(entry))
    return {row.here for row in table if row.state == LISTENING and f"socket:[{row.inode}]" in mine}


def _table() -> list[_Socket]:
    rows = []
    for path in TABLES:
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines()[1:]:
                _, here, there, state, _, _, _, user, _, inode, *_ = line.split()
                rows.append(_Socket(here[-END:], there[-END:], state, int(user), inode))
    return rows
