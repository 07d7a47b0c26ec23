"""Starts a pool of two CPU workers in a process of its own, wherever that is, and says what it computes.

    python started_in.py COMFY CHECKPOINT [on | between | within] ...

Prints a line of JSON: a digest of a model call, a worker's folder and search path, children that were not waited for,
and seconds; or the error and seconds. Then it goes `on` computing until it is killed, or starts again with the other
words in place of itself, `between` two calls or `within` one.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "workers" / "import_root"), sys.argv[1]]

import psutil  # noqa: E402
from comfy_raylight.raylight.config import ParallelConfig, PoolConfig  # noqa: E402
from comfy_raylight.raylight.errors import RaylightError  # noqa: E402
from comfy_raylight.tests.workers.faults import in_worker, where_it_runs  # noqa: E402
from comfy_raylight.tests.workers.test_pool import Model  # noqa: E402
from comfy_raylight.workers.pool import pool as pools  # noqa: E402
from comfy_raylight.workers.wire.messages import HostEnvironment  # noqa: E402


def main() -> None:
    """Start, compute, end."""
    environment = HostEnvironment(
        comfy_root=sys.argv[1],
        arguments=pickle.dumps({"cpu": True}),
        folders=pickle.dumps({}),
        device_type="cpu",
    )
    config = PoolConfig(parallel=ParallelConfig(world=2, ulysses=2, ring=1, cfg=1))
    begun, found, then = time.monotonic(), dict[str, Any](), sys.argv[3:]
    try:
        pool = pools.acquire(config, environment, lambda: False)
        model = Model(pool, Path(sys.argv[2]))
        found["folder"], found["path"] = in_worker(pool, where_it_runs)
        found["digest"] = hashlib.sha256(model.forward().numpy().tobytes()).hexdigest()
    except RaylightError as error:
        found["error"] = str(error)
    found["zombies"] = [child.name() for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]
    found["seconds"] = time.monotonic() - begun
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    if then[:1] == ["between"]:
        again(then[1:])
    if then[:1] == ["within"]:
        threading.Timer(0.5, again, [then[1:]]).start()
    while then:
        model.forward()
    pools.shut_down()


def again(then: list[str]) -> None:
    """As ComfyUI-Manager restarts ComfyUI: another program, the same process."""
    os.execv(sys.executable, [sys.executable, *sys.argv[:3], *then])


if __name__ == "__main__":
    main()
