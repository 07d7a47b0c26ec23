"""Shared by all tests: which ComfyUIs to run against, and small checkpoints for them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from comfy_raylight.tests.host.large import LARGE, WHY

VARIABLE = "RAYLIGHT_TEST_COMFY"
SLOW = pytest.mark.skipif(not LARGE, reason=WHY)


def comfy_roots() -> list[Path]:
    """The ComfyUIs `tests/run.py` names, oldest first."""
    roots = [Path(entry) for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    if not roots:
        raise pytest.UsageError(f"{VARIABLE} names no ComfyUI: run the tests with `python tests/run.py`")
    return roots


def version_of(root: Path) -> str:
    """ComfyUI's version, from its own file."""
    scope: dict[str, str] = {}
    exec((root / "comfyui_version.py").read_text(encoding="utf-8"), scope)
    return scope["__version__"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comfy_root" in metafunc.fixturenames:
        roots = comfy_roots()
        metafunc.parametrize("comfy_root", roots, ids=[version_of(root) for root in roots], scope="session")


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Wan checkpoint; every ComfyUI reads the same file."""
    from comfy_raylight.tests.host.checkpoints import Job, write

    path = tmp_path_factory.mktemp("checkpoints") / "wan.safetensors"
    write([Job(family="wan", path=path)], comfy_root=comfy_roots()[0], python=Path(sys.executable))
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="bring the tables of model families up to date")
