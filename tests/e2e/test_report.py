"""Ray Report: what it says of a pool is so."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.conftest import version_of
from comfy_raylight.tests.host import prompts
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.prompts import Case
from comfy_raylight.tests.host.server import ComfyServer
from PIL import Image

STEPS = 3


@pytest.fixture(scope="module")
def report(server: ComfyServer, client: ComfyClient) -> dict[str, Any]:
    """What the node shows after a run of three steps, its text, and how long the run took."""
    case = Case(
        file="wan.safetensors",
        inputs=prompts.FAMILIES["wan"],
        cfg=1.0,
        steps=STEPS,
        seed=int(time.time()),
        name="report",
    )
    prompt = prompts.pool(case)
    prompt["report"] = {
        "class_type": "RayReport",
        "inputs": {"ray_actors": [prompts.LOADER, 0], "latent": [prompts.SAMPLER, 0]},
    }
    client.run(prompts.pool(replace(case, seed=case.seed + 1)))
    result = client.run(prompt)
    shown = result.outputs["report"]
    return {"shown": shown, "text": shown["text"][0], "seconds": result.node_seconds()[prompts.SAMPLER]}


def test_text(report: dict[str, Any], comfy_root: Path) -> None:
    text = report["text"]
    assert text.startswith(f"ComfyUI {version_of(comfy_root)}, ")
    assert "Pool: 2 workers, ulysses 2" in text
    assert re.search(r"Worker 0: cpu.*\n.* MiB of the host", text) and "Worker 1: " in text
    # alone on its line: other tests have left models whose names end in it
    assert len(re.findall(r"^ +wan\.safetensors \(WanModel\): [\d.]+ .iB of [\d.]+ .iB on the device", text, re.M)) == 2


def test_last_run(report: dict[str, Any]) -> None:
    """The run that was just there: its steps, and no more time than it took."""
    found = re.search(r"Last run: (\d+) steps, ([\d.]+) s per step", report["text"])
    assert found and int(found[1]) == STEPS
    assert 0 < float(found[2]) * STEPS <= report["seconds"]
    shares = [int(share) for share in re.findall(r"(\d+)% (?:of it )?(?:in exchanges|between)", report["text"])]
    assert len(shares) == 2 and all(0 <= share < 100 for share in shares) and sum(shares) <= 100
    gains = re.search(r"speed-up over one worker: ([\d.]+) seen, ([\d.]+) predicted", report["text"])
    assert gains and 0 < float(gains[1]) <= 2 and 0 < float(gains[2]) <= 2


def test_chart(report: dict[str, Any], server: ComfyServer) -> None:
    """A picture on the canvas that is not of one colour."""
    (image,) = report["shown"]["images"]
    assert image["type"] == "temp"
    with Image.open(server.base / "temp" / image["subfolder"] / image["filename"]) as chart:
        colours = chart.convert("RGB").getcolors(1 << 20)
        assert chart.width > 400 and colours and len(colours) > 5


def test_without_workers(client: ComfyClient) -> None:
    """It starts none."""
    case = Case(
        file="wan.safetensors", inputs=prompts.FAMILIES["wan"], cfg=1.0, steps=1, seed=int(time.time()), name="report"
    )
    prompt = prompts.pool(case)
    model = {"ray_actors": [prompts.LOADER, 0]}
    loaded = {name: prompt[name] for name in (prompts.INIT, prompts.LOADER)}
    kill = {"class_type": "RayKill", "inputs": {**model, "kill_mode": "Kill Workers Only"}}
    client.run({**loaded, "kill": kill})
    result = client.run({**loaded, "report": {"class_type": "RayReport", "inputs": model}})
    assert "No worker is running" in result.outputs["report"]["text"][0]
