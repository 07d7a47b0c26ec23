"""Sampler nodes: ComfyUI's own samplers under the ids and sockets of the earlier pack."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.samplers

core: Any = importlib.import_module("nodes")
"""ComfyUI's own; this folder is `comfy_raylight.nodes`."""

TOOLTIPS = {
    "add_noise": "Add noise to the latent first. Disable it in a second stage that continues a first one.",
    "noise_seed": "Seed of the noise.",
    "steps": "Number of steps of the whole schedule.",
    "cfg": "Classifier-free guidance scale; at 1.0 the negative prompt is not computed.",
    "sampler_name": "ComfyUI's samplers.",
    "scheduler": "ComfyUI's schedulers.",
    "ray_actors": "The model on the pool.",
    "positive": "What the picture should show.",
    "negative": "What it should not show.",
    "latent_image": "The latent to denoise.",
    "start_at_step": "First step of the schedule that is run.",
    "end_at_step": "Step of the schedule to stop before.",
    "return_with_leftover_noise": "Leave the noise of the steps that are not run in the latent, for another stage.",
    "sigmas": "A schedule of your own. Replaces steps, scheduler, start, end and leftover noise.",
}
ORDER = tuple(name for name in TOOLTIPS if name != "sigmas")
"""Widget order of the earlier pack, by which saved files hold their values."""


class XFuserKSamplerAdvanced:
    """ComfyUI's KSamplerAdvanced on a model of the pool."""

    CATEGORY = "Raylight"
    DESCRIPTION = "ComfyUI's KSampler (Advanced) on the workers; with sigmas connected, its SamplerCustom."
    SEARCH_ALIASES = ("ksampler", "sampler", "multi gpu")
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT", "RAY_ACTORS")
    RETURN_NAMES = ("LATENT", "ray_actors")
    OUTPUT_TOOLTIPS = ("The denoised latent.", "The model, unchanged.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = core.KSamplerAdvanced.INPUT_TYPES()["required"]
        inputs = {**inputs, "ray_actors": ("RAY_ACTORS",), "sigmas": ("SIGMAS",)}
        described = {
            name: (inputs[name][0], {**(inputs[name][1] if len(inputs[name]) > 1 else {}), "tooltip": tooltip})
            for name, tooltip in TOOLTIPS.items()
        }
        return {
            "required": {name: described[name] for name in ORDER},
            "optional": {"sigmas": described["sigmas"]},
        }

    def sample(self, ray_actors: Any, sigmas: Any = None, **values: Any) -> tuple[Any, Any]:
        if sigmas is None:
            return (*core.KSamplerAdvanced().sample(model=ray_actors, **values), ray_actors)
        custom = core.NODE_CLASS_MAPPINGS["SamplerCustom"]
        outputs = getattr(custom(), custom.FUNCTION)(
            model=ray_actors,
            add_noise=values["add_noise"] == "enable",
            noise_seed=values["noise_seed"],
            cfg=values["cfg"],
            positive=values["positive"],
            negative=values["negative"],
            sampler=comfy.samplers.sampler_object(values["sampler_name"]),
            sigmas=sigmas,
            latent_image=values["latent_image"],
        )
        return outputs[0], ray_actors
