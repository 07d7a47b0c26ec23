"""Worker models whose blocks are divided over N ranks, beside ComfyUI's own and resident ones.

    divided.py COMFY_ROOT OUT.json CHECKPOINT [CHECK ...]

References are computed in one process of ComfyUI, from which the ranks are forked. The checkpoint is a small Wan model
in float32 with several blocks.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from comfy_raylight.raylight.mesh import Mesh
    from comfy_raylight.workers.worker.model import WorkerModel

sys.path.append(str(Path(__file__).resolve().parents[2] / "workers" / "import_root"))

from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.weights.adapters import write_adapter
from comfy_raylight.tests.weights.bench import Bench, apart, boot, forward, inputs
from comfy_raylight.tests.weights.files import KITCHEN, absent, write_gguf, write_variant

TOLERANCE = 1e-5
EFFECT = 1e-3
KINDS = ("sharded", "streamed")
FILES = (
    "fp32",
    "bf16",
    "fp16",
    "fp8",
    "mixed",
    "prefixed",
    "scaled",
    "layers",
    "comfy_quant",
    *KITCHEN,
    "Q8_0",
    "Q4_K",
    "IQ4_XS",
)
PATCHED = ("fp32", "bf16", "scaled", "layers", "comfy_quant", *KITCHEN, "Q8_0")
WIDER = 5
"""Number of the patch set that makes weights of blocks larger."""
SLACK_BYTES = 2 << 20
SETTLED_S = 20.0
RANKS = (2, 3, 4)
SOME = FILES if LARGE else ("bf16", "scaled", "layers", "comfy_quant", "Q8_0")
CHAINED = PATCHED if LARGE else ("bf16", "scaled", "int8_convrot", "nvfp4", "Q8_0")
MORE = RANKS if LARGE else RANKS[:2]
CHECKS = [
    *(f"{kind} file {name} on 2" for kind in KINDS for name in SOME),
    *(f"{kind} file {name} on {n}" for kind in KINDS for n in RANKS[1:] for name in (FILES if LARGE else ("scaled",))),
    *(f"{kind} patches of {name} on {n}" for kind in KINDS for n in RANKS[: 3 if LARGE else 1] for name in CHAINED),
    *(f"{kind} {what} on {n}" for kind in KINDS for n in MORE for what in ("call", "memory")),
    "error of one rank on 3",
    "refusals on 2",
]


class Absent(Exception):
    """This ComfyUI does not have what the check is about."""


def must(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


class Story:
    """Files and patch sets, and what they give with all weights in one process.

    Attributes:
        plain: ComfyUI's own result by (file, number of the patch set).
        whole: that of a worker's model whose weights are resident.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.paths: dict[str, Path] = {}
        self.plain: dict[tuple[str, int], torch.Tensor] = {}
        self.whole: dict[tuple[str, int], torch.Tensor] = {}
        self.patches: dict[tuple[str, int], Any] = {}
        self.absent: dict[str, str] = {}

    def prepare(self, names: list[str]) -> None:
        from comfy_raylight.tests.weights.driver import patched

        bench = self.bench
        files = [
            write_adapter(bench.base, bench.path(), kind, seed=seed, part=part)
            for seed, (kind, part) in enumerate((("lora", "attn"), ("lora", "ffn"), ("diff", "blocks.1.")))
        ]
        sets = [[], [(files[0], 0.7)], [(files[0], 0.7), (files[1], -0.5)], [(files[2], 0.5)], [(files[1], -0.5)], []]
        for name in names:
            if absent(name):
                self.absent[name] = absent(name)
                continue
            if name[0] in "QI":
                self.paths[name], state = write_gguf(bench.base, bench.path(".gguf"), name)
                plain = bench.plain_state(state)
            else:
                self.paths[name] = write_variant(bench.base, bench.path(), name)
                plain = bench.plain(self.paths[name])
            model = bench.mapped(self.paths[name])
            for number, chain in enumerate(sets if name in PATCHED else sets[:1]):
                wanted = patched(plain, *chain) if number != WIDER else wider(plain)
                self.plain[name, number] = bench.run(wanted)
                self.patches[name, number] = wanted.patches
                put(model, self.patches[name, number], number)
                self.whole[name, number] = bench.run(model)
            model.close()


def wider(patcher: Any) -> Any:
    """A clone of a plain patcher whose feed forwards are wider."""
    import torch

    clone, generator = patcher.clone(), torch.Generator().manual_seed(3)
    added = {"ffn.0.weight": (64, 0), "ffn.0.bias": (64,), "ffn.2.weight": (0, 64)}
    for key, weight in patcher.model.named_parameters():
        more = added.get(".".join(key.split(".")[-3:]))
        if more is not None:
            shape = [size + add for size, add in zip(weight.shape, more, strict=True)]
            diff = torch.randn(shape, generator=generator) / shape[-1]
            clone.add_patches({key: ("diff", (diff, {"pad_weight": True}))})
    return clone


def put(model: WorkerModel, patches: Any, number: int) -> None:
    """Replace a model's patches, as the driver does."""
    from comfy_raylight.workers.mapping.loading import normal_tensors

    with normal_tensors():
        model.patch(f"set {number}" if patches else "", dict(patches), {}, force_cast=False)


def run(model: WorkerModel) -> torch.Tensor:
    """The model's output, computed by this rank alone from gathered blocks."""
    from comfy_raylight.workers.mapping.loading import normal_tensors

    with model.agreed(), normal_tensors():
        model.make_resident(room=model.activations(inputs()[0]))
    with blocks_of(model).rotation.call("forward"):
        return forward(model.patcher.model)


def blocks_of(model: WorkerModel) -> Any:
    """What is divided of it."""
    assert model._blocks is not None
    return model._blocks


class Rank:
    """What one rank checks on its mesh."""

    def __init__(self, story: Story, mesh: Mesh) -> None:
        self.story = story
        self.mesh = mesh

    def model(self, name: str, **more: Any) -> WorkerModel:
        if name in self.story.absent:
            raise Absent(self.story.absent[name])
        return self.story.bench.mapped(self.story.paths[name], mesh=self.mesh, **more)

    def file(self, name: str) -> None:
        story, model = self.story, self.model(name)
        wanted = story.whole[name, 0]
        for turn in range(2):
            got = run(model)
            must(bool((got == wanted).all()), f"call {turn} is {apart(got, wanted):.1e} off resident weights")
        must(apart(got, story.plain[name, 0]) <= TOLERANCE, f"{apart(got, story.plain[name, 0]):.1e} off ComfyUI's")
        self.sizes(model)
        model.offload()
        must(all(home.at_home for home in model._homes.values()), "not every parameter is at home after an offload")
        must(blocks_of(model).bytes == 0, "something is held after an offload")
        must(bool((run(model) == wanted).all()), "after an offload the result is another one")
        model.close()

    def sizes(self, model: WorkerModel) -> None:
        """Storages that are held are the computed sum."""
        blocks = blocks_of(model)
        held = {}
        for key in blocks.inside:
            for tensor in (model._homes[key].parameter.data,):
                data = getattr(tensor, "_qdata", tensor)
                held[data.untyped_storage().data_ptr()] = data.untyped_storage().nbytes()
        stubs = sum(held.values())
        must(stubs <= 8 * len(blocks.inside), f"placeholders hold {stubs} bytes")
        needed = blocks.footprint(0)
        must(blocks.bytes == needed.total, f"{blocks.bytes} bytes are held, {needed} were computed")
        must(model.resident_bytes == model.size, f"{model.resident_bytes} of {model.size} bytes are said to be loaded")

    def patches(self, name: str) -> None:
        story, model = self.story, self.model(name)
        for number in (1, 2, 0, 3, WIDER, 1, 4, 0):
            put(model, story.patches[name, number], number)
            got, wanted = run(model), story.whole[name, number]
            must(bool((got == wanted).all()), f"set {number} is {apart(got, wanted):.1e} off resident weights")
            must(apart(got, story.plain[name, number]) <= TOLERANCE, f"set {number} is off ComfyUI's")
            must(not number or apart(got, story.whole[name, 0]) > EFFECT, f"set {number} has no effect")
            self.sizes(model)
        put(model, story.patches[name, 2], 2)
        before = run(model)
        model.offload()
        must(all(home.at_home for home in model._homes.values()), "not every parameter is at home after an offload")
        must(bool((run(model) == before).all()), "after an offload the result is another one")
        model.close()

    def call(self) -> None:
        """As a worker's request runs it: the sequence divided as well, two models in turn, and cancelled in between."""
        import torch
        from comfy_raylight.raylight.errors import Cancelled
        from comfy_raylight.workers.mapping.loading import normal_tensors

        models = {name: self.model(name) for name in ("fp32", "bf16")}
        args, kwargs = inputs()

        def call(name: str, cancelled: Callable[[], bool] = lambda: False) -> torch.Tensor:
            model = models[name]
            with normal_tensors():
                model.make_resident(room=model.activations(args))
            with torch.inference_mode():
                output: torch.Tensor = model.run("_forward", args, kwargs, cancelled)
            return output.clone()

        for name in ("fp32", "bf16", "fp32", "fp32", "bf16"):
            found = apart(call(name), self.story.plain[name, 0])
            must(found <= TOLERANCE, f"{name} is {found:.1e} off ComfyUI's")
        asked = iter([False, True, *[True] * 100])
        try:
            call("fp32", lambda: next(asked))
        except Cancelled:
            pass
        else:
            raise AssertionError("it was not cancelled")
        self.sizes(models["fp32"])
        must(apart(call("fp32"), self.story.plain["fp32", 0]) <= TOLERANCE, "after a cancel the result is another one")
        for model in models.values():
            model.close()

    def memory(self) -> None:
        """The kernel's count of this process's own memory agrees with the sum."""
        from comfy_raylight.tests.weights.memory import private
        from comfy_raylight.workers.worker import memory

        model = self.model("large")
        run(model)
        model.offload()
        me = [os.getpid()]

        def own() -> int:
            memory.give_back()  # or freed heap would take what is opened again
            return private(me)

        before = own()
        for _ in range(20):  # gloo's threads drop their copies of a block after they have said that it is there
            time.sleep(0.05)
            before = min(before, own())
        run(model)
        needed, deadline = blocks_of(model).footprint(0).total, time.monotonic() + SETTLED_S
        while True:
            grown = own() - before
            if abs(grown - needed) <= SLACK_BYTES or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        must(abs(grown - needed) <= SLACK_BYTES, f"grew by {grown} bytes, {needed} were computed")
        model.close()


def error_of_one_rank(rank: Rank) -> None:
    """Where one rank cannot read its parts all of them fail, with nothing under way; the next call works."""
    from comfy_raylight.raylight.errors import LoadError

    def fails(slices: Any) -> Any:  # a disk's error, which cannot be provoked for one process
        raise OSError(5, "Input/output error")

    model = rank.model("fp32")
    read, before = blocks_of(model)._read, rank.mesh.collectives
    if rank.mesh.rank == 1:
        blocks_of(model)._read = fails
    try:
        run(model)
    except LoadError as error:
        must(rank.mesh.rank != 1 and "Worker 1 has no room" in str(error), f"another error: {error}")
    except OSError:
        must(rank.mesh.rank == 1, "an error of a rank that can read")
    else:
        raise AssertionError("no error")
    must(rank.mesh.collectives == before, "a rank has entered a collective")
    must(rank.mesh.rank != 1 or blocks_of(model).bytes == 0, "what could not be opened holds something")
    blocks_of(model)._read = read
    must(bool((run(model) == rank.story.whole["fp32", 0]).all()), "after that the result is another one")
    model.close()


def refusals(rank: Rank) -> None:
    """What cannot be is said before a collective."""
    from comfy_raylight.raylight.config import WorkerSettings
    from comfy_raylight.raylight.errors import ConfigError

    before = rank.mesh.collectives
    for what, words in (
        (lambda: rank.model("few blocks"), ("FSDP would take more memory than it frees", "its 2 blocks", "off")),
        (lambda: rank.model("fp32").settle(WorkerSettings(compile="cudagraphs")), ("cudagraphs", "sharded")),
    ):
        try:
            what()
        except ConfigError as error:
            must(all(word in str(error) for word in words), f"another error: {error}")
        else:
            raise AssertionError(f"no error that says {words}")
    must(rank.mesh.collectives == before, "a rank has entered a collective")


def checked(rank: Rank, check: str) -> str:
    """What is wrong, "" for nothing."""
    words = check.split()
    try:
        if words[1] in ("file", "patches"):
            name = words[2] if words[1] == "file" else words[3]
            (rank.file if words[1] == "file" else rank.patches)(name)
        elif words[1] in ("call", "memory"):
            getattr(rank, words[1])()
        else:
            (refusals if words[0] == "refusals" else error_of_one_rank)(rank)
    except Absent as absent:
        return f"absent: {absent}"
    except Exception as error:
        logging.exception("%s", check)
        return f"{type(error).__name__}: {error}"
    return ""


def work(rank: int, size: int, path: str, story: Story, job: tuple[str, list[str]]) -> dict[str, str]:
    """One rank: its findings by the name of the check."""
    from comfy_raylight.raylight.config import ParallelConfig
    from engine.ranks import mesh_of

    kind, checks = job
    parallel = ParallelConfig(world=size, ulysses=size, ring=1, cfg=1, residency=kind)
    mesh = mesh_of(parallel, rank=rank, path=path)
    found: dict[str, str] = {}
    me = Rank(story, mesh)
    for check in checks:
        found[check] = checked(me, check)
    mesh.close()
    return found


def _result(found: dict[int, Any], check: str) -> dict[str, str]:
    """What all ranks say of a check."""
    said = {rank: table if isinstance(table, str) else table[check] for rank, table in found.items()}
    wrong = "; ".join(f"rank {rank}: {text}" for rank, text in said.items() if text)
    sys.stderr.write(f"{check}: {wrong or 'good'}\n")
    if wrong and all(text.startswith("absent") for text in said.values()):
        return {"absent": wrong}
    return {"failed": wrong} if wrong else {}


def main() -> None:
    root, out, base = (Path(word).resolve() for word in sys.argv[1:4])
    only = sys.argv[4:]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    boot(root)
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from engine.ranks import fork

    checks = [check for check in CHECKS if not only or any(word in check for word in only)]
    named = {word for check in checks for word in check.split()} | {"fp32", "bf16"}
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        story = Story(Bench(Path(folder), base))
        story.prepare([name for name in FILES if name in named])
        story.paths["large"] = base.with_name("large.safetensors")
        story.paths["few blocks"] = base.with_name("few.safetensors")
        for ranks in RANKS:
            here = [check for check in checks if check.endswith(f" on {ranks}")]
            for kind in KINDS:
                # what has no kind goes with the first
                mine = [check for check in here if check.startswith(kind if kind != KINDS[0] else (kind, "err", "ref"))]
                if mine:
                    found = fork(ranks, work, story, (kind, mine))
                    results |= {check: _result(found, check) for check in mine}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
