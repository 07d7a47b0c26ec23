"""A pool's life: what users do in any order, and two hundred prompts that leave nothing behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host import processes
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.faults import Stage
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.prompts import INIT, LOADER, SAMPLER, SAVE
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.memory import private

SECONDS = 600.0 if LARGE else 20.0
ACTIONS_AT_LEAST = 3
PROMPTS = 200
SETTLED = 40
"""Prompts after which nothing may grow any more."""
GROWTH_BYTES = 24 << 20
"""Of each process over the other prompts, for its allocator."""


@pytest.fixture(scope="module")
def stage(server: ComfyServer, client: ComfyClient) -> Stage:
    return Stage(server, client)


def cancelled(stage: Stage, chance: random.Random) -> None:
    """A long prompt, cancelled at some time: perhaps before it samples."""
    prompt_id = stage.client.queue(stage.prompt(steps=4000))
    time.sleep(chance.uniform(0, 2))
    stage.client.interrupt()
    try:
        stage.client.wait(prompt_id, timeout=60)
    except PromptError as error:
        assert error.kind == "interrupted"


def killed(stage: Stage, chance: random.Random) -> None:
    """Workers die while nothing runs."""
    workers = processes.workers(stage.server.pid)
    victims = chance.sample(workers, k=min(len(workers), chance.choice((1, 2))))
    assert processes.kill(victims) == []


def killed_at_work(stage: Stage, chance: random.Random) -> None:
    """A worker dies while the prompt starts or samples."""
    prompt_id = stage.client.queue(stage.prompt(steps=4000))
    time.sleep(chance.uniform(0, 2))
    victims = stage.workers()[-1:]
    if victims:
        stage.kill(*victims, how=signal.SIGKILL)
    else:  # the pool is not there yet
        stage.client.interrupt()
    try:
        stage.client.wait(prompt_id, timeout=30)
    except PromptError:
        return
    except TimeoutError:  # it died between two calls: another pool took its place within the run, which goes on
        steps = len(stage.client.events_of(prompt_id))
    assert not set(victims) & set(stage.workers())
    time.sleep(2)
    assert len(stage.client.events_of(prompt_id)) > steps
    stage.client.interrupt()
    with pytest.raises(PromptError, match="interrupted"):
        stage.client.wait(prompt_id, timeout=30)


def other_pool(stage: Stage, chance: random.Random) -> None:
    """One picture on another number of workers."""
    prompt = stage.prompt()
    prompt[INIT]["inputs"].update(GPU=1, ulysses_degree=1)
    stage.client.run(prompt, timeout=120)


def offloaded(stage: Stage, chance: random.Random) -> None:
    prompt = stage.prompt()
    inputs = {"ray_actors": [LOADER, 0], "latent": [SAMPLER, 0]}
    prompt["offload"] = {"class_type": "RayOffloadModel", "inputs": inputs}
    prompt[SAVE]["inputs"]["samples"] = ["offload", 0]
    stage.client.run(prompt, timeout=120)


def freed(stage: Stage, chance: random.Random) -> None:
    stage.client.free(unload_models=True, free_memory=chance.random() < 0.5)


def ended(stage: Stage, chance: random.Random) -> None:
    prompt = stage.prompt()
    inputs = {"ray_actors": [LOADER, 0], "kill_mode": "Kill Workers Only"}
    kill = {"class_type": "RayKill", "inputs": inputs}
    stage.client.run({**{name: prompt[name] for name in (INIT, LOADER)}, "kill": kill}, timeout=120)


ACTIONS: tuple[Callable[[Stage, random.Random], None], ...] = (
    cancelled,
    cancelled,
    killed,
    killed_at_work,
    other_pool,
    offloaded,
    freed,
    ended,
)


@pytest.mark.timeout(SECONDS + 300)
def test_anything_in_any_order(stage: Stage) -> None:
    """After each action the good prompt gives the bytes it always gave."""
    chance = random.Random(int(os.environ.get("RAYLIGHT_TEST_SEED", "7")))
    wanted = stage.good()
    done: list[str] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or len(done) < ACTIONS_AT_LEAST:
        action = chance.choice(ACTIONS)
        done.append(action.__name__)
        action(stage, chance)
        try:
            assert stage.good() == wanted
        except (AssertionError, PromptError) as error:
            raise AssertionError(f"after {', '.join(done)}") from error


def footprint(stage: Stage) -> dict[str, list[int]]:
    """Per process: anonymous memory, open files, threads; and files of shared memory."""
    found = {}
    for name, pids in {"driver": [stage.server.pid], "workers": stage.workers()}.items():
        for number, pid in enumerate(pids):
            process = psutil.Process(pid)
            found[f"{name} {number}"] = [private([pid]), process.num_fds(), process.num_threads()]
    found["shared memory"] = [0, len(list(Path("/dev/shm").iterdir())), 0]
    return found


@pytest.mark.timeout(900)
@SLOW
def test_two_hundred_prompts_leave_nothing(stage: Stage) -> None:
    wanted = stage.good()
    for _ in range(SETTLED):
        assert stage.good() == wanted
    before = footprint(stage)
    for _ in range(PROMPTS - SETTLED):
        assert stage.good() == wanted
    after = footprint(stage)
    assert before.keys() == after.keys()
    for name, (memory, files, threads) in after.items():
        assert memory <= before[name][0] + GROWTH_BYTES, (name, before[name], after[name])
        assert files <= before[name][1] + 2, (name, before[name], after[name])
        assert threads <= before[name][2] + 1, (name, before[name], after[name])
