"""The nodes as ComfyUI publishes them: ids, sockets, widget order and defaults that saved files depend on."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.server import PACK_FOLDER

from .interface import NODES, OPTIONS, Input, Inputs


@pytest.fixture(scope="module")
def published(client: ComfyClient) -> dict[str, Any]:
    """Every node of this ComfyUI, by id."""
    return client.object_info()


@pytest.mark.parametrize("name", NODES)
def test_node(published: dict[str, Any], name: str) -> None:
    expected = NODES[name]
    if expected.needs and expected.needs not in published:
        assert name not in published
        pytest.skip(f"this ComfyUI has no {expected.needs}")
    info = published[name]
    assert info["display_name"] == (expected.display or name)
    assert info["category"] == expected.category
    outputs = zip(info["output"], info["output_name"], strict=True)
    assert [f"{kind}:{label}" for kind, label in outputs] == expected.outputs.split()
    assert list(info["output_is_list"]) == list(expected.lists or [False] * len(info["output"]))
    # ComfyUI 0.3.75 does not publish it
    assert info.get("is_input_list", expected.input_is_list) == expected.input_is_list
    assert info["output_node"] == expected.output_node
    assert info["description"] and all(info.get("output_tooltips", ())), "what it does is said on the canvas"
    same_inputs(info, "required", expected.required)
    same_inputs(info, "optional", expected.optional)


def test_no_other_node(published: dict[str, Any]) -> None:
    """A node that is new is in the table, so that a later change of it is seen."""
    ours = {name for name, info in published.items() if PACK_FOLDER in info["python_module"]}
    absent = {name for name, node in NODES.items() if node.needs and node.needs not in published}
    assert ours == set(NODES) - absent


def same_inputs(info: dict[str, Any], part: str, expected: Inputs) -> None:
    found = info["input"].get(part, {})
    assert list(found) == info["input_order"].get(part, []) == list(expected), "the order is that of saved values"
    for name, (kind, *more) in found.items():
        options = more[0] if more else {}
        values = tuple(value for value in kind if value in expected[name].values) if isinstance(kind, list) else ()
        kept = {key: options[key] for key in OPTIONS if key in options}
        assert Input("" if isinstance(kind, list) else kind, values, kept) == expected[name], name
        assert options.get("tooltip"), f"{name} has no tooltip"
