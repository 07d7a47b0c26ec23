"""Workflow files: dropped on the page each one is whole, and ComfyUI takes it as a prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.browser import old_files
from comfy_raylight.tests.browser.canvas import Canvas
from comfy_raylight.tests.browser.files import EXAMPLES, OLD, PROMPTS, ROOT
from comfy_raylight.tests.conftest import version_of
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.server import ComfyServer

sys.path.append(str(ROOT / "benchmarks"))
NOTES = {"Note", "MarkdownNote", "PrimitiveNode", "Reroute"}
"""Nodes of the page alone."""


@pytest.fixture(scope="module")
def known(client: ComfyClient) -> set[str]:
    return set(client.object_info())


def missing(path: Path, known: set[str]) -> set[str]:
    """Nodes of ComfyUI that a file needs, and this version does not have."""
    found = json.loads(path.read_text(encoding="utf-8"))
    nodes = found["nodes"] if "nodes" in found else found.values()
    return {node.get("type") or node["class_type"] for node in nodes} - known - NOTES


def leave_if_newer(path: Path, root: Path, known: set[str]) -> None:
    """Skip an example that says of itself that it needs a newer ComfyUI; every other must have its nodes."""
    from example_prompts import NEWER

    needs = NEWER.get(path.stem, (0, 0))
    if tuple(map(int, version_of(root).split(".")[:2])) < needs:
        pytest.skip(f"it needs ComfyUI {'.'.join(map(str, needs))}")
    assert not missing(path, known)


@pytest.mark.parametrize("name", old_files.FILES)
def test_old(name: str, page: Canvas, server: ComfyServer, known: set[str]) -> None:
    path = server.base / "old" / f"{name}.json"
    assert not missing(path, known)
    check_dropped(path, page)


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_of_the_earlier_pack(path: Path, page: Canvas, known: set[str]) -> None:
    if absent := missing(path, known):
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(absent))}")
    check_dropped(path, page)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, page: Canvas, comfy_root: Path, known: set[str]) -> None:
    leave_if_newer(path, comfy_root, known)
    check_dropped(path, page)


def check_dropped(path: Path, page: Canvas) -> None:
    """A file on the page keeps its nodes and wires, and ComfyUI takes it as a prompt."""
    page.messages()
    page.drop(path)
    assert page.dialogs() == [] and page.unknown() == []
    messages = [text for text in page.messages() if "Raylight" not in text]
    assert not [text for text in messages if "workflow" in text.lower()]
    saved, shown = json.loads(path.read_text(encoding="utf-8")), page.workflow()
    assert types(shown) == types(saved)
    assert wires(shown) == wires(saved), "every wire is where it was"
    assert page.refused() == ""


def types(workflow: dict[str, Any]) -> dict[int, str]:
    """Types of nodes by their ids."""
    return {node["id"]: node["type"] for node in workflow["nodes"]}


def wires(workflow: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Each wire as (from, name of the output, to, name of the input)."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    return {
        (origin, nodes[origin]["outputs"][output]["name"], target, nodes[target]["inputs"][socket]["name"])
        for _, origin, output, target, socket, _ in workflow["links"]
    }


def test_mended(page: Canvas, server: ComfyServer) -> None:
    """Values that a widget cannot have become its default, others stay, and a message says so."""
    page.messages()
    page.drop(server.base / "old" / "data_parallel.json")
    (message,) = (text for text in page.messages() if "Raylight" in text)
    (sampler,) = (node for node in page.prompt().values() if node["class_type"] == "DPKSamplerAdvanced")
    values = {name: value for name, value in sampler["inputs"].items() if not isinstance(value, list)}
    assert values == {
        "add_noise": "enable",
        "steps": 20,
        "cfg": 8,
        "sampler_name": "euler",
        "scheduler": values["scheduler"],
        "start_at_step": 0,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
        "jobs": 0,
    }
    assert all(name in message for name in ("steps", "cfg", "sampler_name", "scheduler", "end_at_step"))
    assert "add_noise" not in message and "start_at_step" not in message


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_prompt(path: Path, client: ComfyClient, comfy_root: Path, known: set[str]) -> None:
    """The API prompts are those of their source, and ComfyUI takes them."""
    from example_prompts import built

    prompt = json.loads(path.read_text(encoding="utf-8"))
    assert prompt == built(path.stem), "python benchmarks/examples.py writes them"
    leave_if_newer(path, comfy_root, known)
    answer = client.post("/raylight-test/validate", {"prompt": prompt})
    assert answer["fine"], answer


def test_all_examples_are_there() -> None:
    """Each as prompt, canvas and picture; the note of one that needs a newer ComfyUI says so."""
    from example_prompts import EXAMPLES as SOURCES
    from example_prompts import NEWER

    for name, version in NEWER.items():
        assert f"Needs ComfyUI {'.'.join(map(str, version))}." in (SOURCES[name].__doc__ or "")
    names = set(SOURCES)
    assert {path.stem for path in PROMPTS} == {path.stem for path in EXAMPLES} == names
    assert {path.stem for path in (ROOT / "example_workflows").glob("*.jpg")} == names
