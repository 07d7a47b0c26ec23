"""Starts a pool of two CPU workers in a process of its own, wherever that is, and says what it computes.

    python started_in.py COMFY CHECKPOINT [on]

Prints JSON: a digest of a model call, a worker's folder and search path, and seconds; or the error and seconds. With
`on` it computes until it is killed, and prints nothing.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "workers" / "import_root"), sys.argv[1]]

from comfy_raylight.raylight.config import ParallelConfig, PoolConfig  # noqa: E402
from comfy_raylight.raylight.errors import RaylightError  # noqa: E402
from comfy_raylight.tests.workers.faults import in_worker, where_it_runs  # noqa: E402
from comfy_raylight.tests.workers.test_pool import Model  # noqa: E402
from comfy_raylight.workers import pool as pools  # noqa: E402
from comfy_raylight.workers.messages import HostEnvironment  # noqa: E402


def main() -> None:
    """Start, compute, end."""
    environment = HostEnvironment(
        comfy_root=sys.argv[1],
        arguments=pickle.dumps({"cpu": True}),
        folders=pickle.dumps({}),
        device_type="cpu",
    )
    config = PoolConfig(parallel=ParallelConfig(world=2, ulysses=2, ring=1, cfg=1))
    begun, found = time.monotonic(), dict[str, Any]()
    try:
        pool = pools.acquire(config, environment, lambda: False)
        model = Model(pool, Path(sys.argv[2]))
        output = model.forward()
        while sys.argv[3:] == ["on"]:
            model.forward()
        found["folder"], found["path"] = in_worker(pool, where_it_runs)
        found["digest"] = hashlib.sha256(output.numpy().tobytes()).hexdigest()
    except RaylightError as error:
        found["error"] = str(error)
    found["seconds"] = time.monotonic() - begun
    pools.shut_down()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
