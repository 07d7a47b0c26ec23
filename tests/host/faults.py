"""Faults of a running ComfyUI with a pool of two CPU workers, made from outside by process id, and what a user sees."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..decode import files
from . import processes
from .client import ComfyClient, Prompt, PromptError
from .prompts import FAMILIES, INIT, LOADER, Case, PoolCase, pool
from .server import ComfyServer

LIMIT_S = 180.0


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        what: for the table.
        inject: hurts; called while the prompt samples, or before it is queued.
        before: whether it is called before.
        waits: whether it is called when two steps are done.
        expect: what the message must have.
        prompt: what is sampled, by default something long.
        keeps: whether the workers live on; None where that depends on the moment.
    """

    what: str
    inject: Callable[[Stage], None]
    expect: str
    before: bool = False
    waits: bool = True
    prompt: Callable[[Stage], Prompt] | None = None
    keeps: bool | None = False


class Stage:
    """A running ComfyUI, and what the faults do to it.

    Args:
        cluster: address of the Ray cluster that it is to use, "" for one of its own.
        file: the checkpoint, a Wan.
        more: other inputs of RayInitializer.
    """

    def __init__(
        self,
        server: ComfyServer,
        client: ComfyClient,
        *,
        cluster: str = "",
        file: str = "wan.safetensors",
        more: Mapping[str, Any] | None = None,
    ) -> None:
        self.server, self.client = server, client
        self._cluster = cluster or "local"
        self._file = file
        self._more = more or {}
        self._count = 0

    def case(self, **changes: Any) -> Case:
        self._count += 1
        return Case(file=self._file, inputs=FAMILIES["wan"], name=f"run{self._count}", **changes)

    def prompt(self, **changes: Any) -> Prompt:
        """A prompt that ComfyUI has not seen; the end of its schedule is far beyond its steps."""
        changes.setdefault("end", 10000 - self._count)
        where = PoolCase(workers=2, through_model=bool(changes.get("model_nodes")), more=self._more)
        prompt = pool(self.case(**changes), where)
        prompt[INIT]["inputs"]["ray_cluster_address"] = self._cluster
        return prompt

    def good(self) -> bytes:
        """Bytes of the latent of the good prompt."""
        prompt = self.prompt()
        self.client.run(prompt, timeout=LIMIT_S)
        path = self.server.output / f"run{self._count}.safetensors"
        return bytes(path.read_bytes())

    def workers(self) -> list[int]:
        return [process.pid for process in processes.workers(self.server.pid)]

    def of_ray(self, name: str) -> int:
        children = psutil.Process(self.server.pid).children(recursive=True)
        return next(child.pid for child in children if child.name() == name)

    def kill(self, *pids: int, how: int = signal.SIGKILL) -> None:
        for pid in pids:
            os.kill(pid, how)

    def starve(self) -> None:
        """Let the last worker have a little more address space than it has."""
        worker = psutil.Process(self.workers()[-1])
        limit = worker.memory_info().vms + (64 << 20)
        worker.rlimit(resource.RLIMIT_AS, (limit, limit))

    def sampling(self, prompt_id: str) -> None:
        """Wait until the prompt samples."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            events = self.client.events_of(prompt_id)
            if any(event.kind == "progress" and int(event.data["value"]) >= 2 for event in events):
                return
            time.sleep(0.02)
        raise TimeoutError("sampling did not begin")

    @property
    def copy(self) -> Path:
        """A checkpoint that faults may spoil."""
        return Path(self.server.models / "spoiled.safetensors")

    def spoilable(self) -> Prompt:
        shutil.copy(self.server.models / self._file, self.copy)
        prompt = self.prompt(steps=4000)
        prompt["loader"]["inputs"]["unet_name"] = self.copy.name
        return prompt


def cancel_when_busy(stage: Stage) -> None:
    """Cancel when the workers have computed for half a second."""

    def seconds() -> float:
        return sum(psutil.Process(pid).cpu_times().user for pid in stage.workers())

    began = seconds()
    while seconds() - began < 1.0:
        time.sleep(0.02)
    stage.client.interrupt()


def truncate(stage: Stage) -> None:
    os.truncate(stage.copy, 100000)


def raising(rank: int) -> Callable[[Stage], Prompt]:
    """A workflow with a patch inside the model that fails."""
    return lambda stage: stage.prompt(steps=400, model_nodes=(("RLTestFailure", {"rank": rank}),))


def video(height: int, width: int) -> Callable[[Stage], Prompt]:
    """81 frames, of which a step takes seconds (30 x 52) or does not fit into what is left (60 x 104)."""

    def build(stage: Stage) -> Prompt:
        prompt = stage.prompt(steps=400)
        prompt["latent"]["inputs"].update(frames=21, height=height, width=width)
        return prompt

    return build


def one_more(stage: Stage) -> Prompt:
    """A workflow for which a worker has to be started beside those at hand."""
    return pool(stage.case(), PoolCase(workers=len(stage.workers()) + 1))


def cancel_when_starting(stage: Stage) -> None:
    """Cancel as soon as there is a worker that was not there before."""
    before = set(stage.workers())
    while not set(stage.workers()) - before:
        time.sleep(0.02)
    stage.client.interrupt()


def kill_when_starting(stage: Stage) -> None:
    """Kill a worker as soon as there is one that was not there before."""
    before = set(stage.workers())
    while not (new := set(stage.workers()) - before):
        time.sleep(0.02)
    stage.kill(min(new))


def fourth_try(stage: Stage) -> Prompt:
    """A workflow whose pool has failed to start three times, since a worker was killed each time."""
    on_three = PoolCase(workers=3)
    for _ in range(3):
        prompt_id = stage.client.queue(pool(stage.case(), on_three))
        kill_when_starting(stage)
        with contextlib.suppress(PromptError):
            stage.client.wait(prompt_id, timeout=LIMIT_S)
    return pool(stage.case(), on_three)


def stop_control(stage: Stage) -> None:
    """Stop Ray's control service, and cancel what then waits for it."""
    stage.kill(stage.of_ray("gcs_server"), how=signal.SIGSTOP)
    time.sleep(1.0)
    stage.client.interrupt()


def asking(**values: Any) -> Callable[[Stage], Prompt]:
    """A workflow with values of RayInitializer that cannot be."""

    def build(stage: Stage) -> Prompt:
        prompt = stage.prompt()
        prompt[INIT]["inputs"].update(values)
        return prompt

    return build


def wordy(stage: Stage) -> Prompt:
    """A model file whose metadata are 94 MiB of short texts."""
    texts = b"{%s}" % b",".join(b'"%07x":"abc"' % number for number in range(6_100_000))
    header = b'{"__metadata__":%s}' % texts
    stage.copy.write_bytes(len(header).to_bytes(8, "little") + header)
    prompt = stage.prompt()
    prompt["loader"]["inputs"]["unet_name"] = stage.copy.name
    return prompt


def endless(stage: Stage) -> Prompt:
    """A video whose frames fit neither into memory nor on the disk; its latent has half a percent of their size."""
    folder = stage.server.base / "models" / "vae"
    if not (folder / "ltxv.safetensors").is_file():
        files.write(folder, comfy_root=stage.server.comfy)
    room = max(psutil.virtual_memory().available, shutil.disk_usage(tempfile.gettempdir()).free)
    rows = 64  # of 32 pixels, as columns; 8 frames for each of the latent's
    frames = 2 + int(1.2 * room) // (8 * (32 * rows) ** 2 * 3 * 4)
    prompt = stage.prompt()
    size = {"channels": 128, "frames": frames, "height": rows, "width": rows}
    decode = {"ray_actors": [LOADER, 0], "samples": ["latent", 0], "vae_name": "ltxv.safetensors", "vae_dtype": "auto"}
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8, "release_vae": True}
    return {
        **{name: prompt[name] for name in (INIT, LOADER)},
        "latent": {"class_type": "RLTestLatent", "inputs": {**size, "batch": 1, "seed": 5, "empty": True}},
        "decoder": {"class_type": "RayVAEDecodeDistributed", "inputs": {**decode, **tiles}},
        "save": {"class_type": "RLTestSavePixels", "inputs": {"images": ["decoder", 0], "name": "endless"}},
    }


FAULTS: Mapping[str, Fault] = {
    "rank 1": Fault("kill -9 of one worker", lambda s: s.kill(s.workers()[-1]), "died"),
    "rank 0": Fault("kill -9 of the first worker", lambda s: s.kill(s.workers()[0]), "died"),
    "both": Fault("kill -9 of two workers at once", lambda s: s.kill(*s.workers()), "died"),
    "raylet": Fault("kill -9 of Ray's raylet", lambda s: s.kill(s.of_ray("raylet")), "Ray's raylet process ended"),
    "gcs": Fault("kill -9 of Ray's control service", lambda s: s.kill(s.of_ray("gcs_server")), "Ray's gcs_server"),
    "keeper": Fault(
        "kill -9 of the process that runs Ray", lambda s: s.kill(s.of_ray("raylight-keeper")), "Ray's raylight-keeper"
    ),
    "stopped": Fault("a worker stops (SIGSTOP)", lambda s: s.kill(s.workers()[-1], how=signal.SIGSTOP), "stopped"),
    "exception": Fault(
        "a patch raises on one worker, inside the model", lambda s: None, "ValueError", prompt=raising(1), before=True
    ),
    "exceptions": Fault(
        "a patch raises on every worker", lambda s: None, "ValueError", prompt=raising(-1), before=True, keeps=True
    ),
    "memory": Fault("out of memory on one worker", Stage.starve, "memory", prompt=video(60, 104), before=True),
    # within a step a worker touches a page that is gone, and dies; between two, all of them refuse
    "truncated": Fault(
        "the model file is truncated", truncate, "changed while it was in use", prompt=Stage.spoilable, keeps=None
    ),
    "room": Fault(
        "decoded frames fit neither into memory nor on the disk",
        lambda s: None,
        "no room for the decoded frames",
        prompt=endless,
        before=True,
        keeps=True,
    ),
    "crash": Fault(
        "a worker crashes (SIGSEGV)",
        lambda s: s.kill(s.workers()[-1], how=signal.SIGSEGV),
        "crashed, by SIGSEGV",
    ),
    "second": Fault(
        "a worker is killed while a pool starts",
        kill_when_starting,
        "ended while it should",
        prompt=one_more,
        waits=False,
    ),
    "starts": Fault(
        "a pool has failed to start three times",
        lambda s: None,
        "failed to start 3 times",
        prompt=fourth_try,
        before=True,
    ),
    "workers": Fault(
        "`GPU` is 10**12, `ulysses_degree` 7",
        lambda s: None,
        "GPU is larger than any pool can be",
        prompt=asking(GPU=10**12, ulysses_degree=7),
        before=True,
        keeps=True,
    ),
    "cores": Fault(
        "`GPU` is 1,000 on a CPU",
        lambda s: None,
        "more CPU workers than the cores can carry",
        prompt=asking(GPU=1000, ulysses_degree=1),
        before=True,
        keeps=True,
    ),
    "store": Fault(
        "`ray_object_store_gb` is NaN",
        lambda s: None,
        "ray_object_store_gb is no size",
        prompt=asking(ray_object_store_gb=float("nan")),
        before=True,
        keeps=True,
    ),
    "large store": Fault(
        "`ray_object_store_gb` is 1,000,000",
        lambda s: None,
        "ray_object_store_gb is a size that Ray cannot have here",
        prompt=asking(ray_object_store_gb=1e6),
        before=True,
        keeps=True,
    ),
    "metadata": Fault(
        "a model file has 94 MiB of metadata",
        lambda s: None,
        "cannot be loaded",
        prompt=wordy,
        before=True,
        keeps=True,
    ),
    "control": Fault(
        "Cancel while Ray's control service is stopped (SIGSTOP)",
        stop_control,
        "interrupted",
        prompt=one_more,
        waits=False,
    ),
    "cancel at start": Fault(
        "Cancel while a pool starts", cancel_when_starting, "interrupted", prompt=one_more, waits=False
    ),
    "cancel": Fault("Cancel while sampling", lambda s: s.client.interrupt(), "interrupted", keeps=True),
    "cancel in a step": Fault(
        "Cancel within the first step of a large video",
        cancel_when_busy,
        "interrupted",
        prompt=video(30, 52),
        waits=False,
        keeps=True,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        seen: what the user saw.
        to_error: seconds to that.
        to_next: seconds from then to the next picture.
        next: its bytes.
        kept: whether the workers are those of before.
        steps: that were done when it ended.
    """

    seen: str
    to_error: float
    to_next: float
    next: bytes
    kept: bool
    steps: int


def suffer(stage: Stage, fault: Fault) -> Outcome:
    """Make a fault happen, then ask for a good picture."""
    prompt = (fault.prompt or (lambda stage: stage.prompt(steps=4000)))(stage)
    workers = stage.workers()
    if fault.before:
        fault.inject(stage)
    began = time.monotonic()
    prompt_id = stage.client.queue(prompt)
    if not fault.before:
        if fault.waits:
            stage.sampling(prompt_id)
            began = time.monotonic()
        fault.inject(stage)
        began = began if fault.waits else time.monotonic()
    try:
        stage.client.wait(prompt_id, timeout=LIMIT_S)
        seen = "nothing: the picture is finished"
    except PromptError as error:
        seen = error.text if error.kind == "failed" else error.kind
    to_error = time.monotonic() - began
    events = stage.client.events_of(prompt_id)
    steps = max((int(event.data["value"]) for event in events if event.kind == "progress"), default=0)
    began = time.monotonic()
    found = stage.good()
    return Outcome(
        seen=seen,
        to_error=to_error,
        to_next=time.monotonic() - began,
        next=found,
        kept=stage.workers() == workers,
        steps=steps,
    )


def zombies(pid: int) -> list[str]:
    """Children of ComfyUI that have ended and were not waited for."""
    children = psutil.Process(pid).children(recursive=True)
    return [child.name() for child in children if child.status() == psutil.STATUS_ZOMBIE]
