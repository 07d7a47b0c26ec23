"""The pool itself on GPUs, Ray included, against plain ComfyUI on one: steps, overhead, load, memory, kill and cancel.

    python benchmarks/gpu/pool.py --comfy ROOT [--model wan14b:40] [--steps 3] [--rounds 5] [--gpus 2,4]
        [--compile cudagraphs]

Run it with a Python that has ComfyUI's packages, gguf and Ray; it installs nothing. The checkpoint has the shape of its
model (one of a single latent: not LTX-2) with random weights, its pages in the page cache. Both sides sample with
comfy.sample; plain's weights are off the device before a pool starts. Load is what a first run takes longer than later
ones. Overhead is a step's time outside of the workers. Host memory is what the worker processes occupy together (Pss)
beyond what they did before the model was loaded, over the file. A run's own time is what it takes beside its steps,
from runs of one and of all steps. Then a run is cancelled, and a worker is killed in the middle of another; the next
run must give the bits of the first.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import gc
import os
import pstats
import signal
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from models import Choice, Model
from ranks import add_video, enter
from tables import Table

IN_CALL_S = 5.0
"""How long a fault waits for a model call to strike in: short calls leave much of a run's time between them."""


def main() -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("--model", default="wan14b:40", help="name[:layers[:kind]]; a layer of wan14b has 0.7 GB")
    add_video(parser)
    parser.set_defaults(frames=0, height=0, width=0)  # the model's own
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="runs to take the median of")
    parser.add_argument("--gpus", default="2", help="how many, comma-separated; 2cfg are two that share the conditions")
    parser.add_argument("--compile", default="", help="backend of Torch Compile Model (Ray), as cudagraphs")
    parser.add_argument("--profile", action="store_true", help="print where this process spends a run")
    parser.add_argument("--folder", type=Path, help="for the checkpoint (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        choice = Choice.parse(options.model)
        for name, usual in zip(("frames", "height", "width"), choice.model.extent, strict=True):
            setattr(options, name, getattr(options, name) or usual)
        file = choice.file(options.comfy.resolve(), options.folder or Path(temporary))
        enter(str(options.comfy.resolve()))
        import torch

        with torch.inference_mode():
            Bench(options, choice.model, file).run()
    return 0


class Bench:
    """The inputs, what plain ComfyUI makes of them, and the tables."""

    def __init__(self, options: argparse.Namespace, model: Model, file: Path) -> None:
        import torch

        self.options, self.file = options, file
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        latent, _, text, *_ = model.inputs(draw, options.frames, options.height, options.width)
        self.noise = latent[:1]
        self.text = [[[draw(1, *text.shape[1:]), {**model.condition(draw)}]] for _ in range(2)]
        self.plain: dict[float, tuple[float, Any]] = {}

    def sample(self, model: Any, scale: float, steps: int = 0) -> Any:
        """One run, of so many steps, or as many as are asked for."""
        import comfy.sample
        import torch

        positive, negative = self.text
        return comfy.sample.sample(
            model, self.noise, steps or self.options.steps, scale, "euler", "simple", positive, negative,
            torch.zeros_like(self.noise), disable_pbar=True, seed=1,
        )  # fmt: skip

    def timed(self, model: Any, scale: float) -> tuple[float, float, Any]:
        """Medians over runs after a first one, and the samples: seconds per step, and of a run beside its steps."""
        whole, samples = self._runs(model, scale, self.options.steps)
        once, _ = self._runs(model, scale, 1)
        step = (whole - once) / max(1, self.options.steps - 1)
        return whole / self.options.steps, once - step, samples

    def _runs(self, model: Any, scale: float, steps: int) -> tuple[float, Any]:
        found = []
        for _ in range(self.options.rounds + 1):
            began = time.perf_counter()
            samples = self.sample(model, scale, steps)
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:]), samples

    def run(self) -> None:
        """Plain, then every pool."""
        import comfy.sd
        from comfy import model_management

        ways = [(name, int(name.removesuffix("cfg"))) for name in self.options.gpus.split(",")]
        scales = sorted({4.0 if name.endswith("cfg") else 1.0 for name, _ in ways})
        size = self.file.stat().st_size
        print(f"{size / 1e9:.2f} GB, {self.options.frames} frames of {self.options.width} x {self.options.height}, "
              f"{self.options.steps} steps, medians of {self.options.rounds} runs")  # fmt: skip
        began = time.perf_counter()
        model: Any = comfy.sd.load_diffusion_model(str(self.file))
        model_management.load_models_gpu([model], force_full_load=True)
        load = time.perf_counter() - began
        table = Table(
            "pool",
            ["GPUs", "cfg", "start s", "load s", "GB/s in total", "s per step", "speed-up", "own s of a run",
             "overhead ms per call", "recorded calls", "host memory of the file", "difference"],
            difference=".1e", overhead=".2f", start=".1f",
        )  # fmt: skip
        for scale in scales:
            seconds, own, samples = self.timed(model, scale)
            self.plain[scale] = seconds, samples
            table.row("plain", scale, 0.0, load, size / load / 1e9, seconds, 1.0, own, 0.0, 0, "", 0.0)
        del model
        model_management.unload_all_models()
        gc.collect()
        model_management.soft_empty_cache()
        for name, world in ways:
            self.pool(table, name, world, size)
        self.faults(ways[0][1])

    def config(self, name: str, world: int) -> Any:
        """Two groups at most share the conditions; the rest is Ulysses."""
        from comfy_raylight.raylight.config import ParallelConfig, PoolConfig

        cfg = 2 if name.endswith("cfg") else 1
        return PoolConfig(parallel=ParallelConfig(world=world, ulysses=world // cfg, ring=1, cfg=cfg))

    def load(self, config: Any) -> Any:
        """The model on a pool, as a user's nodes make it."""
        from comfy_raylight.raylight.config import ModelSpec
        from comfy_raylight.workers.driver import remote

        model = remote.load_model(config, ModelSpec.of(self.file))
        return remote.with_settings(model, compile=self.options.compile) if self.options.compile else model

    def pool(self, table: Table, name: str, world: int, size: int) -> None:
        """One row."""
        from comfy_raylight.tests.weights.memory import proportional
        from comfy_raylight.workers.driver import remote, report
        from comfy_raylight.workers.pool import pool as pools

        scale = 4.0 if name.endswith("cfg") else 1.0
        began = time.perf_counter()
        config = self.config(name, world)
        pids = [member.place.pid for member in remote.start_pool(config).members]
        start = time.perf_counter() - began
        before = proportional(pids)
        began = time.perf_counter()
        model = self.load(config)
        self.sample(model, scale)
        first = time.perf_counter() - began
        held = (proportional(pids) - before) / size
        if self.options.profile:
            profiled(lambda: self.sample(model, scale))
        traffic = dataclasses.replace(model.rpc.traffic())  # it goes on counting
        seconds, own, samples = self.timed(model, scale)
        spent = model.rpc.traffic().since(traffic)
        plain, expected = self.plain[scale]
        difference = float((samples - expected).abs().max() / expected.abs().max())
        load = first - seconds * self.options.steps
        recorded = sum(known.recorded for known in report.collect(model.rpc).workers[0].models)
        overhead = (spent.seconds - spent.worker_seconds) / spent.calls * 1e3
        print(f"a call: {spent.seconds / spent.calls:.4f} s, in the workers {spent.worker_seconds / spent.calls:.4f} s")
        speeds = seconds, plain / seconds, own
        table.row(name, scale, start, load, world * size / load / 1e9, *speeds, overhead, recorded, held, difference)
        pools.close_all()

    def faults(self, world: int) -> None:
        """Cancel, then kill; what a user sees, how soon, and whether the next run is as the first."""
        import torch
        from comfy import model_management
        from comfy_raylight.workers.driver import remote

        config = self.config("", world)
        model = self.load(config)
        expected = self.sample(model, 1.0)
        step = self.plain[1.0][0] / world

        victim = remote.start_pool(config).members[-1]

        def kill() -> None:
            os.kill(victim.place.pid, signal.SIGKILL)

        table = Table("faults", ["fault", "s to the error", "error", "s to the next result", "equal bits"])
        for name, hurt in (("cancel", model_management.interrupt_current_processing), ("kill a worker", kill)):
            struck: list[float] = []

            def strike(hurt: Any = hurt, struck: list[float] = struck) -> None:
                until = time.monotonic() + IN_CALL_S
                while not victim.busy and time.monotonic() < until:
                    time.sleep(0)
                struck.append(time.perf_counter())
                hurt()

            timer = threading.Timer(step * 1.5, strike)
            timer.start()
            seen = "none"
            try:
                self.sample(model, 1.0)
            except BaseException as error:
                seen = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ended = time.perf_counter()
            timer.join()
            model_management.interrupt_current_processing(False)
            began = time.perf_counter()
            equal = bool(torch.equal(self.sample(model, 1.0), expected))
            table.row(name, ended - struck[0], seen, time.perf_counter() - began, equal)
        remote.end_pools(ray=True)


def profiled(action: Any) -> None:
    """Print what takes the time of an action, without what it waits for."""
    profiler = cProfile.Profile()
    profiler.runcall(action)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(22)


if __name__ == "__main__":
    sys.exit(main())
