"""One process per GPU, without Ray: what the benchmarks of this folder that use several GPUs share."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900

Job = Callable[..., Any]
"""Called as job(rank, store path, options) in a process that sees one GPU and has ComfyUI on its path."""


def spawn(size: int, job: Job, options: Any) -> list[Any]:
    """Run a job in as many processes; what each returned, by rank.

    Args:
        options: picklable, with the root of a ComfyUI as its attribute `comfy`; with a true `cpu` no process sees a
            GPU.

    Raises:
        RuntimeError: one failed.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [context.Process(target=_work, args=(rank, store, job, options, results)) for rank in range(size)]
        for process in processes:
            process.start()
        try:
            found = dict(results.get(timeout=TIMEOUT_S) for _ in processes)
        finally:
            for process in processes:
                process.join(30)
                process.kill()
    failed = [text for text in found.values() if isinstance(text, str)]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [found[rank] for rank in range(size)]


def _work(rank: int, store: str, job: Job, options: Any, results: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if getattr(options, "cpu", False) else str(rank)
    enter(options.comfy)
    try:
        results.put((rank, job(rank, store, options)))
    except Exception:
        results.put((rank, traceback.format_exc()))


def enter(comfy: str) -> None:
    """Make this process one that imports ComfyUI and the pack; on the CPU where there is no GPU, to try a script."""
    sys.argv = sys.argv[:1]
    sys.path[:0] = [comfy, str(ROOT / "benchmarks")]
    sys.path.append(str(ROOT / "workers" / "import_root"))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def mesh_of(parallel: Any, rank: int, store: str) -> Any:
    """The mesh of the processes, over NCCL; over gloo where there is no GPU."""
    import torch
    import torch.distributed as dist
    from comfy_raylight.raylight.mesh import Mesh

    return Mesh.create(
        parallel,
        rank=rank,
        store=dist.FileStore(store, parallel.world),
        backend="nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(seconds=300),
    )


def timed(run: Callable[[], Any], rounds: int, mesh: Any) -> tuple[float, int]:
    """Median of seconds after a first run, all ranks starting together, and bytes given out at most; 0 of a CPU."""
    import torch
    from comfy import model_management
    from comfy_raylight.workers.wire.link_test import finish

    device = model_management.get_torch_device()
    run()
    finish(device)
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        mesh.control.all_reduce(torch.zeros(1))
        start = time.perf_counter()
        run()
        finish(device)
        seconds.append(time.perf_counter() - start)
    peak = 0 if device.type == "cpu" else torch.get_device_module(device).max_memory_allocated(device)
    return statistics.median(seconds), int(peak)


def add_video(parser: argparse.ArgumentParser) -> None:
    """The size of a video."""
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
