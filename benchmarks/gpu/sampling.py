"""Model calls on 1, 2, ... GPUs against one: load, seconds, memory, difference, and what collectives take.

    python benchmarks/gpu/sampling.py --comfy ROOT [--layers 8] [--frames 81] [--rounds 5] [--gpus 2] [--modes ...]

Run it with a Python that has ComfyUI's packages and gguf; it installs nothing. The checkpoint has the shape of Wan 14B
with fewer layers and random weights, in bf16, its pages in the page cache, and each process is a worker's own: model
mapped and uploaded, plan installed, groups over NCCL. What Ray and the driver add is in benchmarks/pool.py. Plain is
the same model on one GPU, with no plan. A difference is the largest one, over the largest value; NCCL is the part of
a call in which one of its kernels runs on the first GPU, by the profiler, and NCCL alone that in which nothing else
does.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import enter, mesh_of, spawn, timed
from tables import Table

SHAPE = {"dim": 5120, "ffn": 13824}
MODES: Mapping[str, Mapping[str, Any]] = {
    "ulysses": {},
    "ulysses, no overlap": {"overlap": 1},
    "ring": {"ring": True},
    "compiled": {"compile": "inductor"},
    "sharded": {"residency": "sharded"},
    "sharded, no prefetch": {"residency": "sharded", "prefetch": "off"},
    "streamed": {"residency": "streamed"},
}
"""Of several GPUs; compiled runs with Ulysses, on one GPU too."""


@dataclass(frozen=True)
class Options:
    """One run of all processes.

    Attributes:
        mode: key of MODES, "" for plain.
        reference: a file for plain's output.
        trace: how the names of files with profiles begin, "" for none.
    """

    comfy: str
    file: str
    reference: str
    size: int
    mode: str
    frames: int
    height: int
    width: int
    rounds: int
    trace: str


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("--layers", type=int, default=8, help="of 40; one has 0.7 GB")
    add_video(parser)
    parser.add_argument("--rounds", type=int, default=5, help="to take the median of")
    parser.add_argument("--gpus", default="2", help="how many besides one, comma-separated")
    parser.add_argument("--modes", default=";".join(MODES), help="separated by semicolons")
    parser.add_argument("--folder", type=Path, help="for the checkpoint (default: a temporary one)")
    parser.add_argument(
        "--trace", default="", help="print where GPUs spend their time, and write traces, from this path on"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        comfy = str(given.comfy.resolve())
        file = make_wan(given.comfy.resolve(), folder, given.layers)
        warm(file)
        options = Options(
            comfy=comfy,
            file=str(file),
            reference=os.path.join(temporary, "plain.pt"),
            size=1,
            mode="",
            frames=given.frames,
            height=given.height,
            width=given.width,
            rounds=given.rounds,
            trace=given.trace,
        )
        measure(options, [int(size) for size in given.gpus.split(",")], given.modes.split(";"))
    return 0


def measure(options: Options, sizes: list[int], modes: list[str]) -> None:
    """Plain first, then every mode on every number of GPUs."""
    size = os.path.getsize(options.file) / 1e9
    print(f"{size:.2f} GB, {options.frames} frames of {options.width} x {options.height}, median of {options.rounds}")
    table = Table(
        "sampling",
        ["GPUs", "mode", "load s", "GB/s in total", "s per call", "speed-up", "NCCL", "NCCL alone", "GB at most",
         "difference"],
        NCCL=".1%", s=".4f", difference=".1e",
    )  # fmt: skip
    plain = 0.0
    for count, mode in [(1, ""), *((count, mode) for count in sizes for mode in modes)]:
        ranks = spawn(count, on_rank, dataclasses.replace(options, size=count, mode=mode))
        seconds = max(rank["seconds"] for rank in ranks)
        load = max(rank["load"] for rank in ranks)
        plain = plain or seconds
        most = {key: max(rank[key] for rank in ranks) for key in ("peak", "difference")}
        nccl = [ranks[0][key] for key in ("nccl", "nccl_alone")]
        table.row(count, mode or "plain", load, count * size / load, seconds, plain / seconds, *nccl,
                  most["peak"] / 1e9, most["difference"])  # fmt: skip
        if options.trace:
            print(ranks[0]["profile"])


def on_rank(rank: int, store: str, options: Options) -> dict[str, Any]:
    """Load the model as a worker does, and call it."""
    import torch
    from comfy import model_management
    from comfy_raylight.raylight.config import ModelSpec, ParallelConfig, WorkerSettings
    from comfy_raylight.raylight.kernels import chosen
    from comfy_raylight.workers import ghost
    from comfy_raylight.workers.loading import normal_tensors
    from comfy_raylight.workers.model import WorkerModel
    from torch.profiler import ProfilerActivity, profile

    mode = dict(MODES.get(options.mode, {}))
    ring = options.size if mode.pop("ring", False) else 1
    settings = WorkerSettings(compile=mode.pop("compile", ""))
    parallel = ParallelConfig(world=options.size, ulysses=options.size // ring, ring=ring, cfg=1, **mode)
    device = model_management.get_torch_device()
    mesh = mesh_of(parallel, rank, store)
    spec = ModelSpec.of(options.file)
    dtype = ghost.build(spec)[0].get_dtype()
    torch.zeros(1, device=device)  # the context is not the load's
    mesh.control.all_reduce(torch.zeros(1))
    began = time.perf_counter()
    with normal_tensors():
        model = WorkerModel(spec, dtype, mesh, chosen(parallel, device=device))
        model.settle(settings)
        model.make_resident(())
    torch.cuda.synchronize()
    load = time.perf_counter() - began
    generator = torch.Generator(device).manual_seed(0)
    compute = model.patcher.model.manual_cast_dtype or model.patcher.model.get_dtype()
    draw: dict[str, Any] = {"generator": generator, "device": device, "dtype": compute}
    x = torch.randn(1, 16, (options.frames + 3) // 4, options.height // 8, options.width // 8, **draw)
    context = torch.randn(1, 512, 4096, **draw)
    args = (x, torch.tensor([500.0], device=device, dtype=compute), context)

    def call() -> Any:
        # a new dict: models and plans write into it
        return model.run("forward", args, {"transformer_options": {}})

    with torch.inference_mode():
        output = call()
        if settings.compile:
            call()  # what depends on a second call has been compiled as well
        difference = compared(output, options.reference, keep=options.mode == "")
        seconds, peak = timed(call, options.rounds, mesh)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    nccl, alone = collective_seconds(profiler)
    if options.trace:
        profiler.export_chrome_trace(f"{options.trace}-{options.size}-{options.mode or 'plain'}-{rank}.json")
    mesh.control.all_reduce(torch.zeros(1))
    mesh.close()
    return {
        "load": load,
        "seconds": seconds,
        "nccl": nccl / seconds,
        "nccl_alone": alone / seconds,
        "peak": peak,
        "difference": difference,
        "profile": averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70),
    }


def collective_seconds(profiler: Any) -> tuple[float, float]:
    """Seconds in which a kernel of NCCL runs on the GPU, and those in which nothing else does."""
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if str(event.device_type).endswith("CUDA"):
            span = event.time_range
            spans[event.name.startswith("nccl")].append((span.start, span.end))
    joined = {kind: merged(found) for kind, found in spans.items()}
    total = sum(end - start for start, end in joined[True])
    both = sum(end - start for start, end in joined[False])
    every = sum(end - start for start, end in merged(spans[True] + spans[False]))
    return total / 1e6, (every - both) / 1e6


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches of time without overlaps, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def compared(output: Any, file: str, *, keep: bool) -> float:
    """The largest difference to plain's output, which is kept first."""
    import torch

    if keep:
        torch.save(output.cpu(), file)
        return 0.0
    plain = torch.load(file).float()
    return float((output.cpu().float() - plain).abs().max() / plain.abs().max())


def add_video(parser: argparse.ArgumentParser) -> None:
    """The size of what is sampled."""
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)


def make_wan(comfy: Path, folder: Path, layers: int) -> Path:
    """A checkpoint of Wan 14B's shape with so many layers, made where it is not there."""
    file = folder / f"wan{layers}.safetensors"
    if not file.is_file():
        subprocess.run([sys.executable, __file__, "make", str(comfy), str(file), str(layers)], check=True)
    return file


def warm(file: Path) -> None:
    """Have a file's pages in the page cache."""
    with file.open("rb", buffering=0) as reader:
        buffer = bytearray(1 << 24)
        while reader.readinto(buffer):
            pass


def make_file(comfy: str, file: str, layers: str) -> None:
    """Write the checkpoint; in a process of its own."""
    enter(comfy)
    from comfy_raylight.tests.host.checkpoints import Job
    from comfy_raylight.tests.host.checkpoints.make import make

    make(Job(family="wan", path=Path(file), dtype="bfloat16", size={**SHAPE, "layers": int(layers)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make_file(*sys.argv[2:5])
    else:
        sys.exit(main())
