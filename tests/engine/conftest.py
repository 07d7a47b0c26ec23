"""Runs the rank processes once per session, and hands their tables of results to the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests import conftest as shared
from comfy_raylight.tests.host.reports import reporter

TIMEOUT_S = 1800


def comfy_roots() -> list[Any]:
    """The ComfyUIs of this process as parameters, named as everywhere."""
    roots = shared.comfy_roots()
    return [pytest.param(str(root), id=name) for root, name in zip(roots, shared.ids_of(roots), strict=True)]


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Results of `ranks.main` for a ComfyUI root, or "" for the collectives: computed once each."""
    # 1 where a case is wrong, which is that case's test to say
    report = reporter("engine.ranks", tmp_path_factory.mktemp("ranks"), timeout=TIMEOUT_S, codes=(0, 1))
    return lambda root: report(Path(root) if root else None)
