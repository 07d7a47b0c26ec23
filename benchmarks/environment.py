"""What every benchmark starts with: the test environment, and a quiet ComfyUI in this process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from host import setup  # noqa: E402  (tests/ is on the path now)


def enter(comfy: Path | None) -> int | None:
    """Be in a ComfyUI's environment with it booted, and return None; else run this command there for its exit code.

    Args:
        comfy: root of a ComfyUI; None is the test host.
    """
    code = within(comfy)
    if code is None:
        boot((comfy or setup.COMFY).resolve())
    return code


def within(comfy: Path | None) -> int | None:
    """As `enter`, for what starts ComfyUI in a process of its own."""
    if comfy is not None and not ((comfy / "main.py").is_file() and (comfy / "comfy").is_dir()):
        print(f"--comfy names {comfy}, which holds no ComfyUI (no main.py and comfy/). Correct it.", file=sys.stderr)
        return 1
    root = comfy or setup.COMFY
    if setup.inside(root):
        return None
    try:
        setup.ensure()
        python = setup.ensure(root)
    except setup.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(python), *sys.argv], env=environment, check=False).returncode


def within_browser(comfy: Path | None) -> int | None:
    """As `within`, for what opens ComfyUI's page: without a Chromium it ends here."""
    code = within(comfy)
    if code is not None:
        return code
    from browser.canvas import NO_CHROMIUM, chromium

    if chromium():
        return None
    print(NO_CHROMIUM, file=sys.stderr)
    return 1


def boot(root: Path) -> None:
    """Make this process a quiet ComfyUI on the CPU, with one thread and the pack on its path."""
    sys.argv = [sys.argv[0], "--cpu"]
    # the folder of tests would hide packages of ComfyUI
    sys.path.remove(str(ROOT / "tests"))
    sys.path.insert(0, str(root))
    sys.path.append(str(ROOT / "workers" / "import_root"))
    logging.disable(logging.WARNING)
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_num_threads(1)
