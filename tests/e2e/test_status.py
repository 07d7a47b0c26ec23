"""The route that machines read: it says what is so, and answers whatever the pool and the queue do."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.faults import Stage
from comfy_raylight.tests.host.prompts import FAMILIES, LOADER, SAMPLER, Case, pool
from comfy_raylight.tests.host.server import ComfyServer

ANSWER_S, WAIT_S = 10.0, 60.0


@pytest.fixture(scope="module")
def stage(server: ComfyServer, client: ComfyClient) -> Stage:
    return Stage(server, client)


def status(client: ComfyClient) -> dict[str, Any]:
    told: dict[str, Any] = client.get("/raylight/status", timeout=ANSWER_S)
    return told


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds, for a while."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def test_status(stage: Stage) -> None:
    client = stage.client
    prompt = stage.prompt()
    prompt["report"] = {"class_type": "RayReport", "inputs": {"ray_actors": [LOADER, 0], "latent": [SAMPLER, 0]}}
    client.run(prompt)
    ready = status(client)
    assert ready["state"] == "ready" and all(ready["versions"].values())
    found = ready["pool"]
    assert [worker["process"] for worker in found["workers"]] == stage.workers()
    assert found["models"][0]["path"].endswith("wan.safetensors") and found["last_run"]["steps"] == 2
    assert [worker["rank"] for worker in found["last_report"]["workers"]] == [0, 1]

    prompt_id = client.queue(stage.prompt(steps=4000))
    stage.sampling(prompt_id)
    victim = stage.workers()[-1]
    os.kill(victim, signal.SIGSTOP)
    try:
        assert status(client)["state"] == "working"
    finally:
        os.kill(victim, signal.SIGKILL)
    with pytest.raises(PromptError, match="died"):
        client.wait(prompt_id)
    ended = status(client)
    assert ended["state"] == "none" and ended["pool"] is None
    assert "Worker 1" in ended["last_fault"]["error"] and abs(ended["last_fault"]["at"] - time.time()) < 600
    stage.good()
    again = status(client)
    assert again["restarts"] == ready["restarts"] + 1 and again["state"] == "ready"


def test_kill_node_has_failed_starts_tried_again(stage: Stage) -> None:
    """A worker is killed in each of three starts; no loader can run then, so RayKill is given the initializer."""
    case = Case(file="wan.safetensors", inputs=FAMILIES["wan"], name="tried")
    stage.client.run(pool(case))
    kill = {"class_type": "RayKill", "inputs": {"ray_actors": ["init", 0], "kill_mode": "Kill Workers Only"}}

    def ask(seed: int, nodes: dict[str, Any] | None = None) -> str:
        prompt = pool(dataclasses.replace(case, seed=seed))
        return stage.client.queue({**prompt, **(nodes or {})})

    for seed in range(3):
        for worker in stage.workers():
            os.kill(worker, signal.SIGKILL)
        # a pool whose end is not seen yet would fail in its run, and not start
        until(lambda: status(stage.client)["state"] != "ready")
        prompt_id = ask(100 + seed)
        until(stage.workers)
        os.kill(stage.workers()[0], signal.SIGKILL)
        with pytest.raises(PromptError, match="ended while it should"):
            stage.client.wait(prompt_id)
    with pytest.raises(PromptError, match="failed to start 3 times within five minutes"):
        stage.client.wait(ask(200))
    assert status(stage.client)["state"] == "waiting" and not stage.workers()
    prompt = pool(case)
    stage.client.run({"init": prompt["init"], "kill": kill})
    stage.client.wait(ask(201))
    assert status(stage.client)["state"] == "ready"
