"""Workers that are not equally fast: what parts in proportion to their speeds gain over equal parts, on CPUs.

    python benchmarks/unequal.py --comfy ROOT [--threads 2,1] [--layers 8] [--rounds 5]

Each worker is a process with its own number of threads, over gloo, without Ray; the machine needs as many cores as
there are threads. Speeds are those of a call that each makes alone. `of the sum` is the part of all speeds together
that is reached. A difference is the largest one over the largest value, beside the first worker alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "gpu"), str(ROOT / "tests")]

from host.checkpoints import Job, write  # noqa: E402
from ranks import mesh_of, spawn, timed  # noqa: E402
from sampling import compared  # noqa: E402
from tables import Table  # noqa: E402

SIZE = {"dim": 768, "ffn": 3072}
LATENT = (1, 16, 3, 48, 48)


@dataclass(frozen=True)
class Options:
    """One run of all processes.

    Attributes:
        threads: of each.
        speeds: of each, () for equal parts.
        reference: a file for the first output.
        cpu: no process is to see a GPU.
    """

    comfy: str
    file: str
    threads: tuple[int, ...]
    speeds: tuple[float, ...]
    reference: str
    rounds: int
    cpu: bool = True


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("--threads", default="2,1", help="of each worker, comma-separated")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="to take the median of")
    given = parser.parse_args()
    threads = tuple(map(int, given.threads.split(",")))
    table = Table("unequal", ["threads", "parts", "s per call", "of the sum", "difference"], of=".1%", difference=".1e")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wan.safetensors"
        write([Job(family="wan", path=file, size={**SIZE, "layers": given.layers})], comfy_root=given.comfy.resolve())
        options = Options(
            comfy=str(given.comfy.resolve()),
            file=str(file),
            threads=(),
            speeds=(),
            reference=os.path.join(folder, "first.pt"),
            rounds=given.rounds,
        )
        alone = []
        for count in threads:
            (found,) = spawn(1, on_rank, replace(options, threads=(count,)))
            alone.append(found["seconds"])
            table.row(count, "all", found["seconds"], "", found["difference"])
        together = 1 / sum(1 / seconds for seconds in alone)
        speeds = tuple(round(min(alone) / seconds, 2) for seconds in alone)
        for name, each in (("equal", ()), (" : ".join(map(str, speeds)), speeds)):
            ranks = spawn(len(threads), on_rank, replace(options, threads=threads, speeds=each))
            seconds = max(rank["seconds"] for rank in ranks)
            table.row(given.threads, name, seconds, together / seconds, max(rank["difference"] for rank in ranks))
    return 0


def on_rank(rank: int, store: str, options: Options) -> dict[str, Any]:
    """Load the model as a worker does, and call it."""
    import torch
    from comfy_raylight.raylight.config import ModelSpec, ParallelConfig
    from comfy_raylight.workers.mapping.loading import normal_tensors
    from comfy_raylight.workers.worker.model import WorkerModel

    torch.set_num_threads(options.threads[rank])
    world = len(options.threads)
    mesh = mesh_of(ParallelConfig(world=world, ulysses=world, ring=1, cfg=1, speeds=options.speeds), rank, store)
    with normal_tensors():
        model = WorkerModel(ModelSpec.of(options.file), torch.float32, mesh, None)
        model.make_resident(room=0)
    generator = torch.Generator().manual_seed(0)
    args = (
        torch.randn(LATENT, generator=generator),
        torch.tensor([500.0]),
        torch.randn(1, 512, 4096, generator=generator),
    )

    def call() -> Any:
        return model.run("forward", args, {"transformer_options": {}})

    with torch.inference_mode():
        difference = compared(call(), options.reference, keep=not os.path.exists(options.reference))
        seconds, _ = timed(call, options.rounds, mesh)
    mesh.close()
    return {"seconds": seconds, "difference": difference}


if __name__ == "__main__":
    sys.exit(main())
