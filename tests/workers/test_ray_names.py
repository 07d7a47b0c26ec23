"""What the pack uses of Ray beside its public names, and the versions of Ray that tests know."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from comfy_raylight.raylight.errors import ConfigError
from comfy_raylight.workers.pool.ray_private import private
from packaging.requirements import Requirement
from packaging.version import Version

WORKERS = Path(__file__).resolve().parents[2] / "workers"
REQUIREMENTS = WORKERS.parent / "requirements.txt"
PRIVATE = ("ray._private", "ray._raylet")


def looked_up() -> list[str]:
    """The names that are asked for by `private`."""
    calls = [node for path in WORKERS.rglob("*.py") for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    asked = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "private"]
    assert all(isinstance(name, ast.Constant) for name in asked), "names are written out"
    return sorted({str(name.value) for name in asked if isinstance(name, ast.Constant)})


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def at_module_level(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_private_names_are_there() -> None:
    assert len(looked_up()) > 2
    for name in looked_up():
        assert private(name, use="is tested") is not None or name.isupper()


def test_a_name_that_is_gone_is_an_error() -> None:
    for name in ("ray._private.state.gone", "ray._private.gone.name", "ray.gone.name"):
        with pytest.raises(
            ConfigError, match=rf"does not know Ray .*: it has no {name}, by which Raylight does.*Install"
        ):
            private(name, use="does a thing")


@pytest.mark.parametrize("path", sorted(WORKERS.rglob("*.py")), ids=lambda path: str(path.relative_to(WORKERS)))
def test_private_names_are_not_imported_with_a_module(path: Path) -> None:
    """A Ray without them would end the import of the pack, and not what needs them."""
    assert [name for name in at_module_level(parsed(path)) if name.startswith(PRIVATE)] == []


def test_only_versions_that_tests_know_are_allowed() -> None:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    (allowed,) = [each.specifier for each in map(Requirement, lines) if each.name == "ray"]
    here = Version(metadata.version("ray"))
    assert here in allowed
    assert Version(f"{here.major}.{here.minor + 1}") not in allowed, "nobody has tried what comes after this"
