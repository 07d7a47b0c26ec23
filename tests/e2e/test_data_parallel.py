"""Data parallel over HTTP: a list of latents, each equal to a single run of plain ComfyUI with the same seed."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host import processes
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, LOADER, SAMPLER, SAVE, Case, PoolCase, plain, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import FP32, latent

TWO = PoolCase(workers=2, ulysses=0, ring=0, cfg=0)
SEEDS = tuple(range(11, 19))
NOISE = "noise"
Node = dict[str, Any]


def case(family: str, **more: Any) -> Case:
    return Case(file=f"{family}.safetensors", inputs=FAMILIES[family], **more)


WAN = case("wan")


def node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}


def parallel(sampling: Case, where: PoolCase = TWO, **more: Any) -> Prompt:
    """The case with a data parallel sampler and the seeds SEEDS; it saves NAME0, NAME1 and so on.

    Args:
        more: other inputs of the sampler.
    """
    prompt = pool(dataclasses.replace(sampling, sigmas=""), where)
    seeds = {f"noise_seed_{number}": seed for number, seed in enumerate(SEEDS)}
    prompt[NOISE] = node("DPNoiseList", **seeds)
    inputs = {name: value for name, value in prompt[SAMPLER]["inputs"].items() if name != "noise_seed"}
    inputs |= {"noise_list": [NOISE, 0], **more}
    prompt[SAMPLER] = node("DPKSamplerAdvanced", **inputs)
    if sampling.sigmas:
        prompt["sigmas"] = node("RLTestSigmas", sigmas=sampling.sigmas)
        prompt["method"] = node("KSamplerSelect", sampler_name=sampling.sampler)
        kept = ("ray_actors", "noise_list", "cfg", "positive", "negative", "latent_image", *more)
        inputs = {name: inputs[name] for name in kept}
        inputs |= {"add_noise": sampling.add_noise, "sampler": ["method", 0], "sigmas": ["sigmas", 0]}
        prompt[SAMPLER] = node("DPSamplerCustom", **inputs)
    prompt[SAVE]["class_type"] = "RLTestSaveLatents"
    return prompt


class Bench:
    """Runs prompts and gives their latents."""

    def __init__(self, server: ComfyServer, client: ComfyClient) -> None:
        self.server, self.client = server, client
        self._names = (f"parallel{number}_" for number in itertools.count())

    def single(self, sampling: Case, **changes: Node) -> torch.Tensor:
        """Plain ComfyUI's latent, with some nodes replaced."""
        name = next(self._names)
        self.client.run({**plain(dataclasses.replace(sampling, name=name)), **changes}, timeout=120)
        return latent(self.server, name)

    def many(self, prompt: Prompt) -> list[torch.Tensor]:
        """The latents that a prompt saves as a list."""
        name = next(self._names)
        prompt[SAVE]["inputs"]["name"] = name
        self.client.run(prompt, timeout=180)
        files = sorted(self.server.output.glob(f"{name}*.safetensors"), key=lambda path: len(path.stem))
        return [latent(self.server, f"{name}{number}") for number in range(len(files))]


@pytest.fixture(scope="module")
def bench(server: ComfyServer, client: ComfyClient) -> Bench:
    return Bench(server, client)


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert other.isfinite().all() and other.std() > 1e-3
        assert (one - other).abs().max() <= FP32 * other.abs().max()
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-2 * one.abs().max(), "two pictures are the same"


SAMPLINGS = [
    pytest.param(WAN, id="euler"),
    pytest.param(case("wan", sampler="euler_ancestral", steps=3), id="ancestral"),
    pytest.param(case("wan", sampler="dpmpp_2m_sde", steps=3), id="sde"),
    pytest.param(case("wan", sampler="euler_ancestral", sigmas="1.0, 0.8, 0.3, 0.0"), id="SamplerCustom"),
    pytest.param(case("unet", sampler="dpmpp_sde", cfg=1.0), id="unet cfg 1"),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_equals_single_runs(bench: Bench, sampling: Case) -> None:
    """Eight seeds on two replicas are two pictures, as they always were."""
    expected = [bench.single(dataclasses.replace(sampling, seed=seed)) for seed in SEEDS[:2]]
    same(bench.many(parallel(sampling)), expected)


def test_more_jobs_than_replicas(bench: Bench) -> None:
    expected = [bench.single(dataclasses.replace(WAN, seed=seed)) for seed in SEEDS[:3]]
    found = bench.many(parallel(WAN, jobs=5))
    assert len(found) == 5
    same(found[:3], expected)


def test_latents_and_conditioning_of_their_own(bench: Bench) -> None:
    """Three pairs of conditioning and two latents: three pictures, the last latent goes on."""
    prompt = parallel(WAN)
    texts = {
        name: node("RLTestConditioning", **{**prompt["positive"]["inputs"], "seed": seed})
        for seed, name in enumerate("abcd", 20)
    }
    prompt |= texts
    pairs = {"positive_1": ["a", 0], "negative_1": ["b", 0], "positive_2": ["c", 0], "negative_2": ["d", 0]}
    prompt["texts"] = node("DPConditioningList", positive_0=["positive", 0], negative_0=["negative", 0], **pairs)
    prompt["second"] = node("RLTestLatent", **{**prompt["latent"]["inputs"], "frames": 2})
    prompt["latents"] = node("RLTestLatents", first=["latent", 0], second=["second", 0])
    prompt[SAMPLER]["inputs"] |= {
        "positive": ["texts", 0],
        "negative": ["texts", 1],
        "latent_image": ["latents", 0],
    }
    found = bench.many(prompt)
    assert [one.shape[2] for one in found] == [3, 2, 2]
    second = {"latent": prompt["second"]}
    expected = [
        bench.single(dataclasses.replace(WAN, seed=SEEDS[0])),
        bench.single(dataclasses.replace(WAN, seed=SEEDS[1]), positive=texts["a"], negative=texts["b"], **second),
        bench.single(dataclasses.replace(WAN, seed=SEEDS[2]), positive=texts["c"], negative=texts["d"], **second),
    ]
    for one, other in zip(found, expected, strict=True):
        same([one], [other])


def test_patches_with_a_state(bench: Bench) -> None:
    """A patch that remembers the step before remembers its own picture's."""
    momentum = ("APG", {"eta": 1.0, "norm_threshold": 5.0, "momentum": -0.7})
    sampling = case("wan", steps=4, model_nodes=(momentum,))
    prompt = parallel(dataclasses.replace(sampling, model_nodes=()))
    prompt["model0"] = node(momentum[0], model=[LOADER, 1], **momentum[1])
    prompt["actors"] = node("RLTestRayActors", model=["model0", 0])
    prompt[SAMPLER]["inputs"]["ray_actors"] = ["actors", 0]
    same(bench.many(prompt), [bench.single(dataclasses.replace(sampling, seed=seed)) for seed in SEEDS[:2]])


def test_noise_of_core(bench: Bench) -> None:
    """One of ComfyUI's noises is one picture; ComfyUI's sampler runs once for each of ours."""
    prompt = parallel(WAN)
    prompt[NOISE] = node("RandomNoise", noise_seed=5)
    same(bench.many(prompt), [bench.single(dataclasses.replace(WAN, seed=5))])
    custom = case("wan", sampling="BasicGuider", sigmas="1.0, 0.5, 0.0")
    prompt = pool(custom, PoolCase(workers=2, ulysses=0, ring=0, cfg=0, through_model=True))
    prompt[NOISE] = parallel(WAN)[NOISE]
    prompt[SAVE]["class_type"] = "RLTestSaveLatents"
    found = bench.many(prompt)
    assert len(found) == len(SEEDS)
    same(found[:2], [bench.single(dataclasses.replace(custom, seed=seed)) for seed in SEEDS[:2]])


def test_without_noise(bench: Bench) -> None:
    sampling = case("wan", add_noise=False, random_latent=True, start=1, steps=3)
    prompt = parallel(dataclasses.replace(sampling, add_noise=True))
    prompt[NOISE] = node("DisableNoise")
    same(bench.many(prompt), [bench.single(sampling)])


def test_progress(bench: Bench) -> None:
    """One bar that grows, over the steps of all pictures."""
    prompt = parallel(case("wan", steps=3, seed=1), jobs=3)
    prompt[SAVE]["inputs"]["name"] = "progress"
    result = bench.client.run(prompt)
    steps = [(value, most) for _, value, most in result.progress(SAMPLER)]
    assert steps == sorted(steps) and steps[-1] == (9, 9)
    assert result.previews()


def long(bench: Bench, hurt: Callable[[], object]) -> PromptError:
    """What a long prompt ends with that is hurt while it samples."""
    prompt = parallel(case("wan", steps=2000), jobs=3)
    prompt_id = bench.client.queue(prompt)
    end = time.monotonic() + 60
    while time.monotonic() < end and sum(event.kind == "progress" for event in bench.client.events_of(prompt_id)) < 4:
        time.sleep(0.02)
    hurt()
    with pytest.raises(PromptError) as caught:
        bench.client.wait(prompt_id, timeout=60)
    return caught.value


def workers(bench: Bench) -> list[int]:
    return [process.pid for process in processes.workers(bench.server.pid)]


def test_cancel(bench: Bench) -> None:
    """All samplings end, the workers stay, and the next prompt is right."""
    before = bench.many(parallel(WAN))
    alive = workers(bench)
    assert long(bench, bench.client.interrupt).kind == "interrupted"
    after = bench.many(parallel(WAN))
    assert workers(bench) == alive
    assert all(map(torch.equal, before, after))


@SLOW
def test_killed_worker(bench: Bench) -> None:
    """One clear error whichever replica it was, and a new pool for the next prompt."""
    before = bench.many(parallel(WAN))
    error = long(bench, lambda: processes.kill(processes.workers(bench.server.pid)[-1:]))
    assert error.kind == "failed" and "died during forward" in error.text
    assert all(map(torch.equal, before, bench.many(parallel(WAN))))


def test_lora_reaches_every_replica(bench: Bench) -> None:
    from comfy_raylight.tests.host.checkpoints import lora

    folder = bench.server.base / "models" / "loras"
    lora(bench.server.models / "wan.safetensors", folder / "parallel.safetensors")
    adapted = ("LoraLoaderModelOnly", {"lora_name": "parallel.safetensors", "strength_model": 0.8})
    sampling = dataclasses.replace(WAN, model_nodes=(adapted,))
    expected = [bench.single(dataclasses.replace(sampling, seed=seed)) for seed in SEEDS[:2]]
    prompt = parallel(WAN)
    prompt["adapted"] = node("RayLoraLoaderModelOnly", ray_actors=[LOADER, 0], **adapted[1])
    prompt[SAMPLER]["inputs"]["ray_actors"] = ["adapted", 0]
    bare = bench.many(parallel(WAN))
    found = bench.many(prompt)
    same(found, expected)
    same(bench.many(parallel(WAN)), bare)
    assert (found[1] - bare[1]).abs().max() > 1e-3 * bare[1].abs().max()


def unified(sampling: Case, where: PoolCase, **more: Any) -> Prompt:
    advanced = dataclasses.replace(sampling, sampling="KSamplerAdvanced")
    prompt = parallel(advanced, where, denoise=sampling.denoise, **more)
    prompt[SAMPLER]["class_type"] = "UnifiedParallelSampler"
    return prompt


def test_unified_sampler(bench: Bench) -> None:
    """One picture on all workers, or one on each; its second output is the model."""
    partly = case("wan", sampling="KSampler", denoise=0.6, random_latent=True, steps=4, seed=SEEDS[0])
    expected = bench.single(partly)
    prompt = unified(partly, PoolCase(workers=2))
    prompt["again"] = node("RLTestSaveLatent", samples=["once more", 0], name="once-more")
    prompt["once more"] = {**pool(dataclasses.replace(partly, sampling="KSamplerAdvanced"))[SAMPLER]}
    prompt["once more"]["inputs"]["ray_actors"] = [SAMPLER, 1]
    same(bench.many(prompt), [expected])
    late = case("wan", random_latent=True, start=1, steps=3, add_noise=False, leftover=True, end=2, seed=SEEDS[0])
    same(bench.many(unified(late, PoolCase(workers=2))), [bench.single(late)])
    prompt = unified(partly, TWO)
    second = bench.single(dataclasses.replace(partly, seed=SEEDS[1]), latent=prompt["latent"])
    same(bench.many(prompt), [expected, second])


GROUPS_OF_TWO = PoolCase(workers=4, ulysses=2)
CFG_GROUPS = PoolCase(workers=4, ulysses=1, cfg=2)
GROUPS = [
    pytest.param(CFG_GROUPS, case("wan", sampler="euler_ancestral"), id="cfg 2", marks=SLOW),
    pytest.param(GROUPS_OF_TWO, WAN, id="ulysses 2"),
]


@pytest.mark.parametrize("where,sampling", GROUPS)
def test_replicas_of_parallel_workers(bench: Bench, where: PoolCase, sampling: Case) -> None:
    expected = [bench.single(dataclasses.replace(sampling, seed=seed)) for seed in SEEDS[:3]]
    same(bench.many(parallel(sampling, where, jobs=3)), expected)


REFUSED: list[Any] = [
    pytest.param(GROUPS_OF_TWO, {"jobs": 9}, ("jobs is 9", "8 seeds"), id="too many jobs"),
    pytest.param(PoolCase(workers=2), {}, ("ulysses_degree=2", "three degrees to 0"), id="one picture at a time"),
]


@pytest.mark.parametrize("where,more,words", REFUSED)
def test_refused(bench: Bench, where: PoolCase, more: dict[str, Any], words: Sequence[str]) -> None:
    with pytest.raises(PromptError) as caught:
        bench.many(parallel(WAN, where, **more))
    assert caught.value.node == SAMPLER
    for word in words:
        assert word in caught.value.text
