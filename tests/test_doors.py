"""The rooms of the pack and the doors between them, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "raylight": set(),
    "patches": {"raylight"},
    "loaders": {"raylight"},
    "vae": {"raylight"},
    "workers": {"loaders", "vae", "patches", "raylight"},
    "nodes": {"workers", "loaders", "vae", "patches", "raylight"},
}
RAY_IN = {"launch.py", "pool.py", "actor.py", "ray_watch.py", "ray_keeper.py", "cluster.py"}
COMFY = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "nodes",
    "latent_preview",
    "execution",
}
HEAVY = {"yunchang", "xfuser", "flash_attn", "sageattention", "ray", "diffusers", "transformers"}


def modules() -> Iterator[tuple[str, Path]]:
    for room in ALLOWED:
        for path in sorted((ROOT / room).rglob("*.py")):
            if "import_root" not in path.parts:
                yield room, path


def imports(path: Path, *, module_level: bool = False) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of each import in a file; TYPE_CHECKING blocks count as not at module level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if module_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield node.level, base
            if not base:
                yield from ((node.level, alias.name) for alias in node.names)


@pytest.mark.parametrize("room,path", [pytest.param(r, p, id=str(p.relative_to(ROOT))) for r, p in modules()])
def test_doors(room: str, path: Path) -> None:
    for level, name in imports(path):
        top = name.split(".")[0]
        if level == 2 and path.parent == ROOT / room and top:
            assert top == room or top in ALLOWED[room], f"{room} must not import {top}"
        assert level or top not in ALLOWED or top in COMFY, f"{top} must be imported relatively"
        assert top != "comfy_raylight", "inside the pack imports are relative"
        if level == 0 and top == "ray":
            assert room == "workers" and path.name in RAY_IN, "ray belongs to what starts pools"
        if level == 0 and top in COMFY:
            assert room in ("workers", "nodes"), f"{room} must not know ComfyUI"


@pytest.mark.parametrize("room,path", [pytest.param(r, p, id=str(p.relative_to(ROOT))) for r, p in modules()])
def test_module_level_imports_are_light(room: str, path: Path) -> None:
    # launch and actor are imported when a pool starts
    if path.name in ("launch.py", "actor.py", "cluster.py"):
        return
    heavy = {name.split(".")[0] for level, name in imports(path, module_level=True) if level == 0} & HEAVY
    assert not heavy


def test_the_walk_sees_the_pack() -> None:
    found = {path.name for _, path in modules()}
    assert {"hooks.py", "wan.py", "pool.py", "loaders.py"} <= found


def test_dependencies_are_mirrored() -> None:
    """pip users read requirements.txt, ComfyUI's registry reads pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split() == project["dependencies"]
