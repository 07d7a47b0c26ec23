"""Runs the rank processes once per ComfyUI, and hands their results to the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.reports import reporter

from .files import write

TIMEOUT_S = 1800

Table = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Table]:
    """Results of `ranks.main` for a ComfyUI: part, number of ranks, rank, check; computed once each."""
    chosen = ["all"] if LARGE else []
    return reporter("decode.ranks", tmp_path_factory.mktemp("decode"), lambda root: chosen, timeout=TIMEOUT_S)


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Any]]:
    """Results of `pooled.main` for a ComfyUI, computed once each."""

    def files(root: Path) -> list[Path]:
        folder = tmp_path_factory.mktemp("vaes")
        write(folder, comfy_root=root)
        return [folder]

    return reporter("decode.pooled", tmp_path_factory.mktemp("pooled"), files, timeout=TIMEOUT_S)
