"""Runs the rank processes once per session, and hands their tables of results to the tests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.host.reports import reporter

TIMEOUT_S = 1800


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
    # 1 where a case is wrong, which is that case's test to say
    report = reporter("engine.ranks", tmp_path_factory.mktemp("ranks"), timeout=TIMEOUT_S, codes=(0, 1))
    return lambda root: report(Path(root) if root else None)
