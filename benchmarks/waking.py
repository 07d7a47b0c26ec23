"""How soon worker processes begin what they are asked, by how many threads the asking process computes with.

    python benchmarks/waking.py [--workers 2,4] [--calls 60]

Run it with a Python that has ComfyUI's packages. No GPU, no ComfyUI, no pool: processes that wait on a pipe, as workers
do, agree over gloo and then keep a core busy for 20 ms, as one does that waits for its GPU. Before each call the asking
process joins a text's embeddings (4 MiB), as ComfyUI does, which starts OpenMP's threads; 2 ms later it asks. At first
it has as many threads as ever, then those that the pack leaves it. Medians, after ten calls. With
OMP_WAIT_POLICY=PASSIVE in the environment these threads sleep at once.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

BUSY_S = 0.02
PAUSE_S = 0.002
FIRST = 10

sys.path.append(str(Path(__file__).resolve().parents[1] / "workers" / "import_root"))


def worker(rank: int, size: int, store: str, asked: Connection) -> None:
    """Answer every request with the times at which it was there and agreed on."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    vote = torch.zeros(2, dtype=torch.int64)
    dist.all_reduce(vote)
    asked.send_bytes(b"ready")
    while asked.recv_bytes():
        came = time.monotonic()
        dist.all_reduce(vote)
        agreed = time.monotonic()
        busy(BUSY_S)
        asked.send((came, agreed))


def busy(seconds: float) -> None:
    """Take a core for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def measure(size: int, calls: int) -> list[float]:
    """Medians in ms: of joining, until the last worker begins, and until all agree."""
    import torch

    text = torch.randn(1, 256, 4096)
    context = multiprocessing.get_context("spawn")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(size)]
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=worker, args=(rank, size, store, there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        workers = [here for here, _ in pipes]
        for here in workers:
            here.recv_bytes()
        for _ in range(calls + FIRST):
            began = time.monotonic()
            torch.cat([text])
            joined = time.monotonic() - began
            busy(PAUSE_S)
            asked = time.monotonic()
            for here in workers:
                here.send_bytes(b"call")
            came, agreed = zip(*(here.recv() for here in workers), strict=True)
            found.append((joined, max(came) - asked, max(agreed) - max(came)))
        for process in processes:
            process.kill()
    return [statistics.median(values) * 1e3 for values in zip(*found[FIRST:], strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="2,4", help="how many, comma-separated")
    parser.add_argument("--calls", type=int, default=60)
    options = parser.parse_args()
    import torch
    from comfy_raylight.workers.driver.cores import leaving

    print("| workers | threads | join ms | last begins ms | agree ms |\n|---|---|---|---|---|")
    for size in map(int, options.workers.split(",")):
        for way in (contextlib.nullcontext(), leaving(size)):
            with way:
                row = " | ".join(f"{value:.2f}" for value in measure(size, options.calls))
                print(f"| {size} | {torch.get_num_threads()} | {row} |", flush=True)


if __name__ == "__main__":
    main()
