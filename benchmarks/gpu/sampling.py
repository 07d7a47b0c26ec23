"""Model calls on 1, 2, ... GPUs against one: load, seconds, memory, difference, and what collectives take.

    python benchmarks/gpu/sampling.py --comfy ROOT [--models "wan14b:8;flux:5:Q8_0"] [--rounds 5] [--gpus 2]
        [--modes ...] [--turns 2]

Run it with a Python that has ComfyUI's packages and gguf; it installs nothing. A checkpoint has the shape of its model,
with as many layers as are asked for, and random weights, its pages in the page cache, and each process is a worker's
own: model mapped and uploaded, plan installed, groups over NCCL. What Ray and the driver add is in pool.py. Plain is
the same file on one GPU, with no plan. A difference is the largest one, over the largest value; NCCL is the part of
a call in which one of its kernels runs on the first GPU, by the profiler, and NCCL alone that in which nothing else
does.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from models import MODELS, Choice
from ranks import mesh_of, spawn, timed
from tables import Table

MODES: Mapping[str, Mapping[str, Any]] = {
    "ulysses": {},
    "ulysses, no overlap": {"overlap": 1},
    "ring": {"ring": True},
    "cudnn": {"attention": "TORCH_CUDNN"},
    "compiled": {"compile": "inductor"},
    "recorded": {"compile": "cudagraphs"},
    "sharded": {"residency": "sharded"},
    "sharded, no prefetch": {"residency": "sharded", "prefetch": "off"},
    "streamed": {"residency": "streamed"},
    "each alone": {"alone": True},
}
"""Of several GPUs; compiled and recorded run with Ulysses, on one GPU too. Each alone is plain on all of them at once:
GPUs differ, and those that share a call go with the slowest."""


@dataclass(frozen=True)
class Options:
    """One run of all processes.

    Attributes:
        mode: key of MODES, "" for plain.
        reference: a file for plain's output.
        extent: frames, height and width in pixels.
        turns: in which Ulysses exchanges, where the mode does not say; 0 chooses.
        trace: how the names of files with profiles begin, "" for none.
    """

    comfy: str
    choice: Choice
    file: str
    reference: str
    size: int
    mode: str
    extent: tuple[int, int, int]
    rounds: int
    turns: int
    trace: str


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument(
        "--models", default="wan14b:8", help=f"name[:layers[:kind]] of {', '.join(MODELS)}, separated by semicolons"
    )
    parser.add_argument("--extent", help="frames x height x width in pixels, as 81x480x832 (default: usual ones)")
    parser.add_argument("--rounds", type=int, default=5, help="to take the median of")
    parser.add_argument("--gpus", default="2", help="how many besides one, comma-separated")
    parser.add_argument("--modes", default=";".join(MODES), help="separated by semicolons")
    parser.add_argument("--turns", type=int, default=0, help="in which Ulysses exchanges heads (default: as the pool)")
    parser.add_argument("--table", default="sampling", help="name of its JSON file")
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: a temporary one)")
    parser.add_argument(
        "--trace", default="", help="print where GPUs spend their time, and write traces, from this path on"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        comfy = given.comfy.resolve()
        table = Table(
            given.table,
            ["model", "GB", "GPUs", "mode", "load s", "GB/s in total", "s per call", "speed-up", "NCCL", "NCCL alone",
             "GB at most", "difference"],
            NCCL=".1%", s=".4f", difference=".1e", GB=".1f",
        )  # fmt: skip
        for choice in map(Choice.parse, given.models.split(";")):
            frames, height, width = map(int, given.extent.split("x")) if given.extent else choice.model.extent
            options = Options(
                comfy=str(comfy),
                choice=choice,
                file=str(choice.file(comfy, folder)),
                reference=os.path.join(temporary, "plain.pt"),
                size=1,
                mode="",
                extent=(frames, height, width),
                rounds=given.rounds,
                turns=given.turns,
                trace=given.trace,
            )
            measure(table, options, [int(size) for size in given.gpus.split(",")], given.modes.split(";"))
    return 0


def measure(table: Table, options: Options, sizes: list[int], modes: list[str]) -> None:
    """Plain first, then every mode on every number of GPUs."""
    size = os.path.getsize(options.file) / 1e9
    plain = 0.0
    for count, mode in [(1, ""), *((count, mode) for count in sizes for mode in modes)]:
        ranks = spawn(count, on_rank, dataclasses.replace(options, size=count, mode=mode))
        seconds = max(rank["seconds"] for rank in ranks)
        load = max(rank["load"] for rank in ranks)
        plain = plain or seconds
        most = {key: max(rank[key] for rank in ranks) for key in ("peak", "difference")}
        nccl = [ranks[0][key] for key in ("nccl", "nccl_alone")]
        loading = load, count * size / load
        cells = seconds, plain / seconds, *nccl, most["peak"] / 1e9, most["difference"]
        table.row(str(options.choice), size, count, mode or "plain", *loading, *cells)
        if options.trace:
            print(ranks[0]["profile"])


def on_rank(rank: int, store: str, options: Options) -> dict[str, Any]:
    """Load the model as a worker does, and call it."""
    import torch
    from comfy import model_management
    from comfy_raylight.raylight.config import ModelSpec, ParallelConfig, WorkerSettings
    from comfy_raylight.raylight.sequence.kernels import chosen
    from comfy_raylight.workers.mapping import meta_model
    from comfy_raylight.workers.mapping.loading import normal_tensors
    from comfy_raylight.workers.wire.link_test import finish
    from comfy_raylight.workers.worker.model import WorkerModel
    from torch.profiler import ProfilerActivity, profile

    mode = {"overlap": options.turns, **MODES.get(options.mode, {})}
    if mode.pop("alone", False):
        return on_rank(0, f"{store}-{rank}", dataclasses.replace(options, size=1, mode="plain"))
    ring = options.size if mode.pop("ring", False) else 1
    settings = WorkerSettings(compile=mode.pop("compile", ""))
    parallel = ParallelConfig(world=options.size, ulysses=options.size // ring, ring=ring, cfg=1, **mode)
    device = model_management.get_torch_device()
    mesh = mesh_of(parallel, rank, store)
    spec = ModelSpec.of(options.file)
    dtype = meta_model.build(spec)[0].get_dtype()
    torch.zeros(1, device=device)  # the context is not the load's
    mesh.control.all_reduce(torch.zeros(1))
    began = time.perf_counter()
    with normal_tensors():
        model = WorkerModel(spec, dtype, mesh, chosen(parallel, device=device))
        model.settle(settings)
        model.make_resident(room=0)
    finish(device)
    load = time.perf_counter() - began
    generator = torch.Generator(device).manual_seed(0)
    compute = model.patcher.model.manual_cast_dtype or model.patcher.model.get_dtype()
    draw: dict[str, Any] = {"generator": generator, "device": device, "dtype": compute}
    args, others = (options.choice.model.inputs(partial(torch.randn, **draw), *options.extent) for _ in range(2))

    once = options.choice.model.once(*options.extent)

    def call(args: Any = args) -> Any:
        # a new dict: models and plans write into it
        return model.run("forward", args, {"transformer_options": {}, **once})

    with torch.inference_mode():
        # a first call is no measure: ComfyUI 0.33's first attention in a process takes another kernel than all later
        # ones, and what depends on a second call is to be compiled or recorded as well
        for _ in range(3 if settings.compile else 1):
            call(others)
        difference = compared(call(), options.reference, keep=options.mode == "")
        seconds, peak = timed(call, options.rounds, mesh)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            finish(device)
    averages = profiler.key_averages()
    nccl, alone = collective_seconds(profiler)
    if options.trace:
        profiler.export_chrome_trace(f"{options.trace}-{options.size}-{options.mode or 'plain'}-{rank}.json")
    mesh.control.all_reduce(torch.zeros(1))
    model.forget_recordings()  # NCCL waits for graphs that have collectives in them
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

    whole = torch.cat([part.flatten() for part in (output if isinstance(output, list | tuple) else [output])]).cpu()
    if keep:
        torch.save(whole, file)
        return 0.0
    plain = torch.load(file).float()
    return float((whole.float() - plain).abs().max() / plain.abs().max())


if __name__ == "__main__":
    sys.exit(main())
