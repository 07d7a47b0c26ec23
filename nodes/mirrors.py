"""Nodes of ComfyUI with the model's socket changed to RAY_ACTORS, since RAY_ACTORS is a MODEL: one table."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

core: Any = importlib.import_module("nodes")
"""ComfyUI's own; this folder is `comfy_raylight.nodes`."""

log = logging.getLogger(__name__)

Spec = tuple[Any, dict[str, Any]]
"""An input as INPUT_TYPES declares it: its type, or the list of its values, and its options."""
Core = Callable[..., tuple[Any, ...]]
"""Runs a node of ComfyUI by the names of its inputs."""
MODEL, ACTORS = "model", "ray_actors"
"""The socket's name there and here."""
FOLLOWED = ("INPUT_IS_LIST", "OUTPUT_IS_LIST", "OUTPUT_NODE", "EXPERIMENTAL")
"""What else of a class of ComfyUI's holds for its mirror."""

EXTRA = "Raylight/extra"
SAMPLERS = "Raylight/extra/custom_sampling/samplers"
SCHEDULERS = "Raylight/extra/custom_sampling/schedulers"
GUIDERS = "Raylight/extra/custom_sampling/guiders"

TOOLTIPS: Mapping[str, str] = {
    ACTORS: "The model on the pool.",
    "add_noise": "Add noise to the latent first. Disable it in a second stage that continues a first one.",
    "alpha": "First parameter of the beta distribution: smaller values put more steps at the start.",
    "base_shift": "Shift of the noise levels of a small picture.",
    "beta": "Second parameter of the beta distribution: smaller values put more steps at the end.",
    "cfg": "Classifier-free guidance scale; at 1.0 the negative prompt is not computed.",
    "cfg_cond2_negative": "Scale between cond2 and negative.",
    "cfg_conds": "Scale between cond1 and cond2.",
    "cond1": "What the picture should show.",
    "cond2": "A second prompt, between the first and the negative one.",
    "conditioning": "What the picture should show.",
    "corrector_order": "Order of the corrector; 0 switches it off.",
    "denoise": "Part of the schedule that is run, counted from its end: below 1.0 the latent keeps something.",
    "dtype": "Type to compute in; the weights stay as they are. default: what ComfyUI chooses.",
    "end_percent": "Where in the schedule it ends.",
    "eta": "How much noise is added between the two percents.",
    "force_empty_noise": "Add no noise: only scale the latent as if there were some.",
    "guider": "Model and conditioning: a guider of this pack or of ComfyUI.",
    "height": "Height of the picture in pixels.",
    "image": "The picture that controls, of any size.",
    "latent": "Its number of tokens decides between the two shifts; without one, 4096 tokens.",
    "latent_image": "The latent to begin with.",
    "max_shift": "Shift of the noise levels of a large picture.",
    "multiplier": "How much of the rescaled guidance to take.",
    "negative": "What the picture should not show.",
    "noise_seed": "Seed of the noise.",
    "positive": "What the picture should show.",
    "predictor_order": "Order of the predictor.",
    "ray_control_net": "The ControlNet, from Load ControlNet (Ray).",
    "ray_vae": "For ControlNets that look at a latent of the picture.",
    "s_noise": "Scale of the noise that is added.",
    "sampler": "The sampling method, from KSamplerSelect or another node.",
    "sampling": "What the model was trained to predict.",
    "sampling_percent": "Position in the schedule: 0.0 is its start, 1.0 its end.",
    "scheduler": "ComfyUI's schedulers.",
    "sde_end_percent": "Where in the schedule noise ceases to be added.",
    "sde_start_percent": "Where in the schedule noise begins to be added.",
    "shift": "Shifts the noise levels: higher values spend more steps on the composition.",
    "sigma_max": "Highest noise level.",
    "sigma_min": "Lowest noise level.",
    "sigmas": "The noise levels, from a scheduler.",
    "simple_order_2": "Use a simpler formula at order 2.",
    "start_percent": "Where in the schedule it begins.",
    "steps": "Number of steps.",
    "strength": "How much of what the ControlNet adds; 0 leaves it out.",
    "style": "How the two scales are combined.",
    "use_pece": "Evaluate the model once more after each correction: better steps at twice the cost.",
    "vae_name": "File in models/vae.",
    "width": "Width of the picture in pixels.",
    "zsnr": "Let the schedule begin at pure noise.",
}
"""For inputs to which ComfyUI gives none."""
OUTPUT_TOOLTIPS: Mapping[str, str] = {
    "CONDITIONING": "The prompt with the ControlNet.",
    "FLOAT": "The noise level.",
    "GUIDER": "The same guider, for ComfyUI's own nodes.",
    "LATENT": "The latent.",
    "RAY_ACTORS": "The model with this change; the input is not changed.",
    "RAY_GUIDER": "Model and conditioning, for Ray samplers.",
    "RAY_VAE": "The VAE, for Ray nodes.",
    "SAMPLER": "The sampling method.",
    "SIGMAS": "The noise levels.",
    "VAE": "The same VAE, for ComfyUI's own nodes.",
}


def _as_it_is(run: Core, **values: Any) -> tuple[Any, ...]:
    return run(**values)


@dataclass(frozen=True)
class Mirror:
    """One node: what users' files say of it, which ComfyUI's own class does not decide.

    Attributes:
        id: of the node.
        core: of ComfyUI's node.
        inputs: names in the order of the widgets, which files hold their values by; optional ones after a bar.
            What ComfyUI adds later becomes optional and comes last.
        outputs: types and names as "TYPE:name", where they are not ComfyUI's with RAY_ACTORS for MODEL.
        display: name on the canvas; without one ComfyUI shows the id.
        own: inputs that ComfyUI's node does not have, or has with another type.
        given: inputs of ComfyUI's node that `call` gives it.
        call: runs ComfyUI's node with the values, by default as they are.
        about: description, after "ComfyUI's" and its id.
        deprecated: whether only old files need it; ComfyUI's search then leaves it out.
    """

    id: str
    core: str
    category: str
    inputs: str
    outputs: str = ""
    display: str = ""
    own: Mapping[str, Spec] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    call: Callable[..., tuple[Any, ...]] = _as_it_is
    about: str = "on a model of the pool."
    deprecated: bool = False


class _MirrorNode:
    """Base of the classes that `node_classes` makes."""

    FUNCTION = "run"

    mirror: ClassVar[Mirror]
    node: ClassVar[Any]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Spec]]:
        return _declared(cls.mirror, cls.node)

    def run(self, **values: Any) -> tuple[Any, ...]:
        optional = self.INPUT_TYPES()["optional"].items()
        defaults = {name: options["default"] for name, (_, options) in optional if "default" in options}
        return self.mirror.call(_runner(self.node), **{**defaults, **values})


def node_classes() -> dict[str, type]:
    """The classes of the table by their ids; what this ComfyUI has no fitting node for is left out, and logged.

    ComfyUI has loaded all of its own nodes before it loads those of others.
    """
    found = {}
    for mirror in MIRRORS:
        node = core.NODE_CLASS_MAPPINGS.get(mirror.core)
        missing = [mirror.core] if node is None else _missing(mirror, node)
        if missing:
            log.info("%s is left out: this ComfyUI has no %s", mirror.id, ", ".join(missing))
        else:
            found[mirror.id] = _node_class(mirror, node)
    return found


def display_names() -> dict[str, str]:
    """The names on the canvas of rows that have one."""
    return {mirror.id: mirror.display for mirror in MIRRORS if mirror.display}


def _node_class(mirror: Mirror, node: Any) -> type:
    outputs = list(_outputs(mirror, node))
    other = f"As in ComfyUI's {mirror.core}."
    tooltips = {**OUTPUT_TOOLTIPS, **({"RAY_ACTORS": "The model, unchanged."} if outputs[0][0] == "LATENT" else {})}
    attributes = {name: getattr(node, name) for name in FOLLOWED if getattr(node, name, None)}
    if mirror.outputs:
        attributes.pop("OUTPUT_IS_LIST", None)  # it counts ComfyUI's outputs
    about = f"ComfyUI's {mirror.core} {mirror.about}"
    own_words = getattr(node, "DESCRIPTION", "") or ""
    return type(
        mirror.id,
        (_MirrorNode,),
        {
            **attributes,
            "__doc__": about,
            "mirror": mirror,
            "node": node,
            "CATEGORY": mirror.category,
            "DESCRIPTION": f"{about} {own_words}".strip(),
            "SEARCH_ALIASES": (mirror.core, *getattr(node, "SEARCH_ALIASES", ())),
            "DEPRECATED": mirror.deprecated or getattr(node, "DEPRECATED", False),
            "RETURN_TYPES": tuple(kind for kind, _ in outputs),
            "RETURN_NAMES": tuple(name for _, name in outputs),
            "OUTPUT_TOOLTIPS": tuple(tooltips.get(kind, other) for kind, _ in outputs),
        },
    )


def _outputs(mirror: Mirror, node: Any) -> Iterator[tuple[str, str]]:
    """Type and name of each."""
    if mirror.outputs:
        for output in mirror.outputs.split():
            kind, _, name = output.partition(":")
            yield kind, name
        return
    names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
    for kind, name in zip(node.RETURN_TYPES, names, strict=True):
        yield ("RAY_ACTORS", ACTORS) if kind == "MODEL" else (kind, name)


def _of_core(node: Any) -> dict[str, Spec]:
    """The inputs of a node of ComfyUI, with our name and type of the model."""
    declared = node.INPUT_TYPES()
    found: dict[str, Spec] = {}
    for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        kind, options = spec[0], dict(spec[1]) if len(spec) > 1 else {}
        if kind == "COMBO":
            # the newer form of a list of values, which ComfyUI 0.3.75 does not check in classes of the older form
            kind = list(options.pop("options"))
        found[ACTORS if name == MODEL else name] = ("RAY_ACTORS" if kind == "MODEL" else kind, options)
    return found


def _declared(mirror: Mirror, node: Any) -> dict[str, dict[str, Spec]]:
    available = {**_of_core(node), **mirror.own}
    required, _, optional = (part.split() for part in mirror.inputs.partition("|"))
    later = [name for name in available if name not in (*required, *optional, *mirror.given)]
    other = f"As in ComfyUI's {mirror.core}."

    def described(name: str) -> Spec:
        kind, options = available[name]
        return kind, {"tooltip": TOOLTIPS.get(name, other), **options}

    return {
        "required": {name: described(name) for name in required},
        "optional": {name: described(name) for name in (*optional, *later)},
    }


def _missing(mirror: Mirror, node: Any) -> list[str]:
    """Inputs of the row that nothing provides."""
    available = {**_of_core(node), **mirror.own}
    return [f"{mirror.core} with {name}" for name in mirror.inputs.replace("|", " ").split() if name not in available]


def _runner(node: Any) -> Core:
    """Runs a node of ComfyUI, of either form of classes."""

    def run(**values: Any) -> tuple[Any, ...]:
        if ACTORS in values:
            values[MODEL] = values.pop(ACTORS)
        outputs = getattr(node(), node.FUNCTION)(**values)
        return outputs if isinstance(outputs, tuple) else tuple(outputs.result)

    return run


def first_output(node: str, **values: Any) -> Any:
    """The first output of a node of ComfyUI, by the names of its inputs."""
    return _runner(core.NODE_CLASS_MAPPINGS[node])(**values)[0]


def _noise(*, seed: int, empty: bool) -> Any:
    return first_output("DisableNoise") if empty else first_output("RandomNoise", noise_seed=seed)


def _sampled(run: Core, **values: Any) -> tuple[Any, ...]:
    return run(**values)[0], values[ACTORS]


def _guided(run: Core, *, add_noise: bool, noise_seed: int, guider: Any, **values: Any) -> tuple[Any, ...]:
    latents = run(noise=_noise(seed=noise_seed, empty=not add_noise), guider=guider, **values)
    return (*latents, guider.model_patcher)


def _noised(run: Core, *, noise_seed: int, force_empty_noise: bool, **values: Any) -> tuple[Any, ...]:
    return run(noise=_noise(seed=noise_seed, empty=force_empty_noise), **values)


def _cached(run: Core, *, subsample_factor: int, distributed_sync: bool, **values: Any) -> tuple[Any, ...]:
    (model,) = run(**values)
    # ComfyUI's node has no input for this, and made the holder for this clone alone
    model.model_options["transformer_options"]["easycache"].subsample_factor = subsample_factor
    return (model,)


def _for_both(run: Core, **values: Any) -> tuple[Any, ...]:
    (value,) = run(**values)
    return value, value


def _without_actors(run: Core, *, ray_actors: Any, **values: Any) -> tuple[Any, ...]:
    return _for_both(run, **values)


def _controlled(run: Core, *, ray_control_net: Any, ray_vae: Any = None, **values: Any) -> tuple[Any, ...]:
    return run(control_net=ray_control_net, vae=ray_vae, **values)


SEED: Spec = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True})
GUIDER_OUTPUTS = "RAY_GUIDER:guider GUIDER:GUIDER"
SYNC = "Of the earlier pack, without effect: the cache decides once, in ComfyUI's process, for all workers."
SUBSAMPLE = "Every how many rows and columns are compared to measure the change; ComfyUI's own node takes 8."
ANY_MODEL = "Any model on the pool; it makes no difference to the VAE."

MIRRORS = (
    Mirror("RayBasicScheduler", "BasicScheduler", SCHEDULERS, "ray_actors scheduler steps denoise"),
    Mirror("RayBetaSamplingScheduler", "BetaSamplingScheduler", SCHEDULERS, "ray_actors steps alpha beta"),
    Mirror(
        "RaySamplingPercentToSigma",
        "SamplingPercentToSigma",
        SCHEDULERS,
        "ray_actors sampling_percent return_actual_sigma",
    ),
    Mirror(
        "RaySamplerSASolver",
        "SamplerSASolver",
        SAMPLERS,
        "ray_actors eta sde_start_percent sde_end_percent s_noise predictor_order corrector_order use_pece "
        "simple_order_2",
    ),
    Mirror(
        "RayAddNoise",
        "AddNoise",
        SAMPLERS,
        "noise_seed force_empty_noise ray_actors sigmas latent_image",
        own={"noise_seed": SEED, "force_empty_noise": ("BOOLEAN", {})},
        given=("noise",),
        call=_noised,
    ),
    Mirror(
        "XFuserSamplerCustom",
        "SamplerCustom",
        SAMPLERS,
        "ray_actors add_noise noise_seed cfg positive negative sampler sigmas latent_image",
        outputs="LATENT:output RAY_ACTORS:ray_actors",
        display="XFuser SamplerCustom",
        call=_sampled,
    ),
    Mirror(
        "XFuserSamplerCustomAdvanced",
        "SamplerCustomAdvanced",
        SAMPLERS,
        "add_noise noise_seed guider sampler sigmas latent_image",
        outputs="LATENT:output LATENT:denoised_output RAY_ACTORS:ray_actors",
        display="XFuser SamplerCustom Advanced",
        own={
            "add_noise": ("BOOLEAN", {"default": True}),
            "noise_seed": SEED,
            "guider": ("RAY_GUIDER,GUIDER", {}),
        },
        given=("noise",),
        call=_guided,
    ),
    Mirror(
        "RayBasicGuider",
        "BasicGuider",
        GUIDERS,
        "ray_actors conditioning",
        outputs=GUIDER_OUTPUTS,
        display="Basic Guider (Ray)",
        call=_for_both,
    ),
    Mirror(
        "RayCFGGuider",
        "CFGGuider",
        GUIDERS,
        "ray_actors positive negative cfg",
        outputs=GUIDER_OUTPUTS,
        display="CFG Guider (Ray)",
        call=_for_both,
    ),
    Mirror(
        "RayDualCFGGuider",
        "DualCFGGuider",
        GUIDERS,
        "ray_actors cond1 cond2 negative cfg_conds cfg_cond2_negative style",
        outputs=GUIDER_OUTPUTS,
        display="Dual CFG Guider (Ray)",
        call=_for_both,
    ),
    Mirror("RayModelSamplingDiscrete", "ModelSamplingDiscrete", EXTRA, "ray_actors sampling zsnr"),
    Mirror(
        "RayModelSamplingContinuousEDM",
        "ModelSamplingContinuousEDM",
        EXTRA,
        "ray_actors sampling sigma_max sigma_min",
    ),
    Mirror("RayModelSamplingContinuousV", "ModelSamplingContinuousV", EXTRA, "ray_actors sampling sigma_max sigma_min"),
    Mirror("RayModelSamplingStableCascade", "ModelSamplingStableCascade", EXTRA, "ray_actors shift"),
    Mirror("RayModelSamplingSD3", "ModelSamplingSD3", EXTRA, "ray_actors shift"),
    Mirror("RayModelSamplingAuraFlow", "ModelSamplingAuraFlow", EXTRA, "ray_actors shift"),
    Mirror("RayModelSamplingFlux", "ModelSamplingFlux", EXTRA, "ray_actors max_shift base_shift width height"),
    Mirror(
        "RayModelSamplingLTXV",
        "ModelSamplingLTXV",
        EXTRA,
        "ray_actors max_shift base_shift | latent",
        display="Model Sampling LTXV (Ray)",
    ),
    Mirror("RayRescaleCFG", "RescaleCFG", EXTRA, "ray_actors multiplier"),
    Mirror("RayModelComputeDtype", "ModelComputeDtype", EXTRA, "ray_actors dtype"),
    Mirror(
        "RayEasyCache",
        "EasyCache",
        EXTRA,
        "ray_actors reuse_threshold start_percent end_percent | subsample_factor verbose distributed_sync",
        display="EasyCache (Ray)",
        own={
            "subsample_factor": ("INT", {"default": 8, "min": 1, "max": 16, "tooltip": SUBSAMPLE}),
            "distributed_sync": ("BOOLEAN", {"default": True, "tooltip": SYNC}),
        },
        call=_cached,
    ),
    Mirror(
        "RayLTXVReferenceAudio",
        "LTXVReferenceAudio",
        EXTRA,
        "ray_actors positive negative reference_audio audio_vae identity_guidance_scale start_percent end_percent",
        display="LTXV Reference Audio (Ray)",
    ),
    Mirror(
        "RayControlNetApply",
        "ControlNetApplyAdvanced",
        "Raylight",
        "positive negative ray_control_net image strength start_percent end_percent | ray_vae",
        display="Apply ControlNet (Ray)",
        own={"ray_control_net": ("RAY_CONTROL_NET,CONTROL_NET", {}), "ray_vae": ("RAY_VAE,VAE", {})},
        given=("control_net", "vae"),
        call=_controlled,
        about="for one whose residuals the workers compute, from Load ControlNet (Ray), or for ComfyUI's own.",
    ),
    Mirror(
        "RayVAELoader",
        "VAELoader",
        "Raylight",
        "ray_actors vae_name",
        outputs="RAY_VAE:ray_vae VAE:vae",
        display="Load VAE (Ray)",
        own={ACTORS: ("RAY_ACTORS", {"tooltip": ANY_MODEL})},
        call=_without_actors,
        about="under both names: ComfyUI's process loads the VAE. Distributed VAE (Ray) needs none: it loads its own "
        "on the workers.",
        deprecated=True,
    ),
)
"""The nodes. A node of ComfyUI that needs nothing of its own is one line more."""
