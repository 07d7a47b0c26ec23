"""The nodes as ComfyUI publishes them: ids, sockets, widget order and defaults that saved files depend on."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.server import PACK_FOLDER

from .interface import NODES
from .published import absent, differences


@pytest.fixture(scope="module")
def published(client: ComfyClient) -> dict[str, Any]:
    """Every node of this ComfyUI, by id."""
    return client.object_info()


@pytest.mark.parametrize("name", NODES)
def test_node(published: dict[str, Any], name: str) -> None:
    if name in absent(published):
        assert name not in published
        pytest.skip(f"this ComfyUI has no {NODES[name].needs}")
    assert differences(published, name) == []


def test_no_other_node(published: dict[str, Any]) -> None:
    """A node that is new is in the table, so that a later change of it is seen."""
    ours = {name for name, info in published.items() if PACK_FOLDER in info["python_module"]}
    assert ours == set(NODES) - absent(published)


def test_a_difference_is_seen(published: dict[str, Any]) -> None:
    """The comparison has something to say of each part of a node."""
    info = published["RayInitializer"]
    order = list(reversed(info["input_order"]["required"]))
    for changed in (
        {"display_name": "Other"},
        {"output_name": ["other"] * len(info["output_name"])},
        {"input_order": {**info["input_order"], "required": order}},
        {"input": {**info["input"], "required": {**info["input"]["required"], "GPU": ["INT", {"tooltip": "x"}]}}},
    ):
        assert len(differences({"RayInitializer": {**info, **changed}}, "RayInitializer")) == 1
    assert differences({}, "RayInitializer") == ["it is not there"]
