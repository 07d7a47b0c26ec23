"""Notices when a connection of this process to another machine is dead, and breaks it: who waits on it then fails.

A rank that waits for others cannot tell a slow one from a dead link, and must not: another may compute for minutes. The
system can. What is sent is acknowledged by the other machine's kernel, whatever its processes do, and so are the probes
of a connection on which nobody sends. A link on which neither comes is dead; by itself TCP says so after a quarter of
an hour, and on an idle connection after two.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

LINK_S = 30.0
"""How long nothing may be acknowledged."""
LOOK_S = 4.0
IDLE_S, PROBE_S = 10, 5
"""When an idle connection is probed first, and then again."""
PROBES = 100
"""More than the system would ever send: whether a link is dead is decided here, the same way for all of them."""
INFO = "=8B13I"
"""The beginning of Linux's struct tcp_info."""


@dataclass(frozen=True)
class Signs:
    """What the system says of a connection: whether something it sent again waits, and ms since the last answer."""

    pending: bool
    silent_ms: int

    @classmethod
    def of(cls, connection: socket.socket) -> Signs:
        """Those of a TCP socket."""
        told = struct.unpack(INFO, connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, struct.calcsize(INFO)))
        _, _, retransmits, probes, *_, silent_ms = told
        return cls(bool(retransmits or probes), silent_ms)


class LinkWatch(threading.Thread):
    """Looks at all TCP connections of this process to other machines, until it is stopped.

    Attributes:
        dead: addresses of machines to which a connection was found dead, and broken.
    """

    def __init__(self) -> None:
        super().__init__(name="raylight-watch-links", daemon=True)
        self.dead: tuple[str, ...] = ()
        self._over = threading.Event()
        self._pending: dict[int, float] = {}  # since when something has been waiting, by inode of the socket

    def run(self) -> None:
        """Look, and break what is dead."""
        if not hasattr(socket, "TCP_INFO"):
            return
        while not self._over.wait(LOOK_S):
            self._look()

    def stop(self) -> None:
        """No connection is looked at any more."""
        self._over.set()

    def _look(self) -> None:
        now = time.monotonic()
        pending = {}
        for inode, peer, connection in _connections():
            try:
                _probe(connection)
                signs = Signs.of(connection)
            except OSError:  # it has ended by itself
                continue
            # the last answer may be older than what waits for the next one: it counts from when that was seen
            began = self._pending.get(inode, now)
            if not signs.pending or signs.silent_ms < 1000 * (now - began):
                continue
            pending[inode] = began
            if now - began >= LINK_S:
                log.error("nothing that is sent to %s has been acknowledged for %.0f s: the link is dead", peer, LINK_S)
                self.dead = tuple(sorted({*self.dead, peer}))
                with contextlib.suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)
        self._pending = pending


def _connections() -> Iterator[tuple[int, str, socket.socket]]:
    """Inode, the other end's address, and a duplicate that is closed afterwards, of each connection."""
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.fstat(int(name))
            if not stat.S_ISSOCK(found.st_mode):
                continue
            duplicate = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # it has been closed since
            continue
        with duplicate:
            if duplicate.family not in (socket.AF_INET, socket.AF_INET6) or duplicate.type != socket.SOCK_STREAM:
                continue
            try:
                peer = str(duplicate.getpeername()[0]).removeprefix("::ffff:")
            except OSError:  # it listens, or has been closed
                continue
            if not peer.startswith("127.") and peer != "::1" and peer != duplicate.getsockname()[0]:
                yield found.st_ino, peer, duplicate


def _probe(connection: socket.socket) -> None:
    """Have the system probe it while it is idle."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, IDLE_S), (socket.TCP_KEEPINTVL, PROBE_S), (socket.TCP_KEEPCNT, PROBES)):
        if connection.getsockopt(socket.IPPROTO_TCP, option) != value:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
