"""What a ComfyUI publishes of the pack's nodes, against the interface that users' files depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .interface import NODES, OPTIONS, Input, Inputs, Node


def differences(published: Mapping[str, Any], name: str) -> list[str]:
    """What is otherwise than the table says of a node; empty for nothing.

    Args:
        published: every node of a ComfyUI, by id.
        name: of a node that this ComfyUI should have.
    """
    if name not in published:
        return ["it is not there"]
    return [
        f"{what}: {found!r} and not {wanted!r}"
        for what, found, wanted in _pairs(published[name], NODES[name], name)
        if found != wanted
    ]


def absent(published: Mapping[str, Any]) -> set[str]:
    """Nodes that are not there since ComfyUI lacks what they are made of."""
    return {name for name, node in NODES.items() if node.needs and node.needs not in published}


def _pairs(info: Mapping[str, Any], node: Node, name: str) -> Iterator[tuple[str, Any, Any]]:
    """What it is about, what is published, what should be."""
    yield "name", info["display_name"], node.display or name
    yield "category", info["category"], node.category
    outputs = zip(info["output"], info["output_name"], strict=True)
    yield "outputs", [f"{kind}:{label}" for kind, label in outputs], node.outputs.split()
    yield "lists among its outputs", list(info["output_is_list"]), list(node.lists or [False] * len(info["output"]))
    # ComfyUI 0.3.75 does not publish it
    yield "whether it takes lists", info.get("is_input_list", node.input_is_list), node.input_is_list
    yield "whether it is an output", info["output_node"], node.output_node
    # what it does is said on the canvas
    yield "description", bool(info["description"]), True
    yield "tooltips of outputs", all(info.get("output_tooltips", ())), True
    yield from _inputs(info, "required", node.required)
    yield from _inputs(info, "optional", node.optional)


def _inputs(info: Mapping[str, Any], part: str, expected: Inputs) -> Iterator[tuple[str, Any, Any]]:
    found = info["input"].get(part, {})
    # the order is that of saved values
    yield f"{part} inputs", list(found), list(expected)
    yield f"order of {part} inputs", info["input_order"].get(part, []), list(expected)
    for name, (kind, *more) in found.items():
        options = more[0] if more else {}
        wanted = expected.get(name, Input())
        values = tuple(value for value in kind if value in wanted.values) if isinstance(kind, list) else ()
        kept = {key: options[key] for key in OPTIONS if key in options}
        yield name, Input("" if isinstance(kind, list) else kind, values, kept), wanted
        yield f"tooltip of {name}", bool(options.get("tooltip")), True
