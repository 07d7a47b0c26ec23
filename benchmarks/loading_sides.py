"""The two sides of benchmarks/loading.py: plain ComfyUI in processes of its own, and the pool."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import environment

STRENGTH = 0.5
TOKENS = 8

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Plain:
    """ComfyUI's own loader, in processes of its own."""

    name = "plain"

    def __init__(self, count: int, tiny: Sequence[Path]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve_plain, args=(theirs, sys.path[0], threads, TOKENS // count), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of the process is seen
            self._pipes.append(mine)
            self._processes.append(process)
        self.pids = [process.pid for process in self._processes]
        self.load(tiny[0])
        self.forward()
        self.release()

    def load(self, path: Path) -> None:
        self._each("load", path)

    def forward(self) -> None:
        self._each("forward")

    def offload(self) -> None:
        self._each("offload")

    def resume(self) -> float:
        """Make the model ready for a forward; the seconds until that could start."""
        return timed(lambda: self._each("resume"))

    def patch(self, stays: Path, others: Sequence[Path], *, stock: bool = True) -> None:
        """Make sets of two LoRAs known, one for each of the others; with nodes of ComfyUI, or Ray nodes."""
        assert stock
        self._each("patch", stays, others)

    def switch(self, number: int) -> tuple[float, int]:
        """Use one of the sets: seconds until a forward can start, and bytes sent for it."""
        return timed(lambda: self._each("switch", number)), 0

    def release(self) -> None:
        self._each("release")

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join()

    def _each(self, verb: str, *arguments: Any) -> None:
        for pipe in self._pipes:
            pipe.send((verb, *arguments))
        for pipe in self._pipes:
            failure = pipe.recv()
            if failure:
                raise RuntimeError(f"plain ComfyUI failed to {verb}: {failure}")


def serve_plain(pipe: Connection, root: str, threads: int, tokens: int) -> None:
    """A process of plain ComfyUI: answers verbs until its pipe is closed."""
    environment.boot(Path(root))
    import torch

    torch.set_num_threads(threads)
    with torch.inference_mode():  # as ComfyUI runs nodes
        worker = PlainWorker(tokens)
        while True:
            try:
                verb, *arguments = pipe.recv()
            except EOFError:
                return
            try:
                getattr(worker, verb)(*arguments)
                pipe.send("")
            except Exception as error:
                pipe.send(repr(error))


class PlainWorker:
    """What ComfyUI's own nodes do, in one process."""

    def __init__(self, tokens: int) -> None:
        self._inputs = inputs(tokens)
        self._patcher: Any = None
        self._sets: list[Any] = []

    def load(self, path: Path) -> None:
        import comfy.sd
        import comfy.utils
        from comfy_raylight.raylight.config import ModelSpec
        from comfy_raylight.workers.mapping.loading import load_options

        options, keywords = load_options(ModelSpec.of(path))
        state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        self._patcher = comfy.sd.load_diffusion_model_state_dict(state, options, metadata=metadata, **keywords)
        self.resume()

    def forward(self) -> None:
        args, kwargs = self._inputs
        self._patcher.model.diffusion_model(*args, **kwargs)

    def offload(self) -> None:
        from comfy import model_management

        model_management.unload_all_models()

    def resume(self) -> None:
        from comfy import model_management

        model_management.load_models_gpu([self._patcher])

    def patch(self, stays: Path, others: Sequence[Path]) -> None:
        first = stock_lora(self._patcher, stays)
        self._sets = [stock_lora(first, path) for path in others]

    def switch(self, number: int) -> None:
        from comfy import model_management

        model_management.load_models_gpu([self._sets[number]])

    def release(self) -> None:
        from comfy import model_management

        self.offload()
        self._patcher, self._sets = None, []
        gc.collect()
        model_management.cleanup_models_gc()
        model_management.soft_empty_cache()


class Pool:
    """The pool, its workers started. A model that is not used any more goes when a tiny one is loaded."""

    name = "pool"

    def __init__(self, count: int, tiny: Sequence[Path]) -> None:
        from comfy_raylight.raylight.config import ParallelConfig, PoolConfig
        from comfy_raylight.workers.driver import remote

        self._config = PoolConfig(parallel=ParallelConfig(world=count, ulysses=count, ring=1, cfg=1), models_kept=1)
        self.pids = [member.place.pid for member in remote.start_pool(self._config).members]
        self._inputs = inputs(TOKENS)
        self._tiny = tiny
        self._turn = 0
        self._model: Any = None
        self._held: Any = None
        self._sets: list[Any] = []
        self.load(self._tiny[0])
        self.forward()
        self.release()

    def load(self, path: Path) -> None:
        self._model = self._loaded(path)

    def forward(self) -> None:
        self._call(self._model)

    def offload(self) -> None:
        from comfy_raylight.workers.driver import remote

        remote.offload(self._model)

    def resume(self) -> float:
        return self._call(self._model)

    def patch(self, stays: Path, others: Sequence[Path], *, stock: bool = True) -> None:
        add = stock_lora if stock else ray_lora
        first = add(self._model, stays)
        self._sets = [add(first, path) for path in others]

    def switch(self, number: int) -> tuple[float, int]:
        traffic = self._model.rpc.traffic()
        before = traffic.bytes_sent
        return self._call(self._sets[number]), traffic.bytes_sent - before

    def release(self) -> None:
        self._model, self._sets, self._held = None, [], None
        gc.collect()
        self._turn = 1 - self._turn
        self._held = self._loaded(self._tiny[self._turn])

    def close(self) -> None:
        from comfy_raylight.workers.pool import pool

        self._model, self._sets, self._held = None, [], None
        pool.close_all()

    def _loaded(self, path: Path) -> Any:
        from comfy_raylight.raylight.config import ModelSpec
        from comfy_raylight.workers.driver import remote

        return remote.load_model(self._config, ModelSpec.of(path))

    def _call(self, patcher: Any) -> float:
        """One forward; the seconds of it that were not the model's own."""
        args, kwargs = self._inputs
        traffic = patcher.rpc.traffic()
        before = traffic.worker_seconds
        seconds = timed(lambda: patcher.rpc.call(patcher, "_forward", args, kwargs))
        return seconds - (traffic.worker_seconds - before)


Side = Plain | Pool


def inputs(tokens: int) -> Arguments:
    """Arguments of a Wan model's forward on so many tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 1, 2, 2 * tokens, generator=generator)
    context = torch.randn(1, 8, 4096, generator=generator)
    options = {"sigmas": torch.ones(1), "cond_or_uncond": [0]}
    return (x, torch.tensor([500.0]), context), {"transformer_options": options}


def stock_lora(patcher: Any, path: Path) -> Any:
    """What LoraLoaderModelOnly makes of a MODEL."""
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    return comfy.sd.load_lora_for_models(patcher, None, state, STRENGTH, 0)[0]


def ray_lora(model: Any, path: Path) -> Any:
    """What RayLoraLoaderModelOnly and its chain make of it."""
    from comfy_raylight.workers.driver.loras import Lora, with_loras

    return with_loras(model, (Lora(str(path), STRENGTH),))


def timed(act: Callable[[], object]) -> float:
    """Seconds it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
