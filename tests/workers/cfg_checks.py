"""Pictures that a pool of two cfg groups must make as the plain model does, and how the groups share the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy_raylight.tests.dropin.driver import both, must, node, noise
from comfy_raylight.tests.sweep.sweep import conditioning

from .cfg_bench import GROUPS, STEPS, UNET, WAN, WAN4, Bench, Model

if TYPE_CHECKING:
    import torch

Check = Callable[[Bench, Model], "torch.Tensor"]
Calls = tuple[int, ...]

CHECKS: dict[str, tuple[Check, tuple[str, ...], Calls]] = {}
"""By name: the picture, the settings to make it in, and how many model calls each group gets for it (() for any)."""
CACHE_STEPS = 10


def check(*settings: str, calls: Calls) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[function.__name__.replace("_", " ")] = (function, settings, calls)
        return function

    return register


# ---- conditions apart: each group gets its own ---------------------------------------------------


@check(WAN, UNET, WAN4, calls=(2, 2))
def equal_shapes(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model)


@check(WAN, UNET, calls=(2, 2))
def batch_of_2(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model, latent_image=bench.noise(2))


@check(WAN, UNET, WAN4, calls=(2, 2))
def texts_of_unequal_length(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model, positive=bench.text(1, tokens=3 * bench.family.tokens))


@check(WAN, WAN4, calls=(4, 4))
def area_and_mask(bench: Bench, model: Model) -> torch.Tensor:
    """ComfyUI gives the negative the positive's area as well: two calls for each condition."""
    part: dict[str, float] = {"width": 0.5, "height": 0.6, "temporal": 1.0, "x": 0.5, "y": 0.2, "z": 0.0}
    corner = node("ConditioningSetAreaPercentageVideo", conditioning=bench.other, strength=1.0, **part)
    mask = noise(9, *bench.family.shape[2:]).sigmoid()
    masked = conditioning(bench.family, 6, mask=mask, set_area_to_bounds=False, mask_strength=0.8)
    return bench.picture(model, positive=bench.positive + corner + masked)


@check(UNET, calls=(2, 2))
def default_conditioning(bench: Bench, model: Model) -> torch.Tensor:
    mask = (noise(9, *bench.family.shape[2:]) > 0).float()
    masked = conditioning(bench.family, 5, mask=mask, set_area_to_bounds=False, mask_strength=1.0)
    return bench.picture(model, positive=masked + conditioning(bench.family, 1, default=True))


@check(WAN, calls=(5, 3))
def timestep_ranges(bench: Bench, model: Model) -> torch.Tensor:
    """Where the negative ends, one group works alone."""
    negative = node("ConditioningSetTimestepRange", conditioning=bench.negative, start=0.0, end=0.5)
    return bench.picture(model, negative=negative, steps=5)


@check(WAN, UNET, calls=(4, 2))
def perp_neg(bench: Bench, model: Model) -> torch.Tensor:
    return perp_negative(bench, model)


def perp_negative(bench: Bench, model: Model) -> torch.Tensor:
    inputs = {"positive": bench.positive, "empty_conditioning": bench.other, "cfg": 4.0, "neg_scale": 1.5}
    return bench.guided(model, "PerpNegGuider", **inputs)


@check(WAN, UNET, calls=(4, 2))
def dual_cfg(bench: Bench, model: Model) -> torch.Tensor:
    scales = {"cfg_conds": 4.0, "cfg_cond2_negative": 1.5, "style": "regular"}
    return bench.guided(model, "DualCFGGuider", cond1=bench.positive, cond2=bench.other, **scales)


@check(WAN, UNET, calls=(2, 0))
def cfg_1(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(model, cfg=1.0)


@check(WAN, calls=(2, 2))
def lora_on_the_model(bench: Bench, model: Model) -> torch.Tensor:
    import comfy.sd

    return bench.picture(comfy.sd.load_lora_for_models(model, None, bench.lora, 0.7, 0.0)[0])


@check(WAN, UNET, WAN4, calls=(3, 3))
def lora_hook_on_the_positive(bench: Bench, model: Model) -> torch.Tensor:
    return hooked(bench, model, "positive")


@check(WAN, UNET, calls=(6, 3))
def lora_hooks_on_three_conditions(bench: Bench, model: Model) -> torch.Tensor:
    return hooked(bench, model, "positive", "negative", more=bench.other)


def hooked(bench: Bench, model: Model, *where: str, more: Any = ()) -> torch.Tensor:
    """A LoRA of its own strength per condition, which grows while sampling; `more` is a positive without."""
    import comfy.hooks

    texts = {}
    for number, name in enumerate(where):
        hooks = comfy.hooks.create_hook_lora(bench.lora, 0.8 - 0.5 * number, 0.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.4))
        hooks.set_keyframes_on_hooks(frames)
        texts[name] = comfy.hooks.set_hooks_for_conditioning(getattr(bench, name), hooks)
    if more:
        texts["positive"] = texts["positive"] + more
    return bench.picture(model, **texts, steps=3)


# ---- code around the model call: it sees what it sees in plain ComfyUI ---------------------------


@check(WAN, WAN4, calls=())
def easycache(bench: Bench, model: Model) -> torch.Tensor:
    import torch

    cached = node("EasyCache", model=model, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
    seen: list[int] = []

    def count(executor: Any, *args: Any, **more: Any) -> Any:
        seen.append(args[0].shape[0])
        return executor(*args, **more)

    cached.add_wrapper_with_key("diffusion_model", "count", count)  # inside EasyCache's: calls that were not skipped
    before = bench.calls()
    picture = bench.picture(cached, steps=CACHE_STEPS)
    must(0 < len(seen) < CACHE_STEPS, f"{len(seen)} calls in {CACHE_STEPS} steps")
    if model is bench.far:
        done = [now - then for now, then in zip(bench.calls(), before, strict=True)]
        must(done == [len(seen)] * GROUPS, f"{done} calls of {len(seen)}")
    return torch.cat([picture.flatten(), torch.tensor(seen, dtype=picture.dtype)])


@check(WAN, calls=())
def lazycache(bench: Bench, model: Model) -> torch.Tensor:
    cached = node("LazyCache", model=model, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
    return bench.picture(cached, steps=CACHE_STEPS)


def watched(model: Model, add: Callable[[Model, Callable[..., Any]], None]) -> tuple[Model, list[Any]]:
    """A clone with a wrapper that writes down which conditions it sees."""
    seen: list[Any] = []
    patched = model.clone()
    add(patched, seen.append)
    return patched, seen


def around_model(patched: Model, note: Callable[..., Any]) -> None:
    def wrapper(executor: Any, *args: Any, **more: Any) -> Any:
        options = next(value for value in (*args, *more.values()) if isinstance(value, dict) and "sigmas" in value)
        note((args[0].shape[0], list(options["cond_or_uncond"])))
        return executor(*args, **more)

    patched.add_wrapper_with_key("diffusion_model", "watch", wrapper)


def as_function(patched: Model, note: Callable[..., Any]) -> None:
    def wrapper(apply: Any, given: dict[str, Any]) -> Any:
        note((given["input"].shape[0], list(given["cond_or_uncond"])))
        return apply(given["input"], given["timestep"], **given["c"])

    patched.set_model_unet_function_wrapper(wrapper)


def around_conds(patched: Model, note: Callable[..., Any]) -> None:
    def wrapper(executor: Any, model: Any, conds: Any, *more: Any) -> Any:
        note([cond is not None for cond in conds])
        return executor(model, conds, *more)

    patched.add_wrapper_with_key("calc_cond_batch", "watch", wrapper)


@check(WAN, UNET, WAN4, calls=(6, 6))
def wrappers_see_what_they_see_in_plain(bench: Bench, model: Model) -> torch.Tensor:
    pictures, notes = [], {}
    for add in (around_model, as_function, around_conds):
        patched, notes[add.__name__] = watched(model, add)
        pictures.append(bench.picture(patched))
    batched = [(2, [1, 0])] * STEPS
    expected = {"around_model": batched, "as_function": batched, "around_conds": [[True, True]] * STEPS}
    must(notes == expected, f"they saw {notes}")
    return both(*pictures)


@check(WAN, UNET, calls=(2, 2))
def watched_batch_of_three_conditions(bench: Bench, model: Model) -> torch.Tensor:
    patched, seen = watched(model, around_model)
    picture = perp_negative(bench, patched)
    must(seen == [(3, [2, 1, 0])] * STEPS, f"it saw {seen}")
    return picture


@check(WAN, calls=(4, 0))
def watched_conditions_that_cannot_be_batched(bench: Bench, model: Model) -> torch.Tensor:
    patched, seen = watched(model, around_model)
    picture = bench.picture(patched, positive=bench.text(1, tokens=3 * bench.family.tokens))
    must([rows for rows, _ in seen] == [1] * (2 * STEPS), f"it saw {seen}")
    return picture


@check(UNET, calls=(4, 4))
def control_apart_and_in_a_watched_batch(bench: Bench, model: Model) -> torch.Tensor:
    from comfy.controlnet import ControlBase

    class Control(ControlBase):
        """What a ControlNet adds, a row per row of the batch."""

        def get_control(self, x: torch.Tensor, t: Any, cond: Any, count: int, options: Any) -> Any:
            text = cond["c_crossattn"].mean(dim=(1, 2)).view(-1, 1, 1, 1)
            added = x.mean(dim=1, keepdim=True)[:, :, ::2, ::2].expand(-1, 320, -1, -1) + text
            return {"input": [], "middle": [0.2 * added.contiguous()], "output": []}

        def get_models(self) -> list[Any]:
            return []

    control = Control()
    texts = {
        name: [[text, {"control": control, "control_apply_to_uncond": False}]]
        for name, ((text, _),) in (("positive", bench.positive), ("negative", bench.negative))
    }
    patched, seen = watched(model, around_model)
    pictures = bench.picture(model, **texts), bench.picture(patched, **texts)
    must(len(seen) == STEPS, f"it saw {seen}")
    return both(*pictures)


# ---- random numbers inside the model -------------------------------------------------------------


def drawing(model: Model) -> Model:
    import torch

    def jitter(attention: Any, *args: Any, **more: Any) -> Any:
        return attention(*args, **more) * (1 + torch.rand(1).item())

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = jitter
    return patched


@check(WAN, calls=(2, 0))
def random_numbers_for_one_condition(bench: Bench, model: Model) -> torch.Tensor:
    return bench.picture(drawing(model), cfg=1.0)
