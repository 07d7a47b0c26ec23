"""The scripts that measure on GPUs run on CPUs as well, with small models: a rented machine is no place to find out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.conftest import SLOW

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu" / "run.py"
TIMEOUT_S = 900
TOLERANCE = 1e-5


@pytest.mark.timeout(TIMEOUT_S + 60)
@SLOW
def test_every_part_runs(comfy_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "--comfy", str(comfy_root), "--out", str(tmp_path), "--try"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
    )
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    tables: dict[str, list[dict[str, Any]]] = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")
    }
    names = {
        "families",
        "recorded",
        "sampling",
        "models",
        "pool",
        "faults",
        "vae",
        "encoders",
        "weights",
        "loras",
        "gguf",
    }
    assert tables.keys() == names
    assert all(row["failed"] == 0 and row["cases"] > 20 for row in tables["families"] + tables["recorded"])
    assert all(row["recorded"] > row["cases"] / 2 for row in tables["recorded"])
    assert {row["mode"] for row in tables["sampling"]} >= {"plain", "ulysses", "ring", "recorded", "streamed"}
    for name in ("sampling", "models", "pool", "encoders"):
        assert all(row["difference"] <= TOLERANCE for row in tables[name]), tables[name]
    assert {row["fault"]: row["equal bits"] for row in tables["faults"]} == {"cancel": True, "kill a worker": True}
    assert all(row["equal bits"] for row in tables["loras"])
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report.count("\n## ") == 8 and "(failed with" not in report
