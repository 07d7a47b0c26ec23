"""Loads, patches, moves and offloads mapped weights beside ComfyUI's own, and writes down what differs.

    driver.py COMFY_ROOT OUT.json CHECKPOINT [--accelerator] [CHECK ...]

One process of ComfyUI, no pool. The checkpoint is a small Wan model in float32. On an accelerator the models are
computed there; by default on the CPU, which also plays a device of its own where weights move.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from comfy_raylight.workers.worker.model import WorkerModel

sys.path.append(str(Path(__file__).resolve().parents[2] / "workers" / "import_root"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

from comfy_raylight.tests.weights.adapters import ADAPTERS, write_adapter
from comfy_raylight.tests.weights.bench import Bench, apart, boot, forward
from comfy_raylight.tests.weights.files import KITCHEN, SAFETENSORS, absent, write_gguf, write_variant

CHECK_LIMIT_S = 120
TOLERANCE = 1e-5
ACCELERATOR_TOLERANCE = 2e-2
"""There ComfyUI computes in bfloat16 or float16, and rounds patched weights by random numbers where blocks do not."""
EFFECT = 1e-3
"""A patch that changes less shows nothing."""
QUANTS = (
    *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
CHECKS: dict[str, Callable[[Bench], None]] = {}
"""By name; an AssertionError tells what is wrong."""


class Absent(Exception):
    """This ComfyUI does not have what the check is about."""


def check(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def each(names: Any, text: str) -> Callable[[Callable[[Bench, str], None]], None]:
    """Registers a check for every name."""

    def register(function: Callable[[Bench, str], None]) -> None:
        for name in names:
            CHECKS[f"{text} {name}"] = functools.partial(_named, function, name)

    return register


def _named(function: Callable[[Bench, str], None], name: str, bench: Bench) -> None:
    function(bench, name)


def must(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    found = apart(got, wanted)
    logging.warning("%s: %.1e apart", what, found)
    must(found <= (ACCELERATOR_TOLERANCE if on_accelerator() else TOLERANCE), f"{what}: {found:.1e} apart")


def on_accelerator() -> bool:
    from comfy import model_management

    return not model_management.is_device_cpu(model_management.get_torch_device())


def differ(got: torch.Tensor, other: torch.Tensor, what: str) -> None:
    must(apart(got, other) > EFFECT, f"{what}: the effect is {apart(got, other):.1e}")


def at_home(model: WorkerModel) -> bool:
    return all(home.at_home for home in model._weights.homes.values())


def patched(patcher: Any, *files: tuple[Path, float]) -> Any:
    """A clone of a plain patcher with LoRA-like files at their strengths."""
    import comfy.sd
    import comfy.utils

    for path, strength in files:
        lora = comfy.utils.load_torch_file(str(path), safe_load=True)
        patcher = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]
    return patcher


class Sets:
    """Patch sets as the driver makes them and a worker takes them over."""

    def __init__(self, bench: Bench, model: WorkerModel) -> None:
        self.bench, self.model = bench, model
        self._plain = bench.plain(bench.base)
        self._number = 0

    def put(self, *files: tuple[Path, float]) -> None:
        """Replace the model's patches."""
        from comfy_raylight.workers.mapping.loading import normal_tensors

        self._number += 1
        with normal_tensors():
            patches = patched(self._plain, *files).patches
            self.model.patch(f"set {self._number}" if files else "", patches, {}, force_cast=False)


def private_bytes(model: WorkerModel) -> int:
    from comfy_raylight.workers.mapping import adopt

    return adopt.private_bytes(model._weights.homes, model.source)


# ---- files ---------------------------------------------------------------------------------------

MUST_BE_PRIVATE = {"misaligned": 1.0, "scaled": 0.9, **dict.fromkeys(("layers", "comfy_quant", *KITCHEN), 1.0)}
"""At most this part of the weights: on a CPU ComfyUI turns what is not quantised into float32."""


@each(SAFETENSORS, "file")
def _(bench: Bench, name: str) -> None:
    from comfy_raylight.raylight.errors import LoadError

    try:
        path = write_variant(bench.base, bench.path(), name)
    except ImportError as error:
        raise Absent(str(error)) from error
    if absent(name):
        try:
            bench.mapped(path)
        except LoadError as error:
            must("Update ComfyUI" in str(error), f"no remedy: {error}")
            return
        raise AssertionError("a layout that this ComfyUI does not know was loaded")
    model = bench.mapped(path)
    got = bench.run(model)
    same(got, bench.run(bench.plain(path)), name)
    limit = MUST_BE_PRIVATE.get(name, 0.0) * model.size
    if name != "fp32":  # what no layer of ComfyUI's casts is converted at once
        homes = model._weights.homes.values()
        limit += sum(home.tensor.nbytes for home in homes if not hasattr(home.module, "comfy_cast_weights"))
    must(private_bytes(model) <= limit, f"{private_bytes(model)} of {model.size} bytes are private")
    model.offload()
    must(at_home(model), "not every parameter is at home after an offload")
    must(apart(bench.run(model), got) == 0, "after an offload the result is another one")


@each(("fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", "bf16", "fp16"), "weight_dtype")
def _(bench: Bench, name: str) -> None:
    from comfy_raylight.workers.mapping.loading import WEIGHT_DTYPES, load_options

    dtype, options = WEIGHT_DTYPES[name]
    path = write_variant(bench.base, bench.path(), "bf16")
    model = bench.mapped(path, dtype=dtype, options=options)
    arguments, _ = load_options(model_spec := bench.spec(path, dtype=dtype, options=options))
    must(model_spec.dtype == dtype, "the spec does not say the dtype")
    got = bench.run(model)
    same(got, bench.run(bench.plain(path, **arguments)), name)
    if name == "fp8_e5m2":
        differ(got, bench.run(bench.plain(path)), "another dtype")


@each(("private",), "reader")
def _(bench: Bench, name: str) -> None:
    path = write_variant(bench.base, bench.path(), "mixed")
    model = bench.mapped(path, reader=name)
    got = bench.run(model)
    same(got, bench.run(bench.plain(path)), name)
    model.offload()
    must(at_home(model), "not every parameter is at home after an offload")
    must(apart(bench.run(model), got) == 0, "after an offload the result is another one")


@each(("safetensors", "private", "Q8_0"), "written into")
def _(bench: Bench, name: str) -> None:
    """SD3 in diffusers' layout, of which ComfyUI's loader swaps halves in place: no way leads back to the file."""
    import torch
    from comfy import model_management
    from comfy_raylight.loaders.staging import HostEngine, engine_for
    from comfy_raylight.workers.mapping.mapped_patcher import Weights
    from host.checkpoints import Job
    from host.checkpoints.make import make

    path = bench.path()
    make(Job(family="sd3", path=path, layout="diffusers"))
    plain = bench.plain(path)
    if name == "Q8_0":
        path, whole = write_gguf(path, bench.path(".gguf"), name, quantised=lambda *_: True)
        plain = bench.plain_state(whole)
    model = bench.mapped(path, reader="private" if name == "private" else "map")
    layers = ("final_layer.adaLN_modulation.1", "joint_blocks.3.context_block.adaLN_modulation.1")
    swapped = {f"diffusion_model.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    wanted = plain.model.state_dict()
    homes = list(model._homes.items())
    device = model_management.get_torch_device()
    weights = Weights(model.source, dict(homes), engine=engine_for if on_accelerator() else HostEngine)
    for (key, home), moved in zip(homes, weights.upload([home for _, home in homes], device), strict=True):
        uploaded, mapped, theirs = moved.cpu(), model.weight(key).cpu(), wanted[key].cpu()
        must(torch.equal(uploaded, home.tensor.to(moved.dtype)), f"{key} is uploaded as it was before it was written")
        must(torch.equal(mapped.to(theirs.dtype), theirs), f"{key} is another one than ComfyUI's")
        must(key not in swapped or model.source.offset(home.tensor) is None, f"{key} passes for the file's")
    joined = sum(home.tensor.nbytes for key, home in homes if ".qkv." in key or key in swapped)
    must(0 < private_bytes(model) <= joined, f"{private_bytes(model)} bytes are private, {joined} were made or written")


@check
def what_a_node_writes_into_is_not_named(bench: Bench) -> None:
    """In ComfyUI's process: a layer of the stand-in, which is refused, and a tensor of a LoRA, which is sent."""
    import torch
    from comfy_raylight.workers.driver import layers, loras
    from comfy_raylight.workers.driver.remote import refer
    from comfy_raylight.workers.wire.said import Told

    path = write_variant(bench.base, bench.path(), "fp32")
    found = layers.Layers(bench.spec(path), torch.float32, SimpleNamespace(told=Told()), lambda key: [])
    must(not list(found.replaced()), "something is said to be replaced")
    head: Any = found.model.get_submodule("head.head")
    must(refer(head.weight) is not None, "a layer's weight has no name")
    with torch.inference_mode():
        head.weight[:3] = 0.0
    must([name for name, _ in found.replaced()] == ["head.head.weight"], "the write is not seen")
    must(refer(head.weight) is None and refer(head.bias) is not None, "the name stands for what the file has")
    must(bool((bench.mapped(path).weight("diffusion_model.head.head.weight")[:3] != 0).any()), "others see the write")
    file = write_adapter(bench.base, bench.path(), "lora")
    with torch.inference_mode():
        tensor = next(iter(loras._tensors(str(file)).values()))
        must(refer(tensor) is not None, "a LoRA's tensor has no name")
        tensor.mul_(2.0)
        must(refer(tensor) is None, "the name stands for what the file has")


# ---- patches -------------------------------------------------------------------------------------


@each(ADAPTERS, "adapter")
def _(bench: Bench, name: str) -> None:
    path = write_variant(bench.base, bench.path(), "bf16")
    file = write_adapter(bench.base, bench.path(), name)
    model, plain = bench.mapped(path), bench.plain(path)
    sets = Sets(bench, model)
    bare = bench.run(model)
    sets.put((file, 0.7))
    got = bench.run(model)
    wanted = bench.run(patched(plain, (file, 0.7)))
    if on_accelerator() and apart(wanted, bench.run(plain)) == 0:
        raise Absent("ComfyUI itself does not apply it here")
    differ(wanted, bench.run(plain), name)
    same(got, wanted, name)
    sets.put()
    must(apart(bench.run(model), bare) == 0, "without the patch the result is another one than before")
    must(on_accelerator() or at_home(model), "not every parameter is at home without patches")


@each(("fp32", "bf16", "scaled", "layers", "Q8_0"), "chain on")
def _(bench: Bench, name: str) -> None:
    """Any number, any order, one twice, strength 0 and negative; each after each other one."""
    if name == "Q8_0":
        path, whole = write_gguf(bench.base, bench.path(".gguf"), name)
        plain = bench.plain_state(whole)
    else:
        path = write_variant(bench.base, bench.path(), name)
        plain = bench.plain(path)
    a, b, c = (
        write_adapter(bench.base, bench.path(), kind, seed=seed, part=part)
        for seed, (kind, part) in enumerate((("lora", "attn"), ("lora", "ffn"), ("loha", "self_attn")))
    )
    model = bench.mapped(path)
    sets = Sets(bench, model)
    chains = [
        [(a, 1.0), (c, 0.5)],
        [(c, 0.5), (a, 1.0)],
        [],
        [(a, 0.4), (a, 0.4), (b, -0.6)],
        [(b, -0.6)],
        [(b, -0.6), (a, 0.0)],
        [(a, 1.0), (c, 0.5)],
    ]
    for number, chain in enumerate(chains):
        sets.put(*chain)
        same(bench.run(model), bench.run(patched(plain, *chain)), f"chain {number}")
    model.offload()
    must(at_home(model), "not every parameter is at home after an offload")
    same(bench.run(model), bench.run(patched(plain, *chains[-1])), "after an offload")


@check
def only_weights_whose_patches_change_are_computed(bench: Bench) -> None:
    from comfy_raylight.workers.mapping.loading import normal_tensors

    path = write_variant(bench.base, bench.path(), "bf16")
    a = write_adapter(bench.base, bench.path(), "lora", part="self_attn")
    b = write_adapter(bench.base, bench.path(), "lora", part="ffn", seed=2)
    model = bench.mapped(path)
    plain = bench.plain(path)
    with normal_tensors():
        base = patched(plain, (a, 1.0))
        both = patched(base, (b, 0.5))

    def parameters() -> dict[str, int]:
        return {key: id(home.parameter) for key, home in model._weights.homes.items()}

    def changed(patcher: Any, state: str) -> set[str]:
        held = [home.parameter for home in model._weights.homes.values()]  # ids stay taken
        before = parameters()
        model.patch(state, patcher.patches, {}, force_cast=False)
        bench.run(model)
        after = parameters()
        must(len(held) == len(after), "a parameter is missing")
        return {key for key in after if after[key] != before[key]}

    bench.run(model)
    must(changed(base, "a") == set(base.patches), "the first patches touch other weights")
    ffn = {key for key in both.patches if "ffn" in key}
    must(changed(both, "a and b") == ffn, "adding a LoRA computes other weights than its own")
    must(changed(base, "a again") == ffn, "taking a LoRA away touches other weights than its own")
    must(changed(base, "the same") == set(), "equal patches under another name are computed again")


@check
def merge_reaches_the_weights_that_comfyui_reaches(bench: Bench) -> None:
    """ComfyUI leaves parameters of modules with others inside alone, as Wan's modulation tables."""
    path, other = (write_variant(bench.base, bench.path(), name) for name in ("fp32", "fp8"))
    plain, second = bench.plain(path), bench.mapped(other)
    merged = plain.clone()
    for key, patches in bench.plain(other).get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patches}, 1.5, -0.5)
    wanted = bench.run(merged)
    differ(wanted, bench.run(plain), "a merge")
    model = bench.mapped(path)
    bench.run(model)
    patches = {
        key: [(strength, [(second.weight(key), lambda weight, **_: weight)], *rest)]
        for key, [(strength, _, *rest)] in merged.patches.items()
    }
    model.patch("merged", patches, {}, force_cast=False)
    same(bench.run(model), wanted, "a merge")


@check
def inference_mode_outside_changes_nothing(bench: Bench) -> None:
    import torch

    path = write_variant(bench.base, bench.path(), "fp32")
    file = write_adapter(bench.base, bench.path(), "lora")
    wanted = bench.run(patched(bench.plain(path), (file, 0.7)))
    with torch.inference_mode():
        model = bench.mapped(path)
        sets = Sets(bench, model)
        first = bench.run(model)
        sets.put((file, 0.7))
        same(bench.run(model), wanted, "inside inference mode")
        model.offload()
        sets.put()
        must(apart(bench.run(model), first) == 0, "after all that the result is another one")


@check
def quantised_weights_merge_into_another_model(bench: Bench) -> None:
    """What a merge takes from a model is its weight, whatever it is stored as."""
    import torch

    path, whole = write_gguf(bench.base, bench.path(".gguf"), "Q4_0")
    model = bench.mapped(path)
    key = "blocks.0.ffn.0.weight"
    must(torch.equal(model.weight("diffusion_model." + key), whole[key]), "blocks")
    narrow = bench.mapped(write_variant(bench.base, bench.path(), "fp32"), dtype="bfloat16")
    must(narrow.weight("diffusion_model." + key).dtype == torch.bfloat16, "the dtype ComfyUI would have had")


@check
def what_a_model_keeps_for_its_next_call_is_cleared(bench: Bench) -> None:
    """As HiDream O1 does, which is too large for a test."""
    from comfy_raylight.tests.weights.bench import inputs_of

    model = bench.mapped(write_variant(bench.base, bench.path(), "fp32"))
    cleared: list[bool] = []
    model.diffusion.clear_kv_cache = lambda: cleared.append(True)  # type: ignore[assignment]
    bench.run(model)
    args, kwargs = inputs_of(model.patcher.model)
    for _ in range(2):
        model.run("_forward", args, kwargs)
    must(len(cleared) == 2, f"{len(cleared)} times in 2 calls")


# ---- GGUF ----------------------------------------------------------------------------------------


@each(QUANTS, "gguf")
def _(bench: Bench, name: str) -> None:
    path, whole = write_gguf(bench.base, bench.path(".gguf"), name)
    model = bench.mapped(path)
    plain = bench.plain_state(whole)
    got = bench.run(model)
    same(got, bench.run(plain), name)
    blocks = [home for home in model._weights.homes.values() if getattr(home.module, "quant", "")]
    must(bool(blocks) == (name not in ("F16", "BF16")), "no layer computes from blocks")
    must(private_bytes(model) == 0, f"{private_bytes(model)} bytes are private")
    file = write_adapter(bench.base, bench.path(), "lora")
    Sets(bench, model).put((file, 0.7))
    same(bench.run(model), bench.run(patched(plain, (file, 0.7))), f"{name} with a LoRA")
    must(private_bytes(model) == 0, "a patched layer keeps its whole weight")


@each(("prefixed", "with text fields"), "gguf")
def _(bench: Bench, name: str) -> None:
    strings = [("config", json.dumps({"transformer": {}}))] if name != "prefixed" else []
    prefix = "model.diffusion_model." if name == "prefixed" else ""
    path, whole = write_gguf(bench.base, bench.path(".gguf"), "Q5_K", strings=strings, prefix=prefix)
    same(bench.run(bench.mapped(path)), bench.run(bench.plain_state(whole)), name)


@each(("float16", "bfloat16", "float32"), "gguf dequant_dtype")
def _(bench: Bench, name: str) -> None:
    import torch

    path, whole = write_gguf(bench.base, bench.path(".gguf"), "Q6_K")
    dtype = getattr(torch, name)
    from comfy_raylight.tests.weights.files import is_linear

    rounded = {key: value.to(dtype).float() if is_linear(key, value) else value for key, value in whole.items()}
    model = bench.mapped(path, dequant_dtype=name)
    same(bench.run(model), bench.run(bench.plain_state(rounded)), name)


# ---- files that change ---------------------------------------------------------------------------


@each(("truncated", "overwritten", "replaced"), "a file")
def _(bench: Bench, name: str) -> None:
    from comfy_raylight.raylight.errors import LoadError

    path = write_variant(bench.base, bench.path(), "bf16")
    model = bench.mapped(path)
    before = bench.run(model)
    spec = bench.spec(path)
    if name == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif name == "overwritten":
        with path.open("r+b") as file:
            file.seek(-4096, os.SEEK_END)
            file.write(b"\1" * 4096)
    else:
        other = write_variant(bench.base, bench.path(), "bf16")
        os.replace(other, path)
        must(apart(bench.run(model), before) == 0, "a file that was replaced is not the one that is in use")
        must(bench.spec(path) != spec, "the replaced file has the old one's key")
        return
    try:
        bench.run(model)
    except LoadError as error:
        must("changed" in str(error), f"another error: {error}")
    else:
        raise AssertionError("it was used")


# ---- to the device and back ----------------------------------------------------------------------


QUANTISED = ("scaled", "layers", "comfy_quant")
"""Where a part of the weights is on the device, ComfyUI patches the rest without quantising it again; on an
accelerator, without rounding it to the dtype it is kept in."""


def story(patcher: Any, files: list[Path], size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that moves weights."""
    import torch
    from comfy import model_management
    from comfy_raylight.workers.mapping.loading import normal_tensors

    device = model_management.get_torch_device()
    if device.type == "cpu":
        device = torch.device("cpu", 0)  # `to` copies to it, as to any other device
    with normal_tensors():
        a = patched(patcher, (files[0], 0.7))
        both = patched(a, (files[1], -0.5))

        def run(name: str, chosen: Any, *, room: float = 1e32, stay: bool = False) -> Iterator[tuple[str, Any]]:
            chosen.partially_load(device, extra_memory=room)
            yield name, forward(chosen.model)
            if not stay:
                chosen.detach()

        yield from run("bare", patcher)
        yield from run("a", a)
        yield from run("bare", patcher, stay=True)
        yield from run("a", a, stay=True)
        yield from run("both", both, stay=True)
        yield from run("a", a.clone(), stay=True)
        yield from run("bare", patcher)
        yield from run("both", both, room=size * 0.6)
        yield from run("bare", patcher, room=size * 0.6)
        yield from run("both", both, stay=True)
        both.partially_unload(both.offload_device, size * 0.4)
        yield "both", forward(both.model)
        both.detach()
        yield from run("bare", patcher)


@each(("fp32", "bf16", "mixed", "scaled", "layers", "comfy_quant", "Q4_K"), "device story of")
def _(bench: Bench, name: str) -> None:
    from comfy_raylight.loaders.staging import HostEngine

    if name == "Q4_K":
        path, weights = write_gguf(bench.base, bench.path(".gguf"), name)
        plain = bench.plain_state(weights)
    else:
        if absent(name):
            raise Absent(absent(name))
        path = write_variant(bench.base, bench.path(), name)
        plain = bench.plain(path)
    files = [
        write_adapter(bench.base, bench.path(), "lora", seed=seed, part=part)
        for seed, part in ((1, "attn"), (2, "blocks"))
    ]
    wanted = {
        "bare": bench.run(plain),
        "a": bench.run(patched(plain, (files[0], 0.7))),
        "both": bench.run(patched(plain, (files[0], 0.7), (files[1], -0.5))),
    }
    model = bench.mapped(path)
    size = model.size
    uploads: list[int] = []

    class Engine(HostEngine):
        def allocate(self, size: int) -> torch.Tensor:
            uploads.append(size)
            return super().allocate(size)

    if not on_accelerator():
        model._weights.engine = Engine
    seen: dict[str, torch.Tensor] = {}
    whole = name in QUANTISED or on_accelerator()
    beside = [got for _, got in story(plain, files, size)] if whole else []
    for number, (label, got) in enumerate(story(model.patcher, files, size)):
        same(got, beside[number] if beside else wanted[label], f"step {number}, {label}")
        if not beside and seen.setdefault(label, got) is not got:
            must(apart(got, seen[label]) <= TOLERANCE, f"step {number}, {label}, is another one than before")
    must(at_home(model), "not every parameter is at home at the end")
    must(bool(uploads) or model._weights.engine is not Engine, "nothing went through the buffers")


def main() -> None:
    root, out, base = (Path(word).resolve() for word in sys.argv[1:4])
    only = [word for word in sys.argv[4:] if word != "--accelerator"]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    boot(root, cpu="--accelerator" not in sys.argv)
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), base)
        for name, function in CHECKS.items():
            if only and not any(word in name for word in only):
                continue
            faulthandler.dump_traceback_later(CHECK_LIMIT_S, exit=True)
            results[name] = {}
            try:
                function(bench)
            except Absent as absent:
                results[name]["absent"] = str(absent)
            except Exception as error:
                logging.exception("%s", name)
                results[name]["failed"] = f"{type(error).__name__}: {error}"
            sys.stderr.write(f"{name}: {results[name]}\n")
    faulthandler.cancel_dump_traceback_later()
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
