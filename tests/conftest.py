"""Shared by all tests: which ComfyUI to run against and which tests it gets, and small checkpoints for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from comfy_raylight.tests.host.large import LARGE, WHY
from comfy_raylight.tests.host.setup import version_of

VARIABLE = "RAYLIGHT_TEST_COMFY"
COMPAT = (
    "test_entry.py",  # import
    "e2e/test_interface.py",  # the table of nodes
    "e2e/test_families.py",  # a member of each family, sampled over HTTP
    "dropin",
    "decode",
    "engine/test_parity.py",
    "engine/test_rows.py",
    "engine/test_bytes.py",
    "engine/test_host_waits.py",
)
"""What `--compat` runs: all that says whether the pack works on a ComfyUI, in ten minutes on two cores."""
SLOW = pytest.mark.skipif(not LARGE, reason=WHY)


def comfy_roots() -> list[Path]:
    """The ComfyUIs that this process tests, in whose environment it runs; `tests/run.py` names one."""
    roots = [Path(entry) for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    if not roots:
        raise pytest.UsageError(f"{VARIABLE} names no ComfyUI: run the tests with `python tests/run.py`")
    return roots


def ids_of(roots: Sequence[Path]) -> list[str]:
    """Names of ComfyUIs: the version, with the folder where two have the same."""
    versions = [version_of(root) for root in roots]
    return [
        version if versions.count(version) == 1 else f"{version}-{root.name}-{number}"
        for number, (version, root) in enumerate(zip(versions, roots, strict=True))
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comfy_root" in metafunc.fixturenames:
        roots = comfy_roots()
        metafunc.parametrize("comfy_root", roots, ids=ids_of(roots), scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("compat"):
        folder = Path(__file__).parent
        there = [any(item.path.is_relative_to(folder / name) for name in COMPAT) for item in items]
        config.hook.pytest_deselected(items=[item for item, chosen in zip(items, there, strict=True) if not chosen])
        items[:] = [item for item, chosen in zip(items, there, strict=True) if chosen]


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Wan checkpoint; every ComfyUI reads the same file."""
    from comfy_raylight.tests.host.checkpoints import Job, write

    path = tmp_path_factory.mktemp("checkpoints") / "wan.safetensors"
    write([Job(family="wan", path=path)], comfy_root=comfy_roots()[0])
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="bring the tables of model families up to date")
    parser.addoption("--compat", action="store_true", help="only what says whether the pack works on a ComfyUI")
