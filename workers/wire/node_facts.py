"""What a machine of a cluster has, told by a process on it that knows nothing of this pack.

Sent to other machines by value: only the standard library, and no relative imports.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import socket
from pathlib import Path

ROOMS = ("loaders", "patches", "raylight", "vae", "workers")
"""Folders of the pack whose code runs in workers."""


def look(comfy_root: str, pack_root: str) -> dict[str, str]:
    """By name: `host`, `cores`, and the versions that must be the same everywhere, "" for what is not there.

    Args:
        comfy_root: where ComfyUI should be.
        pack_root: where this pack should be.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "host": socket.gethostname(),
        "cores": str(usable or 1),
        "ComfyUI": _comfyui(Path(comfy_root)),
        "Raylight": _pack(Path(pack_root)),
        "PyTorch": _package("torch"),
    }


def _comfyui(root: Path) -> str:
    try:
        found = re.search(r"""__version__\s*=\s*["']([^"']+)""", (root / "comfyui_version.py").read_text("utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


def _pack(root: Path) -> str:
    """A digest of the code: two states of a checkout have the same version number."""
    content = hashlib.sha256()
    files = sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
    for path in files:
        content.update(path.relative_to(root).as_posix().encode())
        content.update(path.read_bytes())
    return content.hexdigest()[:12] if files else ""


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
