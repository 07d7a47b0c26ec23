"""The rooms of the pack and the doors between them, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = {"raylight", "raylight/sequence", "raylight/rows", "raylight/found", "raylight/choice"}
FILES = {"loaders", "vae", "patches"}
ALLOWED: dict[str, set[str]] = {
    "raylight": set(),
    "raylight/sequence": {"raylight"},
    "raylight/rows": {"raylight", "raylight/sequence"},
    "raylight/found": ENGINE,
    "raylight/choice": {"raylight", "raylight/sequence"},
    "patches": ENGINE,
    "loaders": ENGINE,
    "vae": ENGINE,
    "workers/wire": ENGINE,
    "workers/mapping": ENGINE | {"workers/wire", "loaders"},
    "workers/worker": ENGINE | FILES | {"workers/wire", "workers/mapping"},
    "workers/pool": ENGINE | {"workers/wire", "loaders"},
    "workers/driver": ENGINE | FILES | {"workers/pool", "workers/wire", "workers/mapping"},
    "nodes": ENGINE | FILES | {"workers/driver", "workers/pool", "workers/wire", "workers/mapping"},
}
"""What the files of a room may import of other rooms; rooms in it are its own. `driver` and `worker` run in different
processes: neither imports the other."""
ALSO: dict[str, set[str]] = {
    "raylight/install.py": {"raylight/sequence", "raylight/rows"},  # chooses between them
    "workers/pool/actor.py": {"workers/worker"},  # hands its process over to a worker's verbs
}
RAY_IN = "workers/pool"
MOST_LINES = 450
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


def room_of(path: Path) -> str:
    """The innermost room that a file, or a package, is in."""
    inside = path.relative_to(ROOT)
    return next((str(parent) for parent in (inside, *inside.parents) if str(parent) in ALLOWED), "")


def modules() -> Iterator[Path]:
    for top in dict.fromkeys(room.split("/")[0] for room in ALLOWED):
        yield from (path for path in sorted((ROOT / top).rglob("*.py")) if "import_root" not in path.parts)


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
            if node.level:
                yield from ((node.level, f"{base}.{alias.name}".lstrip(".")) for alias in node.names)


EVERY = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in modules()]


@pytest.mark.parametrize("path", EVERY)
def test_doors(path: Path) -> None:
    room, file = room_of(path), path.relative_to(ROOT).as_posix()
    allowed = ALLOWED.get(room, set()) | ALSO.get(file, set()) | {room}
    for level, name in imports(path):
        top = name.split(".")[0]
        if level:
            # of a package, the name after it may be a module of another room
            named = room_of(path.parents[level - 1] / name.replace(".", "/"))
            assert named in allowed, f"{file} must not import {name or '.'} of {named}"
        else:
            assert top not in ALLOWED or top in COMFY, f"{top} must be imported relatively"
            assert top != "comfy_raylight", "inside the pack imports are relative"
            if top == "ray":
                assert room == RAY_IN, "ray belongs to what starts pools"
            if top in COMFY:
                assert room.split("/")[0] in ("workers", "nodes"), f"{room} must not know ComfyUI"


@pytest.mark.parametrize("path", EVERY)
def test_module_level_imports_are_light(path: Path) -> None:
    # these are imported when a pool starts
    if path.name in ("connection.py", "launch.py", "actor.py", "cluster.py"):
        return
    heavy = {name.split(".")[0] for level, name in imports(path, module_level=True) if level == 0} & HEAVY
    assert not heavy


def test_no_module_is_long() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_walk_sees_the_pack() -> None:
    found = {path.name for path in modules()}
    assert {"hooks.py", "wan.py", "pool.py", "loaders.py"} <= found


def test_dependencies_are_mirrored() -> None:
    """pip users read requirements.txt, ComfyUI's registry reads pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split() == project["dependencies"]
