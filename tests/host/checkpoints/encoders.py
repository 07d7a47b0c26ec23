"""Writes text encoder files: random weights for ComfyUI's own classes, which have one size each.

python tests/host/checkpoints/encoders.py ROOT KIND FILE [KIND FILE ...]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

CLASSES: Mapping[str, tuple[str, str]] = {
    "clip_l": ("comfy.sd1_clip", "SDClipModel"),
    "clip_g": ("comfy.sdxl_clip", "SDXLClipG"),
    "t5_base": ("comfy.text_encoders.sa_t5", "T5BaseModel"),
    "qwen3_06b": ("comfy.text_encoders.anima", "Qwen3_06BModel"),
    "t5_xxl": ("comfy.text_encoders.sd3_clip", "T5XXLModel"),
}
"""By kind; with 0.2, 1.4, 0.2, 1.2 and 9.5 GB of float16."""


def write_encoders(files: Mapping[Path, str], *, comfy_root: Path, python: Path | None = None) -> None:
    """Write those that do not exist yet, in a process of its own, since `comfy` can be imported once.

    Args:
        files: kinds by path.
        python: interpreter with ComfyUI's packages, by default the running one.
    """
    missing = {path: kind for path, kind in files.items() if not path.is_file()}
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python or sys.executable), str(Path(__file__).resolve()), str(comfy_root)]
    command += [word for path, kind in missing.items() for word in (kind, str(path))]
    if missing:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"no text encoders for {comfy_root}:\n{done.stderr[-3000:]}")


def main(root: str, *files: str) -> None:
    """Write them."""
    package = Path(__file__).resolve().parent
    sys.path[:1] = [root, str(package.parent)]
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import importlib

    import torch
    from checkpoints.make import fill
    from safetensors.torch import save_file

    for number, (kind, path) in enumerate(zip(files[::2], files[1::2], strict=True)):
        module, name = CLASSES[kind]
        with torch.device("meta"):
            encoder = getattr(importlib.import_module(module), name)(device="meta", dtype=torch.float16)
        partial = Path(path).with_suffix(".partial")
        save_file(fill(encoder.transformer, None, dtype=torch.float16, seed=number), partial)
        partial.replace(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
