"""What a verb may tell the driver, and hear from it, while it works."""

from __future__ import annotations

import pickle
import time
from multiprocessing.connection import Connection
from typing import Protocol

from ..wire.messages import Cancel, Progress

REPORT_S = 0.1
"""Seconds between two reports, at least: each wakes the driver."""


class Line(Protocol):
    """A way to the driver during one request."""

    def report(self, done: int, total: int) -> None:
        """Tell how much of the work is done."""

    def cancelled(self) -> bool:
        """Whether the driver wants the request to end."""


class Wire:
    """The connection of a worker, during one request."""

    def __init__(self, connection: Connection, request: int) -> None:
        self._connection = connection
        self._request = request
        self._cancelled = False
        self._reported = 0.0

    def report(self, done: int, total: int) -> None:
        """Tell how much of the work is done, at a bounded rate; the end is always told."""
        now = time.monotonic()
        if done < total and now - self._reported < REPORT_S:
            return
        self._reported = now
        self._connection.send_bytes(pickle.dumps(Progress(id=self._request, done=done, total=total)))

    def cancelled(self) -> bool:
        """Whether the driver wants the request to end."""
        while not self._cancelled and self._connection.poll():
            message = pickle.loads(self._connection.recv_bytes())
            self._cancelled = isinstance(message, Cancel) and message.id == self._request
        return self._cancelled


class Silence:
    """Nobody listens, nobody cancels: a runner outside a pool."""

    def report(self, done: int, total: int) -> None:
        """Nothing."""

    def cancelled(self) -> bool:
        """No."""
        return False
