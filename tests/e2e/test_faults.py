"""Whatever happens to a worker ends in one clear error, and the next picture is the one of before."""

from __future__ import annotations

import pytest
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.faults import FAULTS, Stage, suffer, zombies
from comfy_raylight.tests.host.server import ComfyServer

BY_DEFAULT = ("rank 1", "raylet", "exception", "memory", "truncated", "cancel", "cancel in a step")
NAMES = [pytest.param(name, marks=() if name in BY_DEFAULT else SLOW) for name in FAULTS]


@pytest.fixture(scope="module")
def stage(server: ComfyServer, client: ComfyClient) -> Stage:
    return Stage(server, client)


@pytest.fixture(scope="module")
def wanted(stage: Stage) -> bytes:
    """The good picture, before anything went wrong."""
    return stage.good()


@pytest.mark.parametrize("name", NAMES)
def test_fault(stage: Stage, wanted: bytes, name: str) -> None:
    fault, outcome = FAULTS[name], suffer(stage, FAULTS[name])
    assert fault.expect in outcome.seen
    assert outcome.next == wanted
    assert fault.keeps in (None, outcome.kept)
    assert len(stage.workers()) == 2
    assert zombies(stage.server.pid) == []
    if name == "cancel in a step":
        assert outcome.steps == 0, "it was left within its first step"
