"""Runs the rank processes once per session, and hands their tables of results to the tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]


def comfy_roots() -> list[Any]:
    """The ComfyUI roots that RAYLIGHT_TEST_COMFY lists, named by their version."""
    found = []
    for index, root in enumerate(filter(None, os.environ.get("RAYLIGHT_TEST_COMFY", "").split(os.pathsep))):
        version = Path(root, "comfyui_version.py")
        match = re.search(r'__version__ = "([^"]+)"', version.read_text() if version.is_file() else "")
        found.append(pytest.param(root, id=match[1] if match else f"comfy{index}"))
    return found


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Results of `ranks.main` for a ComfyUI root, or "" for the collectives: computed once each."""
    known: dict[str, dict[str, Any]] = {}

    def run(root: str) -> dict[str, Any]:
        if root not in known:
            result = tmp_path_factory.mktemp("ranks") / "results.json"
            path = [str(TESTS), str(TESTS.parent / "workers" / "import_root"), os.environ.get("PYTHONPATH", "")]
            done = subprocess.run(
                [sys.executable, "-B", "-m", "engine.ranks", str(result), *([root] if root else [])],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "CUDA_VISIBLE_DEVICES": ""},
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=1800,
            )
            assert done.returncode == 0, done.stdout
            known[root] = json.loads(result.read_text())
        return known[root]

    return run
