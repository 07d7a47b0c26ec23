"""How workers call back: the driver's listener, which waits for nobody without a bound, and its ends of their lines."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

log = logging.getLogger(__name__)

POLL_S = 0.05
GREETING_S = 10.0
"""How long who calls may take to show the key: somebody else may, too, where the listener has a port."""
GUESTS = 64
"""Callers at a time that have not shown the key yet; more have to wait for their turn."""
STALL_S = 60.0
"""How long a worker may take nothing of what it is sent, until it counts as stopped."""
CANCEL_S = 5.0
"""The same once the user has cancelled."""


class DriverEnd(Connection):
    """The driver's end of a line: its sends end when nothing is taken any more, and see Cancel."""

    def __init__(self, handle: int, interrupted: Callable[[], bool]) -> None:
        super().__init__(handle)
        self._interrupted = interrupted

    def _send(self, buf: Any, write: Any = None) -> Any:
        """Connection's hook: write all of it."""
        if os.name != "posix":
            return super()._send(buf)  # type: ignore[misc]
        left = memoryview(buf)
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        taken = time.monotonic()
        with socket.socket(fileno=os.dup(self.fileno())) as same:
            while left:
                if poll.poll(POLL_S * 1000):
                    left = left[same.send(left, socket.MSG_DONTWAIT) :]
                    taken = time.monotonic()
                elif time.monotonic() - taken > (CANCEL_S if self._interrupted() else STALL_S):
                    raise TimeoutError(f"nothing was taken for {time.monotonic() - taken:.0f} s")
        return None


def gather(
    listener: Listener, key: bytes, count: int, *, check: Callable[[], None], interrupted: Callable[[], bool]
) -> dict[int, DriverEnd]:
    """The lines of `count` workers by rank, as they call.

    Each caller is greeted in a thread: one that says nothing keeps nobody waiting, and one without the key is hung up
    on.

    Args:
        listener: made without a key.
        check: called while workers are missing; raises where there is no hope, or no wish, for them.
    """
    listener._listener._socket.settimeout(POLL_S)  # type: ignore[attr-defined]
    known: queue.SimpleQueue[tuple[int, Connection]] = queue.SimpleQueue()
    guests: list[tuple[threading.Thread, Connection]] = []
    lines: dict[int, DriverEnd] = {}
    try:
        while len(lines) < count:
            while not known.empty():
                rank, connection = known.get()
                lines[rank] = DriverEnd(os.dup(connection.fileno()), interrupted)
                connection.close()
            guests = [(thread, connection) for thread, connection in guests if thread.is_alive()]
            check()
            if len(guests) >= GUESTS:
                time.sleep(POLL_S)
                continue
            try:
                connection = listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=_greet, args=(connection, key, known), name="raylight-greet", daemon=True)
            guests.append((thread, connection))
            thread.start()
    except BaseException:
        for line in lines.values():
            line.close()
        raise
    finally:
        for _, connection in guests:
            _hang_up(connection)
    return lines


def _greet(connection: Connection, key: bytes, known: queue.SimpleQueue[tuple[int, Connection]]) -> None:
    """Have a caller show the key, and say its rank."""
    try:
        _bound(connection, GREETING_S)
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        rank = pickle.loads(connection.recv_bytes())
        _bound(connection, 0)
    except (EOFError, OSError, AuthenticationError) as error:
        log.warning("somebody who called in place of a worker was hung up on: %s", error or type(error).__name__)
        connection.close()
    else:
        known.put((rank, connection))


def _bound(connection: Connection, seconds: float) -> None:
    """Bound each read and write of a connection; 0 for no bound."""
    if os.name == "posix":
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                same.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))


def _hang_up(connection: Connection) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)
