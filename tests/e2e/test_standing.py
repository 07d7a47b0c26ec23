"""A ComfyUI that the pack does not know: what the log and errors say of it, and whom they blame."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_raylight.tests.host import broken
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, Case, PoolCase, plain, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import FP32, both

WAN = Case(file="wan.safetensors", inputs=FAMILIES["wan"])
TOME = (("TomePatchModel", {"ratio": 0.3}),)
"""A node that patches the attention of any model; Wan's blocks do not call its patches."""


@pytest.fixture(scope="module")
def unknown(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A newer ComfyUI, whose Wan is another one than the plan says."""
    folder = tmp_path_factory.mktemp("unknown")
    comfy = broken.tree(comfy_root, folder / "comfy", broken.OTHER_ROPE)
    server = ComfyServer(comfy, base=folder, threads=1)
    write([Job(family="wan", path=server.models / WAN.file)], comfy_root=comfy_root, python=Path(sys.executable))
    with server:
        yield server


@pytest.fixture(scope="module")
def visitor(unknown: ComfyServer) -> Iterator[ComfyClient]:
    with unknown.client() as client:
        yield client


@pytest.fixture(scope="module")
def hidden(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A newer ComfyUI, whose Wan the plan fits by all names, and would be wrong with."""
    folder = tmp_path_factory.mktemp("hidden")
    comfy = broken.tree(comfy_root, folder / "comfy", broken.HIDDEN_WAN)
    server = ComfyServer(comfy, base=folder, threads=1)
    write([Job(family="wan", path=server.models / WAN.file)], comfy_root=comfy_root, python=Path(sys.executable))
    with server:
        yield server


def test_a_plan_that_does_not_fit_any_more_is_seen(hidden: ComfyServer) -> None:
    """No picture is wrong: the first call is compared, and a plan that is found takes the place of the written one."""
    with hidden.client() as client:
        difference, _, _ = both(hidden, client, dataclasses.replace(WAN, steps=3), PoolCase())
    assert difference <= FP32
    said = hidden.log()
    assert "The plan that Raylight has for WanModel does not fit: the model's output differs" in said
    assert f"ComfyUI {broken.UNKNOWN} is newer than any" in said
    assert "WanModel has no plan that fits: one was found and checked" in said


def test_a_newer_comfyui_is_named_and_no_node(unknown: ComfyServer, visitor: ComfyClient) -> None:
    visitor.run(plain(WAN))  # it is right alone
    with pytest.raises(PromptError) as caught:
        visitor.run(pool(WAN))
    text = str(caught.value)
    assert "The rope table does not fit the tokens" in text and "No node changes the model here" in text
    assert f"ComfyUI {broken.UNKNOWN} is newer than any" in text and "benchmarks/compat.py" in text
    assert "Remove the node" not in text
    said = [line for line in unknown.log().splitlines() if f"ComfyUI {broken.UNKNOWN}, newer than any" in line]
    assert len(said) == 1, "the log says it once"


def test_a_node_that_is_there_is_blamed(visitor: ComfyClient) -> None:
    with pytest.raises(PromptError, match="Remove the node that changes the number of tokens.*TomePatchModel"):
        visitor.run(pool(dataclasses.replace(WAN, model_nodes=TOME), PoolCase(through_model=True)))
