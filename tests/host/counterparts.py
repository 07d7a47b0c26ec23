"""Every node of the pack beside what it is in plain ComfyUI: one prompt does the same both ways."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .client import ComfyClient, Prompt
from .prompts import PoolCase
from .server import PACK_FOLDER, ComfyServer

if TYPE_CHECKING:
    import torch

Link = list[Any]
"""Node id and number of an output."""
CHECKPOINT, DEQUANTISED, GGUF = "wan.safetensors", "wan-counterpart-whole.safetensors", "wan-counterpart.gguf"
LORA, VAE_FILE = "counterpart.safetensors", "wan.safetensors"
ENCODER, ENCODER_KIND = "counterpart-clip.safetensors", "clip_l"
CONTROLLED, CONTROL, CONTROL_VAE = "sd3-counterpart.safetensors", "control.safetensors", "taesd3.safetensors"
STEPS = 2
SEED = 3
LIMIT_S = 500.0
NONE = "none"
ROUNDING = {"RayModelComputeDtype": 2e-2}
"""Nodes that have the model compute in bfloat16, and what that makes of a latent in two steps: some CPUs' matrix
products round otherwise for other numbers of rows, which workers have. Both are equally far from fp32, and one worker
gives plain's bits."""
IDLE = frozenset({"RayLTXVReferenceAudio"})
"""Model nodes that change nothing of a model without sound."""
NUDGES: Mapping[str, Mapping[str, Any]] = {
    "RayAddNoise": {"noise_seed": SEED},
    "RayBasicScheduler": {"steps": 5, "denoise": 0.6},
    "RayCFGGuider": {"cfg": 3.0},
    "RayDualCFGGuider": {"cfg_conds": 3.0, "cfg_cond2_negative": 1.5, "style": "nested"},
    "RayEasyCache": {"reuse_threshold": 0.8, "start_percent": 0.0, "end_percent": 0.95, "verbose": True},
    "RayModelComputeDtype": {"dtype": "bf16"},
    "RayModelSamplingDiscrete": {"sampling": "v_prediction"},
    "RayModelSamplingFlux": {"max_shift": 1.5},
    "RaySamplerSASolver": {"use_pece": True},
    "RaySamplingPercentToSigma": {"sampling_percent": 0.3},
    "RayVAELoader": {"vae_name": "pixel_space"},
    "XFuserSamplerCustom": {"noise_seed": SEED, "cfg": 3.0},
    "XFuserSamplerCustomAdvanced": {"noise_seed": SEED},
}
"""Inputs in place of the defaults, with which a node shows something."""
ALONE = {"RayEasyCache": 10}
"""Nodes that get a prompt of their own, and steps: a cache skips nothing in less. It takes its range from the noise
levels the model had last, ComfyUI's own too, so the model without any node has to be sampled just before."""


@dataclass(frozen=True)
class Outcome:
    """How a node compares.

    Attributes:
        core: what it is in plain ComfyUI, for a table.
        error: largest difference over the largest plain value.
        effect: the same between plain ComfyUI with and without the node, for nodes that change a model.
    """

    core: str
    error: float
    effect: float | None = None

    def fine(self, name: str) -> bool:
        return self.error <= ROUNDING.get(name, 1e-5)


class Side:
    """One of the two ways: its model, and the nodes it samples with."""

    def __init__(self, both: Both, model: Link, *, pool: bool) -> None:
        self.both, self.model, self.pool = both, model, pool
        self.of_model = "ray_actors" if pool else "model"
        self.plain: Link = []
        """A latent of the model without any node."""

    def sampled(
        self,
        model: Link | None = None,
        *,
        steps: int = STEPS,
        positive: Link | None = None,
        negative: Link | None = None,
        latent: Link | None = None,
        seed: int | None = None,
    ) -> Link:
        """A latent of two steps of euler at cfg 3."""
        return self.both.add(
            "XFuserKSamplerAdvanced" if self.pool else "KSamplerAdvanced",
            **{self.of_model: model or self.model},
            add_noise="enable",
            noise_seed=self.both.seed if seed is None else seed,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            positive=positive or self.both.positive,
            negative=negative or self.both.negative,
            latent_image=latent or self.both.latent,
            start_at_step=0,
            end_at_step=10000,
            return_with_leftover_noise="disable",
        )

    def with_method(self, sampler: Link, *, seed: int = SEED) -> Link:
        """A latent by a sampling method."""
        return self.both.add(
            "XFuserSamplerCustom" if self.pool else "SamplerCustom",
            **{self.of_model: self.model},
            add_noise=True,
            noise_seed=seed,
            cfg=3.0,
            positive=self.both.positive,
            negative=self.both.negative,
            sampler=sampler,
            sigmas=self.both.sigmas,
            latent_image=self.both.latent,
        )

    def with_guider(self, guider: Link) -> Link:
        """A latent by a guider."""
        seed = {"add_noise": True, "noise_seed": SEED} if self.pool else {"noise": self.both.noise}
        return self.both.add(
            "XFuserSamplerCustomAdvanced" if self.pool else "SamplerCustomAdvanced",
            **seed,
            guider=guider,
            sampler=self.both.method,
            sigmas=self.both.sigmas,
            latent_image=self.both.latent,
        )

    def guider(self) -> Link:
        return self.both.add(
            "RayCFGGuider" if self.pool else "CFGGuider",
            **{self.of_model: self.model},
            positive=self.both.positive,
            negative=self.both.negative,
            cfg=3.0,
        )


class Both:
    """A prompt in which ComfyUI's own nodes and the pack's do the same.

    Args:
        published: ComfyUI's description of its nodes.
        seed: ComfyUI does not run again what it has run with the same one.
        where: the pool.
    """

    def __init__(self, published: Mapping[str, Any], *, seed: int = SEED, where: PoolCase | None = None) -> None:
        self.published, self.seed = published, seed
        self.prompt: Prompt = {}
        self.pairs: dict[str, list[str]] = {}
        self.positive, self.negative, self.third = (
            self.add(
                "RLTestConditioning",
                seed=seed,
                tokens=32,
                width=4096,
                pooled=0,
                guidance=-1.0,
                attention_mask=False,
                extras="{}",
            )
            for seed in (1, 2, 3)
        )
        self.latent = self.random_latent(channels=16, frames=2, height=14, width=18)
        self.sigmas = self.add("RLTestSigmas", sigmas="1.0, 0.7, 0.3, 0.0")
        self.method = self.add("KSamplerSelect", sampler_name="euler")
        self.noise = self.add("RandomNoise", noise_seed=SEED)
        self.init = self.add("RayInitializer", **(where or PoolCase()).initializer())
        self.core = Side(self, self.add("UNETLoader", unet_name=CHECKPOINT, weight_dtype="default"), pool=False)
        self.pool = Side(self, self.ray_loader(self.init), pool=True)
        self.core.plain, self.pool.plain = self.core.sampled(), self.pool.sampled()
        self.save(PLAIN if seed == SEED else f"{PLAIN}-{seed}", "LATENT", self.core.plain)

    def add(self, class_type: str, **inputs: Any) -> Link:
        """Add a node; its first output."""
        name = str(len(self.prompt))
        self.prompt[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    def random_latent(self, **sizes: int) -> Link:
        return self.add("RLTestLatent", **{"frames": 0, "batch": 1, "seed": 4, "empty": False, **sizes})

    def ray_loader(self, init: Link, **more: Link) -> Link:
        return self.add("RayUNETLoader", unet_name=CHECKPOINT, weight_dtype="default", ray_actors_init=init, **more)

    def save(self, name: str, kind: str, value: Link) -> None:
        match kind:
            case "LATENT":
                self.add("RLTestSaveLatent", samples=value, name=name)
            case "IMAGE":
                self.add("RLTestSavePixels", images=value, name=name)
            case "CONDITIONING":
                self.add("RLTestSaveConditioning", conditioning=value, name=name)
            case "SIGMAS" | "FLOAT":
                self.add("RLTestSaveValues", values=value, name=name)
            case _:
                raise ValueError(f"{name}: nothing saves a {kind}")

    def pair(self, node: str, kind: str, core: Link, pool: Link) -> None:
        """Two values that are to be equal."""
        names = self.pairs.setdefault(node, [])
        name = f"{node}-{{}}-{len(names)}"
        names.append(name)
        self.save(name.format("core"), kind, core)
        self.save(name.format("pool"), kind, pool)

    def pair_list(self, node: str, core: Iterable[Link], pool: Link) -> None:
        """Latents, and a list that is to be equal."""
        names = self.pairs.setdefault(node, [])
        for number, link in enumerate(core):
            self.save(f"{node}-core-{number}", "LATENT", link)
            names.append(f"{node}-{{}}-{number}")
        self.add("RLTestSaveLatents", samples=pool, name=f"{node}-pool-")

    def mirror(self, node: str, core: str) -> None:
        """A node of the pack and ComfyUI's own of the same inputs, whatever they are."""
        nudges = NUDGES.get(node, {})
        ours = {name: nudges.get(name, self._value(self.pool, name, spec)) for name, spec in self._inputs(node)}
        theirs = {
            name: ours[name]
            if name in ours and not isinstance(ours[name], list)
            else self._value(self.core, name, spec)
            for name, spec in self._inputs(core)
        }
        steps = ALONE.get(node)
        core_values = self._shown(self.core, self.add(core, **theirs), self._outputs(core), steps)
        pool_values = self._shown(self.pool, self.add(node, **ours), self._outputs(node), steps)
        for (kind, expected), (_, found) in zip(core_values, pool_values, strict=False):
            self.pair(node, kind, expected, found)

    def _inputs(self, node: str) -> list[tuple[str, Any]]:
        found = self.published[node]["input"]
        return [*found.get("required", {}).items(), *found.get("optional", {}).items()]

    def _outputs(self, node: str) -> list[str]:
        own = {"RAY_ACTORS": "MODEL", "RAY_GUIDER": "GUIDER", "RAY_VAE": "VAE"}
        return [own.get(kind, kind) for kind in self.published[node]["output"]]

    def _value(self, side: Side, name: str, spec: Any) -> Any:
        """A value for an input: its default, or something of its type."""
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if isinstance(kind, list) or kind == "COMBO":
            return options.get("default", (options.get("options") or kind or [""])[0])
        links: Mapping[str, Callable[[], Link]] = {
            "MODEL": lambda: side.model,
            "RAY_ACTORS": lambda: side.model,
            "GUIDER": side.guider,
            "RAY_GUIDER,GUIDER": side.guider,
            "CONDITIONING": lambda: {"negative": self.negative, "cond2": self.third}.get(name, self.positive),
            "LATENT": lambda: self.latent,
            "SIGMAS": lambda: self.sigmas,
            "SAMPLER": lambda: self.method,
            "NOISE": lambda: self.noise,
            "AUDIO": lambda: self.add("RLTestSound"),
            "VAE": lambda: [self.add("RLTestSound")[0], 1],
        }
        if kind in links:
            return links[kind]()
        return options.get("default", {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind])

    def _shown(self, side: Side, node: Link, kinds: list[str], steps: int | None) -> list[tuple[str, Link]]:
        """What can be saved of a node's outputs, or of what is sampled with them."""
        outputs: list[tuple[str, Link]] = [(kind, [node[0], number]) for number, kind in enumerate(kinds)]
        match kinds[0]:
            case "MODEL":
                positive = next((link for kind, link in outputs if kind == "CONDITIONING"), None)
                if steps is not None:  # the input makes it wait
                    return [("LATENT", side.sampled(node, steps=steps, positive=positive, latent=side.plain))]
                return [("LATENT", side.sampled(node, positive=positive))]
            case "SAMPLER":
                return [("LATENT", side.with_method(node))]
            case "GUIDER":
                # the pool's second output is for ComfyUI's own sampler
                return [("LATENT", side.with_guider(node)), ("LATENT", self.core.with_guider(outputs[-1][1]))]
            case "VAE":
                latent = self.random_latent(channels=3, height=8, width=8)
                return [("IMAGE", self.add("VAEDecode", samples=latent, vae=link)) for _, link in outputs[-1:]]
            case _:
                return [(kind, link) for kind, link in outputs if kind in ("LATENT", "SIGMAS", "FLOAT")]


def _sampler(both: Both, node: str) -> None:
    both.pair(node, "LATENT", both.core.plain, both.pool.plain)


def _advanced_initializer(both: Both, node: str) -> None:
    addresses = {"ray_dashboard_address": "None", "torch_dist_address": "127.0.0.1:29500"}
    init = both.add(node, **PoolCase().initializer(), **addresses)
    both.pair(node, "LATENT", both.core.plain, both.pool.sampled(both.ray_loader(init)))


def _lora(both: Both, node: str) -> None:
    lora = {"lora_name": LORA, "strength_model": 0.7}
    expected = both.core.sampled(both.add("LoraLoaderModelOnly", model=both.core.model, **lora))
    if node == "RayLoraLoader":
        found = both.ray_loader(both.init, lora=both.add(node, **lora))
    else:
        found = both.add(node, ray_actors=both.pool.model, **lora)
    both.pair(node, "LATENT", expected, both.pool.sampled(found))


def _gguf(both: Both, node: str) -> None:
    dtypes = {"dequant_dtype": "default", "patch_dtype": "default"}
    expected = both.core.sampled(both.add("UNETLoader", unet_name=DEQUANTISED, weight_dtype="default"))
    found = both.pool.sampled(both.add(node, unet_name=GGUF, ray_actors_init=both.init, **dtypes))
    both.pair(node, "LATENT", expected, found)


def _chunker(both: Both, node: str) -> None:
    found = both.pool.sampled(both.add(node, ray_actors=both.pool.model, ffn_chunks=5))
    both.pair(node, "LATENT", both.core.plain, found)


def _compiled(both: Both, node: str) -> None:
    for backend in ("inductor", "cudagraphs"):
        found = both.pool.sampled(both.add(node, ray_actors=both.pool.model, backend=backend))
        both.pair(node, "LATENT", both.core.plain, found)


def _teacache(both: Both, node: str) -> None:
    """At a threshold that no change stays below."""
    parts = {"threshold": 0.0, "warmup_percent": 0.0, "start_percent": 0.0, "end_percent": 1.0}
    found = both.pool.sampled(both.add(node, ray_actors=both.pool.model, retention_interval=8, **parts))
    both.pair(node, "LATENT", both.core.plain, found)


def _control(both: Both, node: str) -> None:
    """A ControlNet of another family, as Wan has none."""
    from .families import FAMILIES

    given = FAMILIES["sd3"].inputs
    made = {"tokens": given.tokens, "width": given.context, "pooled": given.pooled, "guidance": -1.0}
    positive = both.add("RLTestConditioning", seed=1, attention_mask=False, extras="{}", **made)
    negative = both.add("RLTestConditioning", seed=2, attention_mask=False, extras="{}", **made)
    latent = both.random_latent(channels=given.channels, height=given.height, width=given.width)
    image = both.add("RLTestPixels", frames=1, height=200, width=248, channels=3, smooth=True)
    vae = both.add("VAELoader", vae_name=CONTROL_VAE)
    how = {"image": image, "strength": 0.7, "start_percent": 0.0, "end_percent": 1.0}
    core_model = both.add("UNETLoader", unet_name=CONTROLLED, weight_dtype="default")
    pool_model = both.add("RayUNETLoader", unet_name=CONTROLLED, weight_dtype="default", ray_actors_init=both.init)
    expected = both.add(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=both.add("ControlNetLoader", control_net_name=CONTROL),
        vae=vae,
        **how,
    )
    found = both.add(
        "RayControlNetApply",
        positive=positive,
        negative=negative,
        ray_control_net=both.add("RayControlNetLoader", ray_actors=pool_model, control_net_name=CONTROL),
        ray_vae=vae,
        **how,
    )

    def sampled(side: Side, model: Link, conditioning: Link) -> Link:
        return side.sampled(model, positive=conditioning, negative=[conditioning[0], 1], latent=latent)

    both.pair(node, "LATENT", sampled(both.core, core_model, expected), sampled(both.pool, pool_model, found))


def _prompted(both: Both, node: str) -> None:
    core = both.add("CLIPLoader", clip_name=ENCODER, type="stable_diffusion")
    pool = both.add(node, ray_actors=both.pool.model, clip_name1=ENCODER, type="stable_diffusion")
    expected, found = (both.add("CLIPTextEncode", clip=clip, text="a red fox") for clip in (core, pool))
    both.pair(node, "CONDITIONING", expected, found)


def _chosen(both: Both, node: str) -> None:
    model = both.add(node, model_name=CHECKPOINT, gpus="0,1", goal="auto")
    both.pair(node, "LATENT", both.core.plain, both.core.sampled(model))


def _offload(both: Both, node: str) -> None:
    latent = both.add(node, ray_actors=both.pool.model, latent=both.pool.plain)
    both.pair(node, "LATENT", both.core.plain, latent)


def _report(both: Both, node: str) -> None:
    both.add(node, ray_actors=both.pool.model, latent=both.pool.plain)
    both.pair(node, "LATENT", both.core.plain, both.pool.plain)


def _decode(both: Both, node: str) -> None:
    vae = both.add("VAELoader", vae_name=VAE_FILE)
    expected = both.add("VAEDecode", samples=both.core.plain, vae=vae)
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    pool = {"ray_actors": both.pool.model, "vae_name": VAE_FILE, "vae_dtype": "auto", "release_vae": True}
    both.pair(node, "IMAGE", expected, both.add(node, samples=both.core.plain, **pool, **tiles))


def _encode(both: Both, node: str) -> None:
    vae = both.add("VAELoader", vae_name=VAE_FILE)
    pixels = both.add("RLTestPixels", frames=5, height=112, width=80, channels=3, smooth=True)
    pool = {"ray_actors": both.pool.model, "vae_name": VAE_FILE, "vae_dtype": "auto", "release_vae": True}
    both.pair(node, "LATENT", both.add("VAEEncode", pixels=pixels, vae=vae), both.add(node, pixels=pixels, **pool))


SEEDS = (11, 12)


def _seeds(both: Both) -> Link:
    """A DPNoiseList that begins with SEEDS."""
    return both.add("DPNoiseList", **{f"noise_seed_{number}": SEEDS[0] + number for number in range(8)})


def _ksampler_inputs(both: Both) -> dict[str, Any]:
    """What the data parallel samplers have of KSamplerAdvanced."""
    inputs = dict(both.prompt[both.pool.plain[0]]["inputs"])
    del inputs["noise_seed"]
    return {**inputs, "noise_list": _seeds(both)}


def _unified(both: Both, node: str) -> None:
    """Two pictures with seeds and conditioning from lists."""
    pairs = {"positive_0": both.positive, "negative_0": both.negative, "positive_1": both.third}
    texts = both.add("DPConditioningList", **pairs, negative_1=both.negative)
    inputs = {**_ksampler_inputs(both), "positive": texts, "negative": [texts[0], 1], "denoise": 1.0}
    expected = [both.core.sampled(seed=SEEDS[0]), both.core.sampled(seed=SEEDS[1], positive=both.third)]
    both.pair_list(node, expected, both.add("UnifiedParallelSampler", **inputs))


def _replicas(both: Both, node: str) -> None:
    expected = [both.core.sampled(seed=seed) for seed in SEEDS]
    both.pair_list(node, expected, both.add(node, **_ksampler_inputs(both)))


def _custom_replicas(both: Both, node: str) -> None:
    expected = [both.core.with_method(both.method, seed=seed) for seed in SEEDS]
    inputs = dict(both.prompt[both.pool.with_method(both.method)[0]]["inputs"])
    del inputs["noise_seed"]
    both.pair_list(node, expected, both.add(node, **inputs, noise_list=_seeds(both)))


ON_REPLICAS: Mapping[str, tuple[str, Callable[[Both, str], None]]] = {
    "DPKSamplerAdvanced": ("`KSamplerAdvanced`, once per seed", _replicas),
    "DPSamplerCustom": ("`SamplerCustom`, once per seed", _custom_replicas),
}
"""As `OTHERS`, on a pool of two replicas."""
OTHERS: Mapping[str, tuple[str, Callable[[Both, str], None]]] = {
    **ON_REPLICAS,
    "DPConditioningList": (f"{NONE}: the conditionings of `KSamplerAdvanced`", _unified),
    "DPNoiseList": (f"{NONE}: the seeds of `KSamplerAdvanced`", _unified),
    "RayCLIPLoader": ("`CLIPLoader`, and those for two, three and four files", _prompted),
    "RayControlNetApply": ("`ControlNetApplyAdvanced`", _control),
    "RayControlNetLoader": ("`ControlNetLoader`", _control),
    "RayGGUFLoader": ("`UNETLoader` of the dequantised weights", _gguf),
    "RayInitializer": (f"{NONE}: `KSamplerAdvanced` on the pool it starts", _sampler),
    "RayInitializerAdvanced": (f"{NONE}: `KSamplerAdvanced` on the pool it starts", _advanced_initializer),
    "RayLTXFFNChunker": (f"{NONE}: `KSamplerAdvanced` without it", _chunker),
    "RayLoraLoader": ("`LoraLoaderModelOnly`", _lora),
    "RayLoraLoaderModelOnly": ("`LoraLoaderModelOnly`", _lora),
    "RayModel": ("`UNETLoader`, or `CheckpointLoaderSimple`", _chosen),
    "RayOffloadModel": (f"{NONE}: the latent that passes", _offload),
    "RayReport": (f"{NONE}: the latent that it waits for", _report),
    "RayTeaCache": (f"{NONE}: `KSamplerAdvanced`, with a threshold of 0", _teacache),
    "RayTorchCompileModel": (f"{NONE}: `KSamplerAdvanced` without it", _compiled),
    "RayUNETLoader": ("`UNETLoader`", _sampler),
    "RayVAEDecodeDistributed": ("`VAEDecode`", _decode),
    "RayVAEEncodeDistributed": ("`VAEEncode`", _encode),
    "UnifiedParallelSampler": ("`KSamplerAdvanced`, once per seed", _unified),
    "XFuserKSamplerAdvanced": ("`KSamplerAdvanced`", _sampler),
}
"""Nodes that are no mirrors, or need another model than the rest: their counterpart in words, what makes the pairs."""
KILL, AFTER_KILL = "RayKill", f"{NONE}: `KSamplerAdvanced` after it"
PLAIN = "no-node"


def nodes_of_pack(published: Mapping[str, Any]) -> list[str]:
    """Ids of the pack's nodes."""
    return sorted(name for name, info in published.items() if PACK_FOLDER in info["python_module"])


def mirrors(client: ComfyClient) -> dict[str, str]:
    """The pack's table of mirrors: ids of ComfyUI's nodes by ours, of those that this ComfyUI has."""
    rows = client.run({"0": {"class_type": "RLTestMirrors", "inputs": {}}}).outputs["0"]["mirrors"]
    published = client.object_info()
    return {row["id"]: row["core"] for row in rows if row["id"] in published}


def comparable(client: ComfyClient) -> set[str]:
    """The mirrors, and nodes of which is said here what they compare with."""
    return {*mirrors(client), *OTHERS, KILL}


def compare(server: ComfyServer, client: ComfyClient, wanted: Iterable[str]) -> dict[str, Outcome]:
    """Run nodes of the pack beside their counterparts, all in one prompt.

    Raises:
        KeyError: one of them is neither a mirror nor in `OTHERS`.
    """
    table, published = mirrors(client), client.object_info()
    wanted = list(wanted)
    first = Both(published)
    prompts = [first]
    if ON_REPLICAS.keys() & set(wanted):
        prompts.append(Both(published, seed=SEED + 50, where=PoolCase(ulysses=0, ring=0, cfg=0)))
    for name in wanted:
        if name in ALONE:
            prompts.append(Both(published, seed=SEED + len(prompts)))
            prompts[-1].mirror(name, table[name])
        elif name in OTHERS:
            OTHERS[name][1](prompts[1] if name in ON_REPLICAS else first, name)
        elif name != KILL:
            first.mirror(name, table[name])
    errors: dict[str, float] = {}
    for both in prompts:
        errors |= _errors(server, client, both)
    if KILL in wanted:
        errors[KILL] = _after_kill(server, client, published)
    outcomes = {}
    for name, error in errors.items():
        core = f"`{table[name]}`" if name in table else OTHERS[name][0] if name in OTHERS else AFTER_KILL
        patches_model = name in table and name not in ALONE and published[name]["output"][0] == "RAY_ACTORS"
        effect = apart(_saved(server, f"{name}-core-0"), _saved(server, PLAIN)) if patches_model else None
        outcomes[name] = Outcome(core, error, effect)
    return outcomes


def _errors(server: ComfyServer, client: ComfyClient, both: Both) -> dict[str, float]:
    """Run a prompt; the worst pair of each node."""
    client.run(both.prompt, timeout=LIMIT_S)
    return {
        name: max(apart(_saved(server, pair.format("pool")), _saved(server, pair.format("core"))) for pair in pairs)
        for name, pairs in both.pairs.items()
    }


def _after_kill(server: ComfyServer, client: ComfyClient, published: Mapping[str, Any]) -> float:
    """End all workers with the node, and compare a latent of the next prompt, which ComfyUI has not seen."""
    both = Both(published)
    both.add(KILL, ray_actors=both.pool.model, kill_mode="Kill Workers Only")
    client.run(both.prompt, timeout=LIMIT_S)
    both = Both(published, seed=SEED + 100)
    _sampler(both, KILL)
    return _errors(server, client, both)[KILL]


def skips(log: str) -> list[tuple[int, int]]:
    """Steps that EasyCache skipped, and steps in all, of each run of it in a log."""
    return [(int(skipped), int(steps)) for skipped, steps in re.findall(r"EasyCache - skipped (\d+)/(\d+) steps", log)]


def write_files(server: ComfyServer) -> None:
    """Checkpoint, LoRA, GGUF and VAE that `OTHERS` name, in the folders of a server."""
    from safetensors.torch import save_file

    from ..decode.files import write as write_vaes
    from ..weights.adapters import write_adapter
    from ..weights.files import write_gguf
    from .checkpoints import Job, write
    from .checkpoints.encoders import write_encoders

    base = server.models / CHECKPOINT
    base.parent.mkdir(parents=True, exist_ok=True)
    write([Job(family="wan", path=base)], comfy_root=server.comfy, python=server.python)
    loras = server.base / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    write_adapter(base, loras / LORA, "lora")
    _, whole = write_gguf(base, server.models / GGUF, "Q8_0")
    save_file(whole, server.models / DEQUANTISED)
    write_vaes(server.base / "models" / "vae", comfy_root=server.comfy, python=server.python)
    encoder = server.base / "models" / "text_encoders" / ENCODER
    write_encoders({encoder: ENCODER_KIND}, comfy_root=server.comfy, python=server.python)
    write_controls(server)


def write_controls(server: ComfyServer) -> None:
    """The model, ControlNet and VAE of the ControlNet nodes."""
    from .checkpoints import Job, write

    models = server.base / "models"
    jobs = {
        "sd3": server.models / CONTROLLED,
        "control_sd3": models / "controlnet" / CONTROL,
        "taesd3": models / "vae" / CONTROL_VAE,
    }
    found = [Job(family=name, path=path) for name, path in jobs.items()]
    write(found, comfy_root=server.comfy, python=server.python)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value.

    Raises:
        ValueError: they are not of one shape and type, or nothing can be said of them.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(f"{found.shape} {found.dtype} instead of {expected.shape} {expected.dtype}")
    most = expected.abs().max().item()
    if not math.isfinite(most) or most == 0:
        raise ValueError(f"the largest value is {most}")
    return float((found - expected).abs().max().item() / most)


def _saved(server: ComfyServer, name: str) -> torch.Tensor:
    import torch
    from safetensors.torch import load_file

    first, *more = load_file(server.output / f"{name}.safetensors").values()
    return torch.cat([value.flatten() for value in (first, *more)]) if more else first
