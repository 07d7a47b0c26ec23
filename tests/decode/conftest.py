"""Runs the rank processes once per ComfyUI, and hands their results to the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
EVERYTHING = "RAYLIGHT_TEST_EVERY_VAE"
"""Set it to run all families at all heights; by default those run that show something of their own."""

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Table]:
    """Results of `ranks.main` for a ComfyUI: part, number of ranks, rank, check; computed once each."""
    known: dict[Path, Table] = {}

    def run(root: Path) -> Table:
        if root not in known:
            result = tmp_path_factory.mktemp("decode") / "results.json"
            path = [str(TESTS), str(TESTS.parent / "workers" / "import_root"), os.environ.get("PYTHONPATH", "")]
            chosen = "all" if os.environ.get(EVERYTHING) else ""
            done = subprocess.run(
                [sys.executable, "-B", "-m", "decode.ranks", str(result), str(root), chosen],
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
