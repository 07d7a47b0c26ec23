"""Scripts that check things in a process of their own and write a report: run once per ComfyUI, read by many tests."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Report = dict[str, Any]


def reporter(
    script: str, folder: Path, arguments: Callable[[Path], Sequence[object]], *, timeout: float
) -> Callable[[Path], Report]:
    """What gives the report of a script for a ComfyUI; a test that asks fails with its log where there is none.

    Args:
        script: called with the root of a ComfyUI, the JSON file to write, and `arguments` of the root.
        folder: for reports and logs.
        timeout: seconds for one run.
    """

    @functools.cache
    def run(root: Path) -> Report | str:
        more = arguments(root)
        out = folder / f"{len(list(folder.iterdir()))}.json"
        log = out.with_suffix(".log")
        with log.open("wb") as file:
            command = [sys.executable, script, str(root), str(out), *map(str, more)]
            code = subprocess.run(command, stdout=file, stderr=file, timeout=timeout, check=False).returncode
        if code:
            return f"the driver ended with {code}:\n{log.read_text(errors='replace')[-4000:]}"
        report: Report = json.loads(out.read_text(encoding="utf-8"))
        return report

    def report_of(root: Path) -> Report:
        report = run(root)
        if isinstance(report, str):
            pytest.fail(report)
        return report

    return report_of
