"""The generator's table: every mirror on the pool gives what ComfyUI's own node gives on the plain model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.counterparts import IDLE, Outcome, compare, mirrors, nodes_of_pack, skips, write_controls
from comfy_raylight.tests.host.server import ComfyServer


@dataclass(frozen=True)
class Walk:
    """What came of all mirrors in one prompt, and what ComfyUI logged meanwhile."""

    outcomes: Mapping[str, Outcome]
    log: str


@pytest.fixture(scope="module")
def walk(server: ComfyServer, client: ComfyClient) -> Walk:
    write_controls(server)
    before = len(server.log())
    table = mirrors(client)
    assert {"RayModelSamplingSD3", "RayBasicScheduler", "XFuserSamplerCustom"} <= table.keys()
    return Walk(compare(server, client, table), server.log()[before:])


def test_each_equals_its_counterpart(walk: Walk, client: ComfyClient) -> None:
    assert walk.outcomes.keys() == mirrors(client).keys() <= set(nodes_of_pack(client.object_info()))
    wrong = {name: outcome for name, outcome in walk.outcomes.items() if not outcome.fine(name)}
    assert not wrong


def test_each_does_something(walk: Walk) -> None:
    """A comparison of nodes that change nothing would say nothing."""
    effects = {name: outcome.effect for name, outcome in walk.outcomes.items() if outcome.effect is not None}
    assert len(effects) >= 10
    idle = {name for name, effect in effects.items() if effect < 1e-4}
    assert idle <= IDLE


def test_cache_decides_as_in_plain_comfyui(walk: Walk) -> None:
    """As many model calls are skipped, some but not all."""
    plain, pool = skips(walk.log)
    assert plain == pool
    assert 0 < plain[0] < plain[1] == 10
