"""Data parallel nodes: several pictures at once, one on each replica of the pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..raylight.errors import ConfigError
from ..workers.driver import jobs as parallel
from .mirrors import first_output
from .numbers import check
from .samplers import TOOLTIPS, core

SEEDS = 8
"""Seeds of DPNoiseList, and pairs of DPConditioningList."""
LISTED = ("positive", "negative", "latent_image")
"""Inputs of which each picture can have one of its own."""
NO_NOISE = None
"""In place of a seed: the latent is sampled as it is."""

HOW_MANY = (
    "A list of latents or of conditioning makes one picture for each; otherwise there is one for each replica of the "
    "pool, or for each seed where there are fewer. A shorter list repeats its last value. More pictures than replicas "
    "wait for a free one. Each picture equals a single run with the same seed."
)
OWN_TOOLTIPS = {
    **TOOLTIPS,
    "noise_list": "Seeds, one per picture: Data Parallel Noise List, or ComfyUI's RandomNoise.",
    "positive": "What the pictures should show: one for all, or a list.",
    "negative": "What they should not show: one for all, or a list.",
    "latent_image": "The latent to denoise: one for all, or a list.",
    "sampler": "The sampler.",
    "sigmas": "The schedule.",
}
JOBS: dict[str, Any] = {
    "jobs": (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": 4096,
            "tooltip": "Number of pictures. 0: one per latent or conditioning of a list, otherwise one per replica.",
        },
    ),
}
COMMON_NAMES = {
    "noise_seed": "seed",
    "latent_image": "latent",
    "start_at_step": "start_step",
    "end_at_step": "last_step",
}
"""What ComfyUI's common_ksampler calls its node's inputs."""


class _DataParallel:
    """What both samplers share: lists go in, a list of latents comes out."""

    FUNCTION = "sample"
    INPUT_IS_LIST = True
    RETURN_TYPES: tuple[str, ...] = ("LATENT",)
    OUTPUT_IS_LIST: tuple[bool, ...] = (True,)
    OUTPUT_TOOLTIPS: tuple[str, ...] = ("The denoised latents, in the order of the seeds.",)
    CORE = ""
    """Id of the core node that makes one picture."""
    WITHOUT_NOISE: Any = False
    """Its `add_noise` for none."""
    ORDER: tuple[str, ...] = ()
    """Widget order of the earlier pack, by which saved files hold their values."""
    ONE_WILL_DO = False
    """Whether a pool that puts all workers on one picture is right as well."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = core.NODE_CLASS_MAPPINGS[cls.CORE].INPUT_TYPES()["required"]
        inputs = {**inputs, "ray_actors": ("RAY_ACTORS",), "noise_list": ("NOISE",)}
        described = {
            name: (inputs[name][0], {**(inputs[name][1] if len(inputs[name]) > 1 else {}), "tooltip": tooltip})
            for name, tooltip in OWN_TOOLTIPS.items()
            if name in inputs
        }
        return {"required": {name: described[name] for name in cls.ORDER}, "optional": dict(JOBS)}

    def sample(self, ray_actors: list[Any], noise_list: list[Any], jobs: Any = (0,), **lists: Any) -> tuple[Any, ...]:
        check(JOBS, {"jobs": jobs[0]})
        seeds = [seed for noise in noise_list for seed in _seeds(noise)]
        model = ray_actors[0]
        lengths = [len(lists[name]) for name in LISTED]
        replicas = parallel.replicas(model, one_will_do=self.ONE_WILL_DO)
        count = number_of_jobs(replicas, len(seeds), lengths, wanted=jobs[0])
        common = {name: values[0] for name, values in lists.items() if name not in LISTED}
        each = [
            {
                **common,
                **{name: _at(lists[name], number) for name in LISTED},
                **self._noise(common["add_noise"], _at(seeds, number)),
            }
            for number in range(count)
        ]
        return (parallel.run(model, each, self.one, one_will_do=self.ONE_WILL_DO),)

    def _noise(self, add_noise: Any, seed: int | None) -> dict[str, Any]:
        if seed is NO_NOISE:
            return {"noise_seed": 0, "add_noise": self.WITHOUT_NOISE}
        return {"noise_seed": seed, "add_noise": add_noise}

    @classmethod
    def one(cls, **values: Any) -> Any:
        """One picture: the core node's first output."""
        return first_output(cls.CORE, **values)


class DPKSamplerAdvanced(_DataParallel):
    """ComfyUI's KSamplerAdvanced, once per replica of the pool."""

    CATEGORY = "Raylight"
    DESCRIPTION = f"ComfyUI's KSampler (Advanced) for several pictures at once. {HOW_MANY}"
    SEARCH_ALIASES = ("batch", "ksampler", "seeds", "multi gpu")
    CORE = "KSamplerAdvanced"
    WITHOUT_NOISE = "disable"
    ORDER = (
        "add_noise",
        "steps",
        "cfg",
        "sampler_name",
        "scheduler",
        "ray_actors",
        "noise_list",
        "positive",
        "negative",
        "latent_image",
        "start_at_step",
        "end_at_step",
        "return_with_leftover_noise",
    )


class UnifiedParallelSampler(_DataParallel):
    """DPKSamplerAdvanced for every kind of pool, with denoise."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        f"ComfyUI's KSampler (Advanced), with the denoise of KSampler, for several pictures at once. {HOW_MANY} A pool "
        "that puts all workers on one picture is one replica."
    )
    SEARCH_ALIASES = ("ksampler", "seeds", "multi gpu")
    RETURN_TYPES = ("LATENT", "RAY_ACTORS")
    RETURN_NAMES = ("latent", "ray_actors")
    OUTPUT_IS_LIST = (True, False)
    OUTPUT_TOOLTIPS = (*_DataParallel.OUTPUT_TOOLTIPS, "The model, unchanged.")
    CORE = "KSamplerAdvanced"
    WITHOUT_NOISE = "disable"
    ORDER = DPKSamplerAdvanced.ORDER
    ONE_WILL_DO = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        declared = super().INPUT_TYPES()
        declared["required"]["denoise"] = core.KSampler.INPUT_TYPES()["required"]["denoise"]
        return declared

    def sample(self, ray_actors: list[Any], noise_list: list[Any], jobs: Any = (0,), **lists: Any) -> tuple[Any, ...]:
        return (*super().sample(ray_actors, noise_list, jobs, **lists), ray_actors[0])

    @classmethod
    def one(cls, *, add_noise: str = "", return_with_leftover_noise: str = "", **values: Any) -> Any:
        """One picture, by what ComfyUI's two nodes have in common."""
        return core.common_ksampler(
            disable_noise=add_noise == "disable",
            force_full_denoise=return_with_leftover_noise == "disable",
            **{COMMON_NAMES.get(name, name): value for name, value in values.items()},
        )[0]


class DPSamplerCustom(_DataParallel):
    """ComfyUI's SamplerCustom, once per replica of the pool."""

    CATEGORY = "Raylight/extra/custom_sampling/samplers"
    DESCRIPTION = f"ComfyUI's SamplerCustom for several pictures at once. {HOW_MANY}"
    SEARCH_ALIASES = ("custom sampler", "seeds", "multi gpu")
    RETURN_NAMES = ("output",)
    CORE = "SamplerCustom"
    WITHOUT_NOISE = False
    ORDER = (
        "ray_actors",
        "add_noise",
        "noise_list",
        "cfg",
        "positive",
        "negative",
        "sampler",
        "sigmas",
        "latent_image",
    )


class DPNoiseList:
    """Seeds for several pictures."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Eight seeds as a list of noises: the data parallel samplers take as many as they make pictures. "
        "ComfyUI's own SamplerCustomAdvanced runs once for each."
    )
    SEARCH_ALIASES = ("seeds", "random noise")
    FUNCTION = "get_noise"
    RETURN_TYPES = ("NOISE",)
    OUTPUT_IS_LIST = (True,)
    OUTPUT_TOOLTIPS = ("The noises, in the order of the seeds.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        options = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True}
        return {
            "required": {
                f"noise_seed_{number}": ("INT", {**options, "tooltip": f"Seed of picture {number + 1}."})
                for number in range(SEEDS)
            }
        }

    def get_noise(self, **seeds: int) -> tuple[list[Any]]:
        return ([first_output("RandomNoise", noise_seed=seeds[f"noise_seed_{number}"]) for number in range(SEEDS)],)


class DPConditioningList:
    """Conditioning for several pictures."""

    CATEGORY = "Raylight"
    DESCRIPTION = (
        "Pairs of conditioning as lists, one pair for each picture of a data parallel sampler: as many as are "
        "connected. One that is left out in between is the first pair's."
    )
    SEARCH_ALIASES = ("prompts", "batch")
    FUNCTION = "assemble"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_IS_LIST = (True, True)
    OUTPUT_TOOLTIPS = ("What each picture should show.", "What each should not show.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        pairs = [
            {
                f"positive_{number}": ("CONDITIONING", {"tooltip": f"What picture {number + 1} should show."}),
                f"negative_{number}": ("CONDITIONING", {"tooltip": f"What picture {number + 1} should not show."}),
            }
            for number in range(SEEDS)
        ]
        return {"required": pairs[0], "optional": {name: entry for pair in pairs[1:] for name, entry in pair.items()}}

    def assemble(self, **given: Any) -> tuple[list[Any], list[Any]]:
        last = max(int(name.rpartition("_")[2]) for name, value in given.items() if value is not None)
        positive, negative = (
            [given[first] if given.get(name) is None else given[name] for name in names]
            for first, names in (
                (f"{kind}_0", [f"{kind}_{number}" for number in range(last + 1)]) for kind in ("positive", "negative")
            )
        )
        return positive, negative


def number_of_jobs(replicas: int, seeds: int, lengths: list[int], *, wanted: int = 0) -> int:
    """How many pictures a data parallel sampler makes.

    Args:
        seeds: how many there are.
        lengths: of the lists of latents and conditioning.
        wanted: what the user says; 0 for what the lists say.

    Raises:
        ConfigError: more than there are values of any kind, so that some would be the same picture.
    """
    longest = max(lengths)
    if not seeds or not min(lengths):
        raise ConfigError("A data parallel sampler got an empty list", "", "Connect at least one of each")
    if wanted > max(longest, seeds):
        raise ConfigError(
            "There are fewer seeds than pictures",
            f"jobs is {wanted}, with {seeds} seeds and at most {longest} latents or conditionings",
            "Connect more seeds, or lower jobs",
        )
    return wanted or (longest if longest > 1 else min(replicas, seeds))


def _at(values: list[Any], number: int) -> Any:
    """A value of a list that may be shorter: as everywhere in ComfyUI, the last one then goes on."""
    return values[min(number, len(values) - 1)]


def _seeds(noise: Any) -> Iterator[int | None]:
    """The seeds that a NOISE stands for.

    Raises:
        ConfigError: it is neither a number, nor one of ComfyUI's own.
    """
    if isinstance(noise, (list, tuple)):
        for item in noise:
            yield from _seeds(item)
    elif isinstance(noise, int):
        yield noise
    elif type(noise) is type(first_output("RandomNoise", noise_seed=0)):
        yield int(noise.seed)
    elif type(noise) is type(first_output("DisableNoise")):
        yield NO_NOISE
    else:
        raise ConfigError(
            "A data parallel sampler needs seeds",
            f"noise_list has {type(noise).__name__}",
            "Connect Data Parallel Noise List or RandomNoise",
        )
