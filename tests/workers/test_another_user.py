"""What another user of the machine can do to a running pool: nothing. Needs root, to become that user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from comfy_raylight.tests.host import intruder
from comfy_raylight.workers.pool import pool as pools
from comfy_raylight.workers.pool.ray_watch import RayWatch

Acquire = Callable[..., pools.Pool]
UNAUTHENTICATED, UNKNOWN = "16", "12"

pytestmark = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become another user")


def attack(**order: Any) -> dict[str, Any]:
    """What `nobody` gets done."""
    asked = json.dumps(order)
    done = subprocess.run([sys.executable, intruder.__file__], input=asked, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_another_user_gets_nothing(acquire: Acquire) -> None:
    """Every file, socket, port and process of a pool is tried for reading, writing and talking to."""
    pool = acquire()
    own = RayWatch.own_at_hand()
    assert own is not None
    family = [each for each in (psutil.Process(), *psutil.Process().children(recursive=True)) if each.is_running()]
    ports = {
        connection.laddr.port: each.name()
        for each in family
        for connection in each.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    folder = own.folder.path
    paths = [folder, *folder.rglob("*"), *Path("/dev/shm").iterdir()]
    control = int(own.address.rpartition(":")[2])
    assert {control} <= ports.keys() and any("plasma_store" in path.name for path in paths)
    assert intruder.grpc_status(control, intruder.METHODS[0], own.token) == "0", "who has the token is answered"

    found = attack(paths=list(map(str, paths)), ports=list(ports), pids=[each.pid for each in family])

    assert found["paths"] == [f"stat {folder}"]
    assert found["processes"] == []
    for port, answers in found["ports"].items():
        refused = [answer.split(" ", 1)[1] in ("", UNKNOWN, UNAUTHENTICATED) for answer in answers[:-1]]
        assert all(refused) and " 200 " not in answers[-1], (ports[int(port)], answers)
    kinds = {answer.rpartition(" ")[2] for answers in found["ports"].values() for answer in answers}
    assert UNAUTHENTICATED in kinds
    assert not [each for each in family if own.token in " ".join(each.cmdline())]
    # the workers' own sockets heard nonsense meanwhile
    assert pool.call("check_links", limit=60.0)
