"""The test command: set up, lint, format, types, tests.

    python tests/run.py [pytest arguments]

Standard library only: the tools are those of the environment that `host/setup.py` makes.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

from host import setup


def main() -> int:
    """Run every step in order and return the exit code of the first that fails."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        tool = [str(setup.ensure()), "-m"]
        hosts = os.pathsep.join(map(str, setup.hosts()))
    except setup.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    environment = {**os.environ, "RAYLIGHT_TEST_COMFY": hosts}
    steps = {
        "lint": ["ruff", "check"],
        "format": ["ruff", "format", "--check"],
        "types": ["mypy"],
        "tests": ["pytest", *sys.argv[1:]],
    }
    for name, command in steps.items():
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        code = subprocess.run([*tool, *command], cwd=setup.ROOT, env=environment, check=False).returncode
        seconds = time.monotonic() - start
        print(f"== {name}: {'failed' if code else 'passed'}, {seconds:.1f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
