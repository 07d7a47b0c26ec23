"""The test command: set up, lint, format, types, tests on every ComfyUI.

    python tests/run.py [pytest arguments]

Each ComfyUI is tested by a pytest in that one's own environment: the newest with all tests, the others with those that
show whether the pack works there (COMPAT in conftest.py); RAYLIGHT_TEST_LARGE=1 runs all tests on all of them.
Standard library only: the tools are those of the environments that `host/setup.py` makes.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from host import setup
from host.large import LARGE

NOTHING_CHOSEN = 5
"""Exit code of pytest where the arguments choose no test."""


def main() -> int:
    """Run every check, then the tests on every ComfyUI, and return the exit code of the first that fails."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        tool = [str(setup.ensure()), "-m"]
        newest, *others = setup.hosts()
    except setup.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    for name, command in {
        "lint": ["ruff", "check"],
        "format": ["ruff", "format", "--check"],
        "types": ["mypy"],
    }.items():
        if code := step(name, [*tool, *command]):
            return code
    codes = [test(newest, sys.argv[1:])]
    for root in others:
        code = test(root, sys.argv[1:] if LARGE else ["--compat", *sys.argv[1:]])
        # arguments may choose tests that the other ComfyUIs are not asked for
        codes.append(0 if code == NOTHING_CHOSEN else code)
    return next((code for code in codes if code), 0)


def test(root: Path, arguments: Sequence[str]) -> int:
    """Run tests on one ComfyUI, in its environment; pytest's exit code, or 1 where that cannot be made."""
    try:
        python = setup.ensure(root)
    except setup.SetupError as error:
        print(f"ComfyUI {setup.version_of(root)} at {root}: {error}", file=sys.stderr)
        return 1
    name = f"tests on ComfyUI {setup.version_of(root)} at {root}"
    return step(name, [str(python), "-m", "pytest", *arguments], {"RAYLIGHT_TEST_COMFY": str(root)})


def step(name: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
    """Run a command and say how it went; its exit code."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, cwd=setup.ROOT, env={**os.environ, **(variables or {})}, check=False).returncode
    print(f"== {name}: {'failed' if code else 'passed'}, {time.monotonic() - start:.1f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
