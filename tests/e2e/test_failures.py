"""What goes wrong ends in one clear error, ComfyUI keeps serving, and the next good prompt works."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_raylight.tests.host import processes
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, INIT, LOADER, SAMPLER, Case, PoolCase, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import latent

GOOD = Case(file="wan.safetensors", inputs=FAMILIES["wan"])


@pytest.fixture
def good(server: ComfyServer, client: ComfyClient) -> Callable[[], torch.Tensor]:
    """Runs the good prompt anew and returns its latent."""
    seeds = iter(range(1, 1000))

    def run() -> torch.Tensor:
        # ComfyUI would answer an equal prompt from its cache; the name is no part of the sampling
        sampling = dataclasses.replace(GOOD, name=f"good{next(seeds)}")
        prompt = pool(sampling)
        prompt[SAMPLER]["inputs"]["end_at_step"] = 10000 - int(sampling.name.removeprefix("good"))
        client.run(prompt)
        return latent(server, sampling.name)

    return run


BAD_POOLS = [
    pytest.param({"GPU": 2, "ulysses_degree": 4}, ("multiply to 4", "GPU is 2"), id="product too large"),
    pytest.param({"GPU": 0, "ulysses_degree": 1}, ("at least one worker", "GPU is 0"), id="no worker"),
    pytest.param({"GPU": -1, "ulysses_degree": 1}, ("GPU is -1",), id="negative workers"),
    pytest.param({"GPU": 2, "ulysses_degree": -2}, ("negative", "ulysses_degree=-2"), id="negative degree"),
    pytest.param({"GPU": 2, "ulysses_degree": 2, "cfg_degree": 0}, ("cfg_degree=0",), id="one degree zero"),
    pytest.param(
        {"GPU": 2, "ulysses_degree": 1, "cfg_degree": 2, "FSDP": True},
        ("FSDP divides weights", "ulysses_degree=1", "switch FSDP_CPU_OFFLOAD on"),
        id="FSDP without a sequence",
    ),
    pytest.param({"GPU": 2, "gpu_indices": "0,x"}, ("gpu_indices",), id="indices"),
    pytest.param({"GPU": 10**12, "ulysses_degree": 7}, ("GPU is larger", "1000000000000"), id="endless workers"),
    pytest.param(
        {"GPU": 1000, "ulysses_degree": 0, "ring_degree": 0, "cfg_degree": 0},
        ("GPU is 1000", "cores carry", "RAYLIGHT_MAX_CPU_WORKERS"),
        id="workers beyond the cores",
    ),
    pytest.param({"ray_object_store_gb": float("nan")}, ("ray_object_store_gb is no size", "nan"), id="NaN"),
    pytest.param({"ray_object_store_gb": float("inf")}, ("ray_object_store_gb is no size", "inf"), id="infinity"),
    pytest.param({"ray_object_store_gb": 1e6}, ("ray_object_store_gb is a size", "1e+06"), id="store too large"),
    pytest.param({"ray_object_store_gb": 0.01}, ("ray_object_store_gb is a size", "0.01"), id="store too small"),
    pytest.param({"ray_cluster_address": "127.0.0.1:1"}, ("127.0.0.1:1", "ray_cluster_address"), id="no such cluster"),
]


@pytest.mark.parametrize("values,words", BAD_POOLS)
def test_bad_pool(server: ComfyServer, client: ComfyClient, values: dict[str, Any], words: tuple[str, ...]) -> None:
    """It is refused before anything starts; the pool that runs is left alone."""
    before = [worker.pid for worker in workers(server)]
    prompt = pool(GOOD)
    prompt[INIT]["inputs"].update(values)
    with pytest.raises(PromptError) as caught:
        client.run(prompt)
    for word in words:
        assert word in caught.value.text
    assert caught.value.node == INIT
    refused_later = "ray_cluster_address" in values
    assert refused_later or [worker.pid for worker in workers(server)] == before


def test_bad_numbers(client: ComfyClient) -> None:
    """ComfyUI's own limits let NaN through, since it is neither too small nor too large."""
    prompt = pool(GOOD)
    prompt["cache"] = {
        "class_type": "RayTeaCache",
        "inputs": {
            "ray_actors": [LOADER, 0],
            "threshold": float("nan"),
            "warmup_percent": 0.1,
            "retention_interval": 8,
            "start_percent": 0.15,
            "end_percent": 0.95,
        },
    }
    prompt[SAMPLER]["inputs"]["ray_actors"] = ["cache", 0]
    with pytest.raises(PromptError, match="threshold is not a number that it can be: nan"):
        client.run(prompt)


BAD_FILES = [
    pytest.param("text.safetensors", ("text.safetensors cannot be loaded", "Get the file again"), id="text file"),
    pytest.param("missing.safetensors", ("not in list",), id="missing"),
]


def test_kernel_that_cannot_run_here(client: ComfyClient) -> None:
    prompt = pool(GOOD)
    prompt[INIT]["inputs"]["XFuser_attention"] = "FLASH_ATTN"
    with pytest.raises(PromptError, match="FLASH_ATTN.*XFuser_attention to TORCH"):
        client.run(prompt)


@pytest.mark.parametrize("file,words", BAD_FILES)
def test_bad_file(client: ComfyClient, good: Callable[[], torch.Tensor], file: str, words: tuple[str, ...]) -> None:
    before = good()
    with pytest.raises(PromptError) as caught:
        client.run(pool(dataclasses.replace(GOOD, file=file)))
    for word in words:
        assert word in caught.value.text
    assert caught.value.node == LOADER
    assert torch.equal(good(), before)


LORA = {"rank": 4, "lora_type": "standard", "bias_diff": False}


@pytest.mark.parametrize("node,named,values", [("ModelSave", "model", {}), ("LoraSave", "model_diff", LORA)])
def test_saving(server: ComfyServer, client: ComfyClient, node: str, named: str, values: dict[str, Any]) -> None:
    """LoraSave would write a file of nothing: it takes whatever fails for a difference of zero."""
    whole = pool(GOOD)
    inputs = {**values, named: [LOADER, 1], "filename_prefix": f"taken_{node}"}
    with pytest.raises(PromptError, match="cannot be saved, and no LoRA.*own loader"):
        client.run({INIT: whole[INIT], LOADER: whole[LOADER], "taken": {"class_type": node, "inputs": inputs}})
    assert not list(server.output.rglob(f"taken_{node}*"))


def test_patch_that_sets_what_others_read(client: ComfyClient) -> None:
    """Its reader would go on seeing what was there before."""
    captured = dataclasses.replace(GOOD, model_nodes=(("RLTestCapture", {}),))
    with pytest.raises(PromptError, match="its patch inside the model sets 'seen' for code in another process"):
        client.run(pool(captured, PoolCase(through_model=True)))


def test_what_rows_cannot_do(server: ComfyServer, client: ComfyClient) -> None:
    """Every worker refuses for the same reason, so the pool goes on."""
    sampling = Case(file="unet.safetensors", inputs=FAMILIES["unet"], name="unet")
    on_two = PoolCase(through_model=True)
    client.run(pool(sampling, on_two))
    sampled = latent(server, "unet")
    alive = [worker.pid for worker in workers(server)]
    shrink = {"block_number": 2, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 1.0}
    ways = {"downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic"}
    nodes = (("PatchModelAddDownscale", {**shrink, **ways}),)
    with pytest.raises(PromptError, match="PatchModelAddDownscale.*divided by rows.*it resizes the picture"):
        client.run(pool(dataclasses.replace(sampling, model_nodes=nodes), on_two))
    compiled = pool(sampling)
    compiled["compile"] = {
        "class_type": "RayTorchCompileModel",
        "inputs": {"ray_actors": [LOADER, 0], "backend": "inductor"},
    }
    compiled[SAMPLER]["inputs"]["ray_actors"] = ["compile", 0]
    with pytest.raises(PromptError, match="Compiled blocks.*divided by rows.*RayTorchCompileModel"):
        client.run(compiled)
    compiled["compile"]["inputs"]["backend"] = "cudagraphs"
    client.run(compiled)
    assert torch.equal(latent(server, "unet"), sampled), "recorded calls are no compiled ones"
    client.run(pool(dataclasses.replace(sampling, seed=8), on_two))
    assert latent(server, "unet").isfinite().all()
    assert [worker.pid for worker in workers(server)] == alive


@pytest.mark.parametrize("mode", ["Kill Workers Only", "Kill Entire Cluster"])
def test_kill_node(server: ComfyServer, client: ComfyClient, good: Callable[[], torch.Tensor], mode: str) -> None:
    """Nothing of the workers is left, and the next prompt has them again."""
    before = good()
    prompt = pool(dataclasses.replace(GOOD, name="killed"))
    inputs = {"ray_actors": [LOADER, 0], "kill_mode": mode}
    client.run({**{name: prompt[name] for name in (INIT, LOADER)}, "kill": {"class_type": "RayKill", "inputs": inputs}})
    assert workers(server) == []
    ray = any("/raylet/raylet " in process.command for process in processes.tree(server.pid))
    assert ray == (mode == "Kill Workers Only")
    assert torch.equal(good(), before)


def test_unload_button(server: ComfyServer, client: ComfyClient, good: Callable[[], torch.Tensor]) -> None:
    before = good()
    alive = [worker.pid for worker in workers(server)]
    client.free(unload_models=True, free_memory=False)
    time.sleep(2)  # ComfyUI's prompt thread looks at the flag once a second
    assert torch.equal(good(), before)
    assert [worker.pid for worker in workers(server)] == alive


def test_edited_graph(server: ComfyServer, client: ComfyClient, good: Callable[[], torch.Tensor]) -> None:
    """An edit elsewhere in the graph keeps pool and model."""
    good()
    alive = [worker.pid for worker in workers(server)]
    client.run(pool(dataclasses.replace(GOOD, seed=123, sampler="heun", name="edited")))
    assert [worker.pid for worker in workers(server)] == alive


def workers(server: ComfyServer) -> list[processes.Process]:
    return processes.workers(server.pid)
