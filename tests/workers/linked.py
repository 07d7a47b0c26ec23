"""One of two ranks on machines of their own, which watches its links; run by test_link_watch.py, with its pace.

    python linked.py RANK ADDRESS PORT LINK_S

Rank 1 first computes for twice LINK_S, while rank 0 waits for it. Then both exchange something until that fails.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "workers" / "import_root"))

from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.workers.worker import link_watch


def main(rank: int, address: str, port: int, pace: float) -> None:
    """Join, and exchange."""
    link_watch.LINK_S, link_watch.LOOK_S = pace, pace / 8
    net = address.rpartition(".")[0] + "."
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.startswith(net) for entry in entries):
            os.environ["GLOO_SOCKET_IFNAME"] = name
    watch = link_watch.LinkWatch()
    watch.start()
    long = datetime.timedelta(seconds=1800)
    store = distributed.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False, timeout=long)
    parallel = ParallelConfig(world=2, ulysses=2, ring=1, cfg=1)
    mesh = Mesh.create(parallel, rank=rank, store=store, backend="gloo", timeout=long)
    if rank == 1:
        time.sleep(2 * pace)
    mesh.axis("ulysses").all_reduce(torch.ones(1000))
    _tell("met", watch)
    try:
        while True:
            mesh.axis("ulysses").all_reduce(torch.ones(1000))
            time.sleep(0.1)
    except RuntimeError:
        _tell("ended", watch)
    os._exit(0)  # the store's threads wait for the other machine


def _tell(what: str, watch: link_watch.LinkWatch) -> None:
    sys.stdout.write(f"{what} {watch.dead}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
