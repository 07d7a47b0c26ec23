"""Names of Ray that are not public: looked up where they are used, since a new Ray may not have them."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from ...raylight.errors import ConfigError


def private(path: str, *, use: str) -> Any:
    """What Ray has under a path of module and name.

    Args:
        use: what it is needed for, for the message.

    Raises:
        ConfigError: this Ray does not have it.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"Raylight does not know Ray {metadata.version('ray')}",
            f"it has no {path}, by which Raylight {use}",
            "Install a version of Ray that Raylight's requirements.txt allows, and restart ComfyUI",
        ) from error
