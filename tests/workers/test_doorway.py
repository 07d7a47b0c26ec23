"""The driver's listener: callers who are no workers keep nobody waiting, and sends end when nobody takes them."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from multiprocessing.connection import Client, Connection, Listener

import pytest
from comfy_raylight.raylight.errors import WorkerError
from comfy_raylight.workers.pool import doorway

KEY = b"k" * 32


def call(address: tuple[str, int], rank: int) -> Connection:
    connection = Client(address, authkey=KEY)
    connection.send_bytes(pickle.dumps(rank))
    return connection


def test_strangers_keep_nobody_waiting() -> None:
    """One that says nothing, one with another key, and one that hangs up, before the workers call."""
    with Listener(("127.0.0.1", 0), backlog=8) as listener:
        host, port = listener.address
        silent, gone = (socket.create_connection((host, port)) for _ in range(2))
        wrong = socket.create_connection((host, port))
        wrong.sendall(b"\0\0\0\x20" + b"x" * 32)
        gone.close()
        found: list[Connection] = []
        workers = [threading.Thread(target=lambda rank=rank: found.append(call((host, port), rank))) for rank in (1, 0)]
        for worker in workers:
            worker.start()
        lines = doorway.gather(listener, KEY, 2, check=lambda: None, interrupted=lambda: False)
        for worker in workers:
            worker.join(10)
        assert sorted(lines) == [0, 1] and len(found) == 2
        for line in lines.values():
            line.send_bytes(b"hello")
        assert [connection.recv_bytes() for connection in found] == [b"hello"] * 2
        assert silent.recv(64)[4:].startswith(b"#CHALLENGE#")
        assert silent.recv(64) == b"", "it was hung up on"
        wrong.close()


def test_cancel_while_a_stranger_says_nothing() -> None:
    def check() -> None:
        if time.monotonic() > began + 0.5:
            raise WorkerError("Cancelled")

    with Listener(("127.0.0.1", 0)) as listener, socket.create_connection(listener.address):
        began = time.monotonic()
        with pytest.raises(WorkerError, match="Cancelled"):
            doorway.gather(listener, KEY, 1, check=check, interrupted=lambda: False)


@pytest.mark.parametrize("cancel", [False, True])
def test_a_send_that_nobody_takes_ends(cancel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorway, "CANCEL_S" if cancel else "STALL_S", 0.2)
    here, there = socket.socketpair()
    line = doorway.DriverEnd(here.detach(), lambda: cancel)
    with there, line, pytest.raises(TimeoutError, match="nothing was taken"):
        line.send_bytes(bytes(32 << 20))


def test_a_send_that_is_taken_slowly_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a stall may last, in all."""
    monkeypatch.setattr(doorway, "STALL_S", 2.0)
    here, there = socket.socketpair()
    line, other = doorway.DriverEnd(here.detach(), lambda: False), Connection(there.detach())
    content = bytes(range(256)) * (1 << 14)
    sender = threading.Thread(target=line.send_bytes, args=(content,))
    with line, other:
        sender.start()
        time.sleep(0.5)
        assert other.recv_bytes() == content
        sender.join(10)
