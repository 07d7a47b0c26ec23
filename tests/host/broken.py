"""A ComfyUI that is another one on purpose: links to the files of a real one, a few of them changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

UNKNOWN = "0.99.0"
"""A version that nobody has tested."""
OTHER_ROPE = {
    "comfy/ldm/wan/model.py": (
        ("clip_fea=clip_fea, freqs=freqs, transformer", "clip_fea=clip_fea, freqs=freqs.movedim(1, 3), transformer"),
        ("apply_rope1(q, freqs)", "apply_rope1(q, freqs.movedim(3, 1))"),
        ("apply_rope1(k, freqs)", "apply_rope1(k, freqs.movedim(3, 1))"),
    )
}
"""Wan with the tokens of its rope table at another dim: the same pictures, and no plan fits."""
HIDDEN_ATTENTION = {
    "comfy/ldm/omnigen/omnigen2.py": (
        ("skip_reshape=True, transformer_options=transformer_options", "skip_reshape=True"),
    )
}
"""OmniGen2 with attention that nothing can take the place of: right alone, wrong where tokens are divided."""
HIDDEN_WAN = {
    "comfy/ldm/wan/model.py": (
        (
            "            heads=self.num_heads,\n            transformer_options=transformer_options,\n        )",
            "            heads=self.num_heads,\n        )",
        ),
    )
}
"""The same of Wan: its plan fits by all names."""

Edits = Mapping[str, Sequence[tuple[str, str]]]


def tree(root: Path, folder: Path, *edits: Edits, version: str = UNKNOWN) -> Path:
    """Make a ComfyUI of another version in `folder`, which must not exist.

    Args:
        edits: (text, its replacement) by file; each text must be there.
    """
    # folders of its own, since Python takes a module to be where its folder is; links keep what is compiled valid
    shutil.copytree(root, folder, copy_function=os.symlink, ignore=shutil.ignore_patterns("custom_nodes", ".git"))
    for file in root.glob("*.py"):  # where these lie is where ComfyUI looks for itself, links followed
        _write(folder / file.name, file.read_text(encoding="utf-8"))
    _write(folder / "comfyui_version.py", f'__version__ = "{version}"\n')
    for each in edits:
        for name, changes in each.items():
            text = (root / name).read_text(encoding="utf-8")
            for old, new in changes:
                assert old in text, f"{name} has no {old!r}: the edit is for another ComfyUI"
                text = text.replace(old, new)
            _write(folder / name, text)
    (folder / "custom_nodes").mkdir()
    return folder


def _write(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text, encoding="utf-8")
