"""Files that nodes name: where they are, and what tells that one changed."""

from __future__ import annotations

from collections.abc import Sequence

import folder_paths

from ..loaders.parts import spec_of
from ..raylight.errors import LoadError


def find(folders: Sequence[str], name: str) -> str:
    """The path of a file in one of ComfyUI's folders.

    Raises:
        LoadError: there is none of that name.
    """
    for folder in folders:
        path = folder_paths.get_full_path(folder, name) if folder in folder_paths.folder_names_and_paths else None
        if path is not None:
            return path
    raise LoadError(
        f"There is no model file named {name}",
        f"looked in ComfyUI's folders {' and '.join(folders)}",
        "Put the file there and reload the page, or choose another one",
    )


def changed(folders: Sequence[str], name: str) -> str:
    """A node's IS_CHANGED value for a file: another one for a file that was replaced or overwritten."""
    try:
        spec = spec_of(find(folders, name))
    except LoadError:
        return "missing"
    return " ".join(
        map(str, (spec.size, spec.mtime_ns, spec.inode, *(item for other in spec.others for item in other)))
    )
