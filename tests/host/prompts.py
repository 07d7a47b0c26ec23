"""API prompts for the same sampling on plain ComfyUI (`plain`) and on the pool (`pool`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .api import Prompt

SAMPLER = "sampler"
LOADER = "loader"
INIT = "init"
SAVE = "save"
GUIDERS = ("CFGGuider", "BasicGuider", "DualCFGGuider", "PerpNegGuider")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a family is sampled with: the latent's shape and its conditioning.

    Attributes:
        frames: 0 for a latent without them.
        shape: the latent's dims after the batch, in place of channels, frames, height and width; several latents
            are separated by semicolons.
        kept: frames at the start that a mask keeps, so that they have a timestep of their own in some families.
        extras: more parts of the conditioning, as `made` of the test nodes reads them.
    """

    channels: int = 1
    frames: int = 0
    height: int = 1
    width: int = 1
    shape: str = ""
    kept: int = 0
    tokens: int
    context: int
    pooled: int = 0
    guidance: float = -1.0
    attention_mask: bool = False
    extras: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Inputs] = {
    "wan": Inputs(channels=16, frames=3, height=30, width=34, tokens=32, context=4096),
    "wan_i2v": Inputs(channels=16, frames=3, height=30, width=34, tokens=32, context=4096),
    "flux": Inputs(channels=16, frames=0, height=30, width=34, tokens=19, context=4096, pooled=768, guidance=3.5),
    "zimage": Inputs(channels=16, frames=0, height=30, width=34, tokens=13, context=64),
    "lumina2": Inputs(channels=16, frames=0, height=30, width=34, tokens=13, context=64),
    "unet": Inputs(channels=4, frames=0, height=16, width=16, tokens=77, context=768),
}
"""By the names of `checkpoints.recipes.RECIPES`, with the widths of their default sizes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sampling, wherever it runs.

    Attributes:
        file: name of the checkpoint in the diffusion_models folder.
        inputs: latent and conditioning, usually from `FAMILIES`.
        sampling: "KSamplerAdvanced", "KSampler", or one of `GUIDERS` for SamplerCustomAdvanced.
        cfg2: second scale of DualCFGGuider, neg_scale of PerpNegGuider.
        denoise: for "KSampler" and the guiders.
        sigmas: values separated by commas, in place of scheduler and steps; with "KSamplerAdvanced" plain
            ComfyUI samples through SamplerCustom, which is what the pool's sampler does with them.
        leftover: return with leftover noise ("KSamplerAdvanced").
        random_latent: start from a random latent in place of an empty one.
        model_nodes: MODEL -> MODEL nodes in order, each with its inputs besides `model`.
        name: name of the result in the output folder.
    """

    file: str
    inputs: Inputs
    sampling: str = "KSamplerAdvanced"
    sampler: str = "euler"
    scheduler: str = "simple"
    steps: int = 2
    cfg: float = 3.0
    cfg2: float = 1.5
    denoise: float = 1.0
    seed: int = 7
    start: int = 0
    end: int = 10000
    add_noise: bool = True
    leftover: bool = False
    sigmas: str = ""
    batch: int = 1
    random_latent: bool = False
    weight_dtype: str = "default"
    model_nodes: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    name: str = "latent"


@dataclass(frozen=True, kw_only=True)
class PoolCase:
    """Where and how the pool samples: the widgets of RayInitializer.

    Attributes:
        through_model: sample with ComfyUI's own node on the loader's MODEL output, in place of
            XFuserKSamplerAdvanced on RAY_ACTORS. Only this can do more than "KSamplerAdvanced" without model nodes.
        more: other inputs of RayInitializer.
    """

    workers: int = 2
    ulysses: int | None = None
    ring: int = 1
    cfg: int = 1
    through_model: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def initializer(self) -> dict[str, Any]:
        """The inputs of RayInitializer; without `ulysses` all workers share the sequence."""
        ulysses = self.workers // (self.ring * self.cfg) if self.ulysses is None else self.ulysses
        return {
            "ray_cluster_address": "local",
            "ray_cluster_namespace": "default",
            "GPU": self.workers,
            "ulysses_degree": ulysses,
            "ring_degree": self.ring,
            "cfg_degree": self.cfg,
            "sync_ulysses": False,
            "FSDP": False,
            "FSDP_CPU_OFFLOAD": False,
            "XFuser_attention": "TORCH",
            "ray_object_store_gb": 0.0,
            **self.more,
        }


def plain(case: Case) -> Prompt:
    """The case on ComfyUI's own loader."""
    prompt = _inputs(case)
    prompt[LOADER] = _node("UNETLoader", unet_name=case.file, weight_dtype=case.weight_dtype)
    _sample_model(prompt, case, [LOADER, 0])
    return prompt


def pool(case: Case, where: PoolCase | None = None) -> Prompt:
    """The case on the pool."""
    where = where or PoolCase()
    prompt = _inputs(case)
    prompt[INIT] = _node("RayInitializer", **where.initializer())
    prompt[LOADER] = _node(
        "RayUNETLoader", unet_name=case.file, weight_dtype=case.weight_dtype, ray_actors_init=[INIT, 0]
    )
    if where.through_model:
        _sample_model(prompt, case, [LOADER, 1])
        return prompt
    assert case.sampling == "KSamplerAdvanced" and not case.model_nodes, "this needs through_model"
    more: dict[str, Any] = {"sigmas": ["sigmas", 0]} if _add_sigmas(prompt, case) else {}
    prompt[SAMPLER] = _node("XFuserKSamplerAdvanced", ray_actors=[LOADER, 0], **_advanced(case), **more)
    return prompt


def with_gguf(prompt: Prompt, file: str) -> Prompt:
    """A prompt of the pool with the GGUF loader in the place of the other."""
    kinds = {"dequant_dtype": "default", "patch_dtype": "default"}
    prompt[LOADER] = _node("RayGGUFLoader", unet_name=file, **kinds, ray_actors_init=[INIT, 0])
    return prompt


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _inputs(case: Case) -> Prompt:
    """Everything around model and sampler; the sampler is to be added under `SAMPLER`."""
    given = case.inputs
    prompt = {
        name: _node(
            "RLTestConditioning",
            seed=seed,
            tokens=given.tokens,
            width=given.context,
            pooled=given.pooled,
            guidance=given.guidance,
            attention_mask=given.attention_mask,
            extras=json.dumps(dict(given.extras)),
        )
        for seed, name in enumerate(_conditionings(case), start=1)
    }
    prompt["latent"] = _node(
        "RLTestLatent",
        channels=given.channels,
        frames=given.frames,
        height=given.height,
        width=given.width,
        batch=case.batch,
        seed=case.seed + 1,
        empty=not case.random_latent,
        shape=given.shape,
        kept=given.kept,
    )
    prompt[SAVE] = _node("RLTestSaveLatent", samples=[SAMPLER, 0], name=case.name)
    return prompt


def _conditionings(case: Case) -> tuple[str, ...]:
    third = case.sampling in ("DualCFGGuider", "PerpNegGuider")
    return ("positive", "negative", "third") if third else ("positive", "negative")


def _advanced(case: Case) -> dict[str, Any]:
    return {
        "add_noise": "enable" if case.add_noise else "disable",
        "noise_seed": case.seed,
        "steps": case.steps,
        "cfg": case.cfg,
        "sampler_name": case.sampler,
        "scheduler": case.scheduler,
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "start_at_step": case.start,
        "end_at_step": case.end,
        "return_with_leftover_noise": "enable" if case.leftover else "disable",
    }


def _add_sigmas(prompt: Prompt, case: Case) -> bool:
    if case.sigmas:
        prompt["sigmas"] = _node("RLTestSigmas", sigmas=case.sigmas)
    return bool(case.sigmas)


def _sample_model(prompt: Prompt, case: Case, model: list[Any]) -> None:
    """Add the sampler of the case on the MODEL at `model`."""
    for number, (class_type, inputs) in enumerate(case.model_nodes):
        prompt[f"model{number}"] = _node(class_type, model=model, **inputs)
        model = [f"model{number}", 0]
    has_sigmas = _add_sigmas(prompt, case)
    if case.sampling == "KSampler":
        prompt[SAMPLER] = _node(
            "KSampler",
            model=model,
            seed=case.seed,
            steps=case.steps,
            cfg=case.cfg,
            sampler_name=case.sampler,
            scheduler=case.scheduler,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            denoise=case.denoise,
        )
        return
    if case.sampling == "KSamplerAdvanced" and not has_sigmas:
        prompt[SAMPLER] = _node("KSamplerAdvanced", model=model, **_advanced(case))
        return
    prompt["method"] = _node("KSamplerSelect", sampler_name=case.sampler)
    if case.sampling == "KSamplerAdvanced":
        prompt[SAMPLER] = _node(
            "SamplerCustom",
            model=model,
            add_noise=case.add_noise,
            noise_seed=case.seed,
            cfg=case.cfg,
            positive=["positive", 0],
            negative=["negative", 0],
            sampler=["method", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        )
        return
    if not has_sigmas:
        prompt["sigmas"] = _node(
            "BasicScheduler", model=model, scheduler=case.scheduler, steps=case.steps, denoise=case.denoise
        )
    prompt["noise"] = _node("RandomNoise", noise_seed=case.seed) if case.add_noise else _node("DisableNoise")
    prompt["guider"] = _node(case.sampling, model=model, **_guidance(case))
    prompt[SAMPLER] = _node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["method", 0],
        sigmas=["sigmas", 0],
        latent_image=["latent", 0],
    )


def _guidance(case: Case) -> dict[str, Any]:
    positive, negative, third = ["positive", 0], ["negative", 0], ["third", 0]
    match case.sampling:
        case "BasicGuider":
            return {"conditioning": positive}
        case "CFGGuider":
            return {"positive": positive, "negative": negative, "cfg": case.cfg}
        case "DualCFGGuider":
            scales = {"cfg_conds": case.cfg, "cfg_cond2_negative": case.cfg2, "style": "regular"}
            return {"cond1": positive, "cond2": third, "negative": negative, **scales}
        case "PerpNegGuider":
            scales = {"cfg": case.cfg, "neg_scale": case.cfg2}
            return {"positive": positive, "negative": negative, "empty_conditioning": third, **scales}
        case unknown:
            raise ValueError(f"sampling {unknown!r} is none of KSamplerAdvanced, KSampler, {', '.join(GUIDERS)}")
