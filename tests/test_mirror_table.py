"""How a mirror is made of a class of ComfyUI's: what users' files have comes first, what ComfyUI adds comes last."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

FILE = Path(__file__).resolve().parents[1] / "nodes" / "mirrors.py"


class Older:
    """A class of ComfyUI's older form, of a version that has one input more than users' files."""

    RETURN_TYPES = ("MODEL", "LATENT")
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "newcomer": ("INT", {"default": 5}),
                "shift": ("FLOAT", {"default": 3.0}),
                "model": ("MODEL", {"tooltip": "theirs"}),
            }
        }

    def patch(self, model: str, shift: float, newcomer: int) -> tuple[Any, ...]:
        return (model, shift, newcomer)


class Newer:
    """A class of the newer form, as it looks from outside."""

    RETURN_TYPES: ClassVar[list[str]] = ["SIGMAS"]
    RETURN_NAMES: ClassVar[list[str]] = ["levels"]
    OUTPUT_IS_LIST: ClassVar[list[bool]] = [False]
    DESCRIPTION = "Words of ComfyUI's."
    EXPERIMENTAL = True
    FUNCTION = "EXECUTE_NORMALIZED"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL", {}), "scheduler": ("COMBO", {"options": ["simple", "normal"]})},
            "optional": {"steps": ("INT", {"default": 20})},
        }

    @classmethod
    def EXECUTE_NORMALIZED(cls, **values: Any) -> SimpleNamespace:
        return SimpleNamespace(result=(values,))


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, in a ComfyUI that has two nodes."""
    nodes = ModuleType("nodes")
    nodes.NODE_CLASS_MAPPINGS = {"Older": Older, "Newer": Newer}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nodes", nodes)
    spec = importlib.util.spec_from_file_location("mirrors_under_test", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mirrors_under_test", module)
    spec.loader.exec_module(module)
    return module


def made(mirrors: Any, monkeypatch: pytest.MonkeyPatch, *rows: Any) -> dict[str, Any]:
    monkeypatch.setattr(mirrors, "MIRRORS", rows)
    found: dict[str, Any] = mirrors.node_classes()
    return found


def test_what_comfyui_adds_is_optional_and_last(mirrors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = made(mirrors, monkeypatch, mirrors.Mirror("RayOlder", "Older", "x", "ray_actors shift"))["RayOlder"]
    declared = node.INPUT_TYPES()
    assert list(declared["required"]) == ["ray_actors", "shift"] and list(declared["optional"]) == ["newcomer"]
    assert declared["required"]["ray_actors"] == ("RAY_ACTORS", {"tooltip": "theirs"})
    assert all(options["tooltip"] for part in declared.values() for _, options in part.values())
    assert node.RETURN_TYPES == ("RAY_ACTORS", "LATENT") and node.RETURN_NAMES == ("ray_actors", "LATENT")
    assert node().run(ray_actors="model", shift=2.0) == ("model", 2.0, 5), "an older prompt gets ComfyUI's default"
    assert node().run(ray_actors="model", shift=2.0, newcomer=6) == ("model", 2.0, 6)


def test_classes_of_the_newer_form(mirrors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = made(mirrors, monkeypatch, mirrors.Mirror("RayNewer", "Newer", "x", "ray_actors scheduler | steps"))[
        "RayNewer"
    ]
    assert node.INPUT_TYPES()["required"]["scheduler"][0] == ["simple", "normal"]
    assert node.RETURN_NAMES == ("levels",) and node.EXPERIMENTAL and node.OUTPUT_IS_LIST == [False]
    assert node.DESCRIPTION.endswith(Newer.DESCRIPTION)
    assert node().run(ray_actors=1, scheduler="normal") == ({"model": 1, "scheduler": "normal", "steps": 20},)


def test_what_this_comfyui_lacks_is_left_out(
    mirrors: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = (
        mirrors.Mirror("RayAbsent", "Absent", "x", "ray_actors"),
        mirrors.Mirror("RayRenamed", "Older", "x", "ray_actors other_name"),
        mirrors.Mirror("RayOlder", "Older", "x", "ray_actors shift"),
    )
    with caplog.at_level(logging.INFO):
        assert list(made(mirrors, monkeypatch, *rows)) == ["RayOlder"]
    assert "RayAbsent is left out: this ComfyUI has no Absent" in caplog.text
    assert "this ComfyUI has no Older with other_name" in caplog.text


def test_every_row_is_whole(mirrors: Any) -> None:
    ids = [mirror.id for mirror in mirrors.MIRRORS]
    assert len(ids) == len(set(ids)) >= 23
    for mirror in mirrors.MIRRORS:
        names = mirror.inputs.replace("|", " ").split()
        assert len(names) == len(set(names)) and set(mirror.own) <= set(names)
        assert mirror.category.startswith("Raylight")
