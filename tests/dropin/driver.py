"""Uses a model on the pool as users use any MODEL, beside the plain model, and writes down how they differ.

    driver.py COMFY_ROOT OUT.json CHECKPOINT OTHER OTHER

One pool of two, one process: the driver's. The checkpoints are small Wan models of different weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import inspect
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "workers" / "import_root"))

from comfy_raylight.tests.sweep.sweep import FAMILIES, boot, call_node, conditioning, difference, registered

WORKERS = 2
STEPS = 2
CHECK_LIMIT_S = 60
"""After so long with one check this process shows its stacks and ends."""
WAN = FAMILIES["wan"]
SMALL_BYTES = 1 << 20

Model = Any
"""A ComfyUI patcher, plain or on the pool."""
Check = Callable[["Bench", Model], "torch.Tensor"]

CHECKS: dict[str, tuple[Check, Check | None]] = {}
"""Made of the plain model and of the pool's; the second picture, of the plain model, must be another."""
FACTS: dict[str, Callable[[Bench], None]] = {}
"""What only the pool's model can show; an AssertionError tells what is wrong."""


class Absent(Exception):
    """This ComfyUI does not have what the check is about."""


def base(bench: Bench, model: Model) -> torch.Tensor:
    """The picture without anything."""
    return bench.picture(model)


def check(*, unlike: Check | None = base) -> Callable[[Check], Check]:
    """Compare what this makes of both models, and see that it is not what `unlike` makes."""

    def register(function: Check) -> Check:
        CHECKS[function.__name__.replace("_", " ")] = (function, unlike)
        return function

    return register


def fact(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    FACTS[function.__name__.replace("_", " ")] = function
    return function


def must(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def noise(seed: int, *shape: int) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def node(name: str, **inputs: Any) -> Any:
    """The first output of a core node."""
    return call_node(registered()[name], inputs)[0]


class Bench:
    """A plain model and one on the pool, of the same file, and what to sample them with."""

    def __init__(self, files: list[Path], folder: Path) -> None:
        import comfy.sd
        import comfy.utils
        from comfy_raylight.raylight.config import ParallelConfig, PoolConfig
        from comfy_raylight.tests.host.checkpoints import lora

        self.files = files
        self.config = PoolConfig(parallel=ParallelConfig(world=WORKERS, ulysses=WORKERS, ring=1, cfg=1))
        self.plain = comfy.sd.load_diffusion_model(str(files[0]))
        self.far = self.load(files[0])
        self.positive, self.negative, self.other = (conditioning(WAN, seed) for seed in (1, 2, 5))
        self.loras = [
            comfy.utils.load_torch_file(str(lora(files[0], folder / f"{seed}.safetensors", seed=seed)), safe_load=True)
            for seed in (1, 2)
        ]
        self.first = self.picture(self.far)

    def load(self, file: Path, **options: Any) -> Model:
        """A model on the pool."""
        from comfy_raylight.raylight.config import ModelSpec
        from comfy_raylight.workers.driver import remote

        return remote.load_model(self.config, ModelSpec.of(file, **options))

    def empty(self) -> dict[str, Any]:
        import torch

        return {"samples": torch.zeros(WAN.shape)}

    def picture(self, model: Model, **changes: Any) -> torch.Tensor:
        """What KSampler makes: euler at cfg 3, with some inputs changed."""
        inputs = {
            "seed": 3,
            "steps": STEPS,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.empty(),
            "denoise": 1.0,
            **changes,
        }
        result: torch.Tensor = node("KSampler", model=model, **inputs)["samples"]
        return result

    def watched(self, model: Model, callback: Callable[..., None], steps: int) -> torch.Tensor:
        """Sample with a callback for every step."""
        import comfy.sample
        import torch

        with torch.inference_mode():
            latent: torch.Tensor = comfy.sample.sample(
                model,
                noise(7, *WAN.shape),
                steps,
                3.0,
                "euler",
                "simple",
                self.positive,
                self.negative,
                torch.zeros(WAN.shape),
                callback=callback,
                disable_pbar=True,
                seed=7,
            )
        return latent

    def with_lora(self, model: Model, *strengths: float) -> Model:
        """A clone with the first LoRA, the second one too where two strengths are given."""
        import comfy.sd

        for lora, strength in zip(self.loras, strengths, strict=False):
            if strength:
                model = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]
        return model

    @contextmanager
    def requests(self) -> Iterator[list[str]]:
        """The verbs of all requests to the workers while this is open."""
        from comfy_raylight.workers.pool.pool import REGISTRY

        calls: Any = REGISTRY[self.config].calls
        verbs: list[str] = []

        def begin(groups: Any, request: Any, *more: Any) -> Any:
            verbs.append(request.verb)
            return type(calls).begin(calls, groups, request, *more)

        calls.begin = begin
        try:
            yield verbs
        finally:
            del calls.begin


def both(*pictures: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat(pictures)


# ---- sampling ------------------------------------------------------------------------------------


@check(unlike=None)
def bare(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model)


@check(unlike=None)
def two_stages(bench: Bench, model: Model) -> torch.Tensor:
    shared: dict[str, Any] = {
        "model": model,
        "noise_seed": 3,
        "steps": 3,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": bench.positive,
        "negative": bench.negative,
    }
    half = node(
        "KSamplerAdvanced",
        add_noise="enable",
        latent_image=bench.empty(),
        start_at_step=0,
        end_at_step=1,
        return_with_leftover_noise="enable",
        **shared,
    )
    done = node(
        "KSamplerAdvanced",
        add_noise="disable",
        latent_image=half,
        start_at_step=1,
        end_at_step=100,
        return_with_leftover_noise="disable",
        **shared,
    )
    return both(half["samples"], done["samples"])


@check()
def timestep_ranges(bench: Bench, model: Model) -> torch.Tensor:
    early = node("ConditioningSetTimestepRange", conditioning=bench.positive, start=0.0, end=0.5)
    late = node("ConditioningSetTimestepRange", conditioning=bench.other, start=0.5, end=1.0)
    return bench.picture(model, positive=early + late, steps=3)


@check()
def two_positives(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model, positive=bench.positive + bench.other)


@check()
def area(bench: Bench, model: Model) -> torch.Tensor:
    part: dict[str, float] = {"width": 0.5, "height": 0.6, "temporal": 1.0, "x": 0.5, "y": 0.2, "z": 0.0}
    corner = node("ConditioningSetAreaPercentageVideo", conditioning=bench.other, strength=1.0, **part)
    return bench.picture(model, positive=bench.positive + corner)


@check()
def mask_on_conditioning(bench: Bench, model: Model) -> torch.Tensor:
    mask = noise(9, *WAN.shape[2:]).sigmoid()
    masked = conditioning(WAN, 5, mask=mask, set_area_to_bounds=False, mask_strength=0.8)
    return bench.picture(model, positive=bench.positive + masked)


def old_picture(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model, latent_image={"samples": noise(4, *WAN.shape)})


@check(unlike=old_picture)
def noise_mask(bench: Bench, model: Model) -> torch.Tensor:
    mask = (noise(9, 1, 112, 144) > 0).float()
    latent = node("SetLatentNoiseMask", samples={"samples": noise(4, *WAN.shape)}, mask=mask)
    return bench.picture(model, latent_image=latent)


@check(unlike=old_picture)
def denoise_half(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model, latent_image={"samples": noise(4, *WAN.shape)}, denoise=0.5)


def batch(bench: Bench, model: Model, **more: Any) -> torch.Tensor:
    return bench.picture(model, latent_image={"samples": noise(4, 2, *WAN.shape[1:]), **more})


@check(unlike=batch)
def batch_with_index(bench: Bench, model: Model) -> torch.Tensor:
    return batch(bench, model, batch_index=[3, 1])


@check(unlike=None)
def previews(bench: Bench, model: Model) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    final = bench.watched(model, lambda step, x0, x, total: seen.extend((x0.clone(), x.clone())), 3)
    must(len(seen) == 6, f"{len(seen)} previews of 3 steps")
    return both(*seen, final)


# ---- weights -------------------------------------------------------------------------------------


@check()
def lora(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(bench.with_lora(model, 0.7))


def one_lora(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(bench.with_lora(model, 0.7))


@check(unlike=one_lora)
def two_loras(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(bench.with_lora(model, 0.7, 0.5))


@check(unlike=lambda bench, model: both(*[one_lora(bench, model)] * 3))
def first_lora_again_after_the_stack(bench: Bench, model: Model) -> torch.Tensor:
    one, two = bench.with_lora(model, 0.7), bench.with_lora(model, 0.7, 0.5)
    return both(*(bench.picture(patched) for patched in (one, two, one)))


@check(unlike=one_lora)
def strength_changed(bench: Bench, model: Model) -> torch.Tensor:
    bench.picture(bench.with_lora(model, 0.7))
    return bench.picture(bench.with_lora(model, 0.2))


@check(unlike=lambda bench, model: both(*[bench.picture(model)] * 4))
def with_and_without_lora_in_turn(bench: Bench, model: Model) -> torch.Tensor:
    patched = bench.with_lora(model, 0.7)
    return both(*(bench.picture(one) for one in (patched, model, patched, model)))


def hooked(bench: Bench, model: Model, *, keyframes: bool, negative: bool = False) -> torch.Tensor:
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(bench.loras[0], 0.8, 0.0)
    if keyframes:
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
    texts = {"positive": comfy.hooks.set_hooks_for_conditioning(bench.positive, hooks)}
    if negative:
        texts["negative"] = comfy.hooks.set_hooks_for_conditioning(bench.negative, hooks)
    return bench.picture(model, **texts, steps=3)


def three_steps(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model, steps=3)


@check(unlike=three_steps)
def lora_hook_on_the_positive(bench: Bench, model: Model) -> torch.Tensor:
    return hooked(bench, model, keyframes=False)


@check(unlike=lambda bench, model: hooked(bench, model, keyframes=False))
def lora_hook_with_keyframes(bench: Bench, model: Model) -> torch.Tensor:
    return hooked(bench, model, keyframes=True)


@check(unlike=lambda bench, model: hooked(bench, model, keyframes=False, negative=True))
def lora_hook_with_keyframes_on_both(bench: Bench, model: Model) -> torch.Tensor:
    return hooked(bench, model, keyframes=True, negative=True)


@check(unlike=lambda bench, model: hooked(bench, model, keyframes=False))
def lora_hook_over_a_lora(bench: Bench, model: Model) -> torch.Tensor:
    return hooked(bench, bench.with_lora(model, 0.0, 0.5), keyframes=False)


def control_lora() -> dict[str, torch.Tensor]:
    """Has the input layer take a picture's channels beside the latent's."""
    import torch

    layer, (rows, columns, *kernel) = "diffusion_model.patch_embedding.", (256, 32, 1, 2, 2)
    return {
        layer + "lora_down.weight": noise(5, 8, columns, *kernel) / 8,
        layer + "lora_up.weight": noise(6, rows, 8, 1, 1, 1) / 4,
        layer + "reshape_weight": torch.tensor([rows, columns, *kernel]),
    }


def controlled(bench: Bench, model: Model, *, hook: bool = False) -> torch.Tensor:
    import comfy.hooks
    import comfy.sd

    model = comfy.sd.load_lora_for_models(model, None, control_lora(), 0.8, 0.0)[0]
    texts = {
        name: conditioning(WAN, seed, concat_latent_image=noise(8, *WAN.shape))
        for name, seed in (("positive", 1), ("negative", 2))
    }
    if hook:
        hooks = comfy.hooks.create_hook_lora(bench.loras[0], 0.8, 0.0)
        texts["positive"] = comfy.hooks.set_hooks_for_conditioning(texts["positive"], hooks)
    return bench.picture(model, **texts)


@check()
def lora_that_widens_the_input(bench: Bench, model: Model) -> torch.Tensor:
    return controlled(bench, model)


@check(unlike=controlled)
def lora_hook_over_one_that_widens_the_input(bench: Bench, model: Model) -> torch.Tensor:
    return controlled(bench, model, hook=True)


@check(unlike=one_lora)
def patched_layer_that_is_called_beside_the_model(bench: Bench, model: Model) -> torch.Tensor:
    """ComfyUI's process calls it, while the model has the LoRA."""
    patched, found = bench.with_lora(model, 0.7), noise(6, 1, 3, 256)
    layer = patched.model.diffusion_model.blocks[0].self_attn.q

    def beside(call: Any, arguments: dict[str, Any]) -> Any:
        output = call(arguments["input"], arguments["timestep"], **arguments["c"])
        return output * (1 + layer(found).std())

    patched.set_model_unet_function_wrapper(beside)
    return bench.picture(patched)


@fact
def weights_between_runs(bench: Bench) -> None:
    """A weight has the shape that a patch gives it while the model is sampled, and no longer."""
    seen: list[tuple[int, ...]] = []

    def weight() -> tuple[int, ...]:
        return tuple(bench.far.model.diffusion_model.patch_embedding.weight.shape)

    def look(arguments: dict[str, Any]) -> Any:
        seen.append(weight())
        return arguments["denoised"]

    watched = bench.far.clone()
    watched.set_model_sampler_post_cfg_function(look)
    controlled(bench, watched)
    must(set(seen) == {(256, 32, 1, 2, 2)}, f"the weight was {set(seen)} in the run")
    must(weight() == (256, 16, 1, 2, 2), f"the weight is {weight()} afterwards")


@check(unlike=lambda bench, model: both(one_lora(bench, model), bench.picture(model)))
def patched_clone_beside_a_bare_one(bench: Bench, model: Model) -> torch.Tensor:
    patched = node("ModelSamplingSD3", model=bench.with_lora(model, 0.7), shift=5.0)
    patched = node("RescaleCFG", model=patched, multiplier=0.7)
    beside = model.clone()
    return both(bench.picture(patched), bench.picture(beside))


# ---- functions inside the model ------------------------------------------------------------------


def easy_cache(model: Model) -> Model:
    return node("EasyCache", model=model, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)


@check(unlike=lambda bench, model: bench.picture(model, steps=10))
def easycache(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(easy_cache(model), steps=10)


@check()
def attention_patch(bench: Bench, model: Model) -> torch.Tensor:
    import comfy.ldm.wan.model

    if "attn1_patch" not in inspect.getsource(comfy.ldm.wan.model):
        raise Absent("this ComfyUI's Wan has no attn1_patch")

    def centred(data: dict[str, Any]) -> torch.Tensor:
        near: torch.Tensor = data["q"].mean(dim=(1, 2, 3), keepdim=True)[..., 0]
        return data["x"] - 0.5 * data["x"].mean(dim=1, keepdim=True) + near

    patched = model.clone()
    patched.set_model_attn1_patch(centred)
    return bench.picture(patched)


@check()
def attention_override(bench: Bench, model: Model) -> torch.Tensor:
    def hotter(attention: Any, q: torch.Tensor, k: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        out: torch.Tensor = 1.2 * attention(q * 1.5, k, *args, **more)
        is_self = q.shape[1] == k.shape[1]
        return out - 0.5 * out.mean(dim=1, keepdim=True) if is_self else out

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = hotter
    return bench.picture(patched)


@check()
def block_replaced(bench: Bench, model: Model) -> torch.Tensor:
    def centred(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = extra["original_block"](args)
        return {**out, "img": out["img"] - 0.5 * out["img"].mean(dim=1, keepdim=True)}

    patched = model.clone()
    patched.set_model_patch_replace(centred, "dit", "double_block", 0)
    return bench.picture(patched)


def counting(model: Model) -> Model:
    """A clone whose second block's output depends on how often the first one ran."""
    count = 0

    def first(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        nonlocal count
        count += 1
        return extra["original_block"](args)

    def second(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] - 0.2 * count * out["img"].mean(dim=1, keepdim=True)}

    patched = model.clone()
    patched.set_model_patch_replace(first, "dit", "double_block", 0)
    patched.set_model_patch_replace(second, "dit", "double_block", 1)
    return patched


@check()
def counter_shared_by_two_patches(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(counting(model))


@fact
def shared_counter_starts_anew_with_each_run(bench: Bench) -> None:
    patched = counting(bench.far)
    apart = difference(bench.picture(patched), bench.picture(patched))
    must(apart == 0, f"the second run differs from the first by {apart:.1e}")


def drawing(model: Model) -> Model:
    """A clone that draws random numbers inside the model."""
    import torch

    def jitter(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * (1 + torch.rand(1).item())}

    patched = model.clone()
    patched.set_model_patch_replace(jitter, "dit", "double_block", 0)
    return patched


@check()
def random_numbers_inside_the_model(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(drawing(model))


@fact
def random_state_is_left_as_by_the_plain_model(bench: Bench) -> None:
    import torch

    left = []
    for model in (bench.plain, drawing(bench.plain), drawing(bench.far)):
        bench.picture(model)  # seeds the generator itself
        left.append(torch.get_rng_state())
    must(not torch.equal(left[0], left[1]), "the patch draws nothing")
    must(torch.equal(left[1], left[2]), "the pool leaves another random state than the plain model")


@fact
def state_shared_with_a_post_cfg_function_is_refused(bench: Bench) -> None:
    from comfy_raylight.raylight.errors import UnsupportedError

    seen = 0

    def inside(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        nonlocal seen
        seen += 1
        return extra["original_block"](args)

    def after(args: dict[str, Any]) -> Any:
        return args["denoised"] * (1 + 0.01 * seen)

    patched = bench.far.clone()
    patched.set_model_patch_replace(inside, "dit", "double_block", 0)
    patched.set_model_sampler_post_cfg_function(after)
    with bench.requests() as verbs:
        try:
            bench.picture(patched)
        except UnsupportedError as error:
            must("state_shared_with_a_post_cfg_function" in str(error), f"the refusal names no one: {error}")
            must("seen" in str(error), f"the refusal does not name the variable: {error}")
        else:
            raise AssertionError("it was not refused")
    must(not set(verbs) & {"forward", "define", "patch"}, f"the workers were asked before: {verbs}")


@fact
def what_a_model_call_fills_for_the_next_one_is_refused(bench: Bench) -> None:
    """By name where ComfyUI is known to do it, else once a call has done it."""
    from comfy_raylight.raylight.errors import UnsupportedError

    patched = bench.far.clone()
    patched.model_options["transformer_options"]["seen"] = {"calls": []}
    patched.set_model_patch_replace(
        lambda args, extra: args["transformer_options"]["seen"]["calls"].append(1) or extra["original_block"](args),
        "dit",
        "double_block",
        0,
    )
    causal = bench.far.clone()
    causal.model_options["transformer_options"]["ar_state"] = {"kv_caches": []}
    cases = [(patched, "transformer_options['seen']"), (causal, "sampler ar_video")]
    if "WanAnimate2Cache" in registered():
        cases.append((node("WanAnimate2Cache", model=bench.far, device="cpu", dtype="int8"), "WanAnimate2Cache"))
    for model, words in cases:
        try:
            bench.picture(model)
        except UnsupportedError as error:
            must(words in str(error), f"the refusal does not say {words}: {error}")
        else:
            raise AssertionError(f"not refused: {words}")


@fact
def devices_of_this_process_are_refused(bench: Bench) -> None:
    """Core's nodes for several devices, of which a CPU has one: ComfyUI is told of another."""
    import comfy.model_management
    import torch
    from comfy_raylight.raylight.errors import UnsupportedError

    if "MultiGPU_WorkUnits" not in registered():
        raise Absent("this ComfyUI does not have the nodes")
    cpu = torch.device("cpu")
    for name, inputs in (("MultiGPU_WorkUnits", {"max_gpus": 2}), ("SelectModelDevice", {"device": "default"})):
        chosen = node(name, model=bench.far, **inputs)
        must(difference(bench.picture(chosen), bench.first) == 0, f"{name} changes the picture where nothing is chosen")
    devices = comfy.model_management.get_all_torch_devices
    comfy.model_management.get_all_torch_devices = lambda exclude_current=False: [cpu, torch.device("meta")]
    try:
        for name, inputs in (("MultiGPU_WorkUnits", {"max_gpus": 2}), ("SelectModelDevice", {"device": "gpu:1"})):
            try:
                node(name, model=bench.far, **inputs)
            except UnsupportedError as error:
                must("MultiGPU CFG Split" in str(error) and "cfg_degree" in str(error), f"no name or remedy: {error}")
            else:
                raise AssertionError(f"{name} was not refused")
        chosen = node("SelectModelDevice", model=bench.far, device="gpu:0")
        must(difference(bench.picture(chosen), bench.first) == 0, "the device that it has changes the picture")
    finally:
        comfy.model_management.get_all_torch_devices = devices
    moved = bench.far.clone()
    moved.load_device = torch.device("cpu", 1)  # as SelectModelDevice sets the CPU, where there is another device
    try:
        bench.picture(moved)
    except UnsupportedError as error:
        must("Select Model Device" in str(error), f"no name: {error}")
    else:
        raise AssertionError("a model that was moved was not refused")


# ---- what crosses, what stays --------------------------------------------------------------------


@fact
def easycache_skips_remote_calls(bench: Bench) -> None:
    rpc = bench.far.rpc
    calls = [rpc.traffic().calls]
    for model in (bench.far, easy_cache(bench.far)):
        bench.picture(model, steps=10)
        calls.append(rpc.traffic().calls)
    usual, cached = calls[1] - calls[0], calls[2] - calls[1]
    must(usual == 10, f"{usual} calls in 10 steps without the cache")
    must(0 < cached < 10, f"{cached} calls in 10 steps with the cache")


@fact
def conditioning_crosses_once(bench: Bench) -> None:
    positive, negative = conditioning(WAN, 31), conditioning(WAN, 32)
    texts = positive[0][0].nbytes + negative[0][0].nbytes
    steps, rpc = 6, bench.far.rpc
    latents = steps * 2 * bench.empty()["samples"].nbytes
    sent = []
    for _ in range(2):
        before = rpc.traffic().bytes_sent
        bench.picture(bench.far, steps=steps, positive=positive, negative=negative)
        sent.append(rpc.traffic().bytes_sent - before - latents)
    must(texts <= sent[0] < 2 * texts, f"{sent[0]} bytes besides latents, the conditioning has {texts}")
    must(sent[1] < texts / 10, f"{sent[1]} bytes besides latents in the second run, the conditioning has {texts}")


@fact
def lora_crosses_once(bench: Bench) -> None:
    rpc, tensors = bench.far.rpc, sum(tensor.nbytes for tensor in bench.loras[0].values())
    bench.picture(bench.with_lora(bench.far, 0.7))
    bench.picture(bench.far)
    before = rpc.traffic().bytes_sent
    bench.picture(bench.with_lora(bench.far, 0.65))
    bench.picture(bench.far)
    sent = rpc.traffic().bytes_sent - before - 2 * STEPS * 2 * bench.empty()["samples"].nbytes
    must(sent < tensors / 2, f"{sent} bytes sent to change the strength of a LoRA of {tensors}")


@fact
def the_same_again_loads_and_patches_nothing(bench: Bench) -> None:
    patched = bench.with_lora(bench.far, 0.7, -0.3)
    first = bench.picture(patched)
    with bench.requests() as verbs:
        again = bench.picture(patched.clone())
    must(difference(again, first) == 0, "the second picture is another one")
    must("forward" in verbs, "no request was seen")
    must(set(verbs) <= {"forward", "forget"}, f"the second run sent {sorted(set(verbs))}")


@fact
def offloaded_model_comes_back_equal(bench: Bench) -> None:
    from comfy_raylight.workers.driver import remote

    for model in (bench.far, bench.with_lora(bench.far, 0.7)):
        before = bench.picture(model)
        with bench.requests() as verbs:
            remote.offload(model)
            again = bench.picture(model)
        must(difference(again, before) == 0, "after an offload the picture is another one")
        must(verbs.count("offload") == 1, f"an offload and a picture sent {verbs}")
        must(set(verbs) <= {"offload", "forward", "forget"}, f"coming back sent {sorted(set(verbs))}")


@fact
def two_models_stay_loaded(bench: Bench) -> None:
    import comfy.sd

    other = bench.load(bench.files[1])
    expected = bench.picture(comfy.sd.load_diffusion_model(str(bench.files[1])))
    must(difference(expected, bench.first) > 1e-3, "the two checkpoints make the same picture")
    bench.picture(other)
    with bench.requests() as verbs:
        for turn in range(2):
            for name, model, wanted in (("first", bench.far, bench.first), ("second", other, expected)):
                apart = difference(bench.picture(model), wanted)
                must(apart <= 1e-5, f"turn {turn}: the {name} model differs by {apart:.1e}")
    must(set(verbs) <= {"forward", "forget"}, f"switching sent {sorted(set(verbs))}")


@fact
def unused_model_is_released_at_the_next_load(bench: Bench) -> None:
    unused = bench.load(bench.files[1])
    bench.picture(unused)
    with bench.requests() as verbs:
        kept = bench.load(bench.files[2])
    must("release" not in verbs, "a model in use was released")
    del kept
    del unused
    with bench.requests() as verbs:
        third = bench.load(bench.files[1], dtype="bfloat16")
    must(verbs.count("release") == 2, f"loading another model sent {verbs}")
    bench.picture(third)


@fact
def interrupted_run_ends_and_the_next_is_right(bench: Bench) -> None:
    from comfy import model_management

    reached: list[int] = []

    def callback(step: int, *more: Any) -> None:
        reached.append(step)
        if step == 1:
            model_management.interrupt_current_processing()

    for name, model in (("plain", bench.plain), ("pool", bench.far)):
        reached.clear()
        try:
            bench.watched(model, callback, 6)
        except model_management.InterruptProcessingException:
            must(reached == [0, 1], f"{name}: steps {reached} ended")
        else:
            raise AssertionError(f"{name}: it was not interrupted")
        finally:
            model_management.interrupt_current_processing(False)
    apart = difference(bench.picture(bench.far), bench.first)
    must(apart == 0, f"the next run differs by {apart:.1e}")


@fact
def unloading_all_models_changes_nothing(bench: Bench) -> None:
    from comfy import model_management

    patched = bench.with_lora(bench.far, 0.7)
    first = bench.picture(patched)
    with bench.requests() as verbs:
        model_management.unload_all_models()
    must("offload" in verbs, f"unloading sent {verbs}")
    for name, model, wanted in (("patched", patched, first), ("bare", bench.far, bench.first)):
        apart = difference(bench.picture(model), wanted)
        must(apart == 0, f"afterwards the {name} model differs by {apart:.1e}")


@fact
def memory_is_accounted_truly(bench: Bench) -> None:
    from comfy import model_management

    must(bench.far.model_size() == 1, f"a model elsewhere counts {bench.far.model_size()} bytes here")
    model_management.load_models_gpu([bench.far])
    loaded = model_management.loaded_models()
    must(any(bench.far.is_clone(model) for model in loaded), "ComfyUI does not know that the model is loaded")
    model = bench.far.model
    real = sum(t.nbytes for part in (model.parameters(), model.buffers()) for t in part if not t.is_meta)
    size = bench.files[0].stat().st_size
    must(real < SMALL_BYTES < size, f"{real} bytes of a file of {size} are here")


@fact
def room_is_made_for_weights_on_the_same_card(bench: Bench) -> None:
    """What workers do not have there yet, ComfyUI counts as needed, and frees its own models for it."""
    from comfy import model_management
    from comfy_raylight.workers.driver import model_rpc

    far = bench.far
    bench.picture(far)
    far.rpc.offload()
    (group,) = far.rpc._groups().parts
    known, uuid = group._facts[far.rpc.spec], model_rpc.device_uuid
    group._facts[far.rpc.spec] = [dataclasses.replace(facts, uuid="card") for facts in known]
    model_rpc.device_uuid = lambda device: "card"
    try:
        total = sum(facts.bytes for facts in known)
        must(far.model_size() == total > 0 == far.loaded_size(), f"{far.loaded_size()} of {far.model_size()} bytes")
        needed = model_management.LoadedModel(far).model_memory_required(far.load_device)
        must(needed == total, f"ComfyUI makes room for {needed} of {total} bytes")
        bench.picture(far)
        must(far.loaded_size() == total, f"{far.loaded_size()} of {total} bytes are there after a picture")
    finally:
        group._facts[far.rpc.spec], model_rpc.device_uuid = known, uuid


# ---- the script ----------------------------------------------------------------------------------


def run(bench: Bench, function: Check, unlike: Check | None) -> dict[str, Any]:
    """One check on both models, and whether the pool's bare model still makes its first picture."""
    result: dict[str, Any] = {}
    pictures: list[torch.Tensor] = []
    for name, model in (("plain", bench.plain), ("pool", bench.far)):
        try:
            pictures.append(function(bench, model))
        except Absent as absent:
            return {"absent": str(absent)}
        except Exception as error:
            logging.exception("%s of the %s model", function.__name__, name)
            result[name] = f"{type(error).__name__}: {error}"
    if len(pictures) == 2:
        result["difference"] = difference(pictures[1], pictures[0])
        result["finite"] = bool(pictures[0].isfinite().all())
        if unlike is not None:
            result["effect"] = difference(pictures[0], unlike(bench, bench.plain))
    return result


def state(bench: Bench, function: Callable[[Bench], None]) -> dict[str, Any]:
    """One fact."""
    try:
        function(bench)
    except Absent as absent:
        return {"absent": str(absent)}
    except Exception as error:
        logging.exception("%s", function.__name__)
        return {"pool": f"{type(error).__name__}: {error}"}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("comfy", type=Path, help="root of a ComfyUI")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("files", type=Path, nargs=3, help="checkpoints")
    parser.add_argument("--only", default="", metavar="TEXT", help="only checks with this in their names")
    options = parser.parse_args()
    files, out = [file.resolve() for file in options.files], options.out.resolve()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    boot(options.comfy.resolve(), WORKERS)

    from comfy_raylight.workers.pool.pool import REGISTRY, close_all

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = Bench(files, Path(folder))
            for name in [*CHECKS, *FACTS]:
                if options.only not in name:
                    continue
                faulthandler.dump_traceback_later(CHECK_LIMIT_S, exit=True)
                pool = REGISTRY[bench.config]
                result = run(bench, *CHECKS[name]) if name in CHECKS else state(bench, FACTS[name])
                if REGISTRY.get(bench.config) is not pool:
                    result.setdefault("pool", "the pool was lost")
                result["afterwards"] = difference(bench.picture(bench.far), bench.first)
                sys.stderr.write(f"{name}: {result}\n")
                results[name] = result
        finally:
            faulthandler.cancel_dump_traceback_later()
            close_all()
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
