"""Who connects to ports that are opened while ranks meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_raylight.raylight import strangers
from comfy_raylight.raylight.errors import WorkerError

NOBODY = 65534
CONNECT = """
import encodings.idna, os, socket, sys
os.setuid(int(sys.argv[1]))
connection = socket.create_connection((sys.argv[2], int(sys.argv[3])))
print(flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux only")


def meet(user: int, family: socket.AddressFamily, host: str, *, beside: bool = False) -> None:
    """A process of that user connects to a port which is opened while others meet, or is there before."""
    with socket.socket(family) as port:
        if beside:
            port.bind((host, 0))
            port.listen()
        with strangers.refused():
            if not beside:
                port.bind((host, 0))
                port.listen()
            number = str(port.getsockname()[1])
            command = [sys.executable, "-c", CONNECT, str(user), host, number]
            other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert other.stdout is not None
            other.stdout.readline()
        other.communicate()


def test_processes_of_the_same_user() -> None:
    meet(os.geteuid(), socket.AF_INET, "127.0.0.1")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("family,host", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_another_user(family: socket.AddressFamily, host: str) -> None:
    with pytest.raises(WorkerError, match=f"Another user .*user {NOBODY}"):
        meet(NOBODY, family, host)
    meet(NOBODY, family, host, beside=True)
