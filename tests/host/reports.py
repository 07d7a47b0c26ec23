"""Scripts that check things in a process of their own and write a report: run once per ComfyUI, read by many tests."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.workers.pool.launch import WORKER_SETTINGS

TESTS = Path(__file__).resolve().parents[1]
Report = dict[str, Any]


def reporter(
    script: str,
    folder: Path,
    arguments: Callable[[Path], Sequence[object]] = lambda root: (),
    *,
    timeout: float,
    codes: Collection[int] = (0,),
) -> Callable[[Path | None], Report]:
    """What gives the report of a script for a ComfyUI; a test that asks fails with its log where there is none.

    Args:
        script: a file, or the name of a module below `tests`. It is called with the root of a ComfyUI ("" for
            None), the JSON file to write, and `arguments` of the root.
        folder: for reports and logs.
        timeout: seconds for one run.
        codes: exit codes of a run that has written its report.
    """
    path = [str(TESTS), str(TESTS.parent / "workers" / "import_root"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **WORKER_SETTINGS,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "CUDA_VISIBLE_DEVICES": "",
    }
    start = [script] if script.endswith(".py") else ["-m", script]

    @functools.cache
    def run(root: Path | None) -> Report | str:
        more = arguments(root) if root else ()
        out = folder / f"{len(list(folder.iterdir()))}.json"
        log = out.with_suffix(".log")
        command = [sys.executable, "-B", *start, str(root or ""), str(out), *map(str, more)]
        with log.open("wb") as file:
            code = subprocess.run(
                command, env=environment, stdout=file, stderr=file, timeout=timeout, check=False
            ).returncode
        if code not in codes or not out.is_file():
            return f"the driver ended with {code}:\n{log.read_text(errors='replace')[-4000:]}"
        report: Report = json.loads(out.read_text(encoding="utf-8"))
        return report

    def report_of(root: Path | None) -> Report:
        report = run(root)
        if isinstance(report, str):
            pytest.fail(report)
        return report

    return report_of
