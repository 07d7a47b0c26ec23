"""Raylight: one picture or video on several GPUs at once, as ComfyUI nodes.

ComfyUI imports this file under a name made from its path. Everything else is imported under one name,
`comfy_raylight`, here, in the workers and in tests; `workers/import_root` holds what makes that so.
Nothing of ComfyUI is imported before ComfyUI asks for the mappings.
"""

import sys
from pathlib import Path
from typing import Any

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

WEB_DIRECTORY = "./web"
"""Help pages, and what the page needs of this pack."""

_COMFYUI = ("comfy", "execution", "folder_paths", "latent_preview", "nodes")
"""How the names of ComfyUI's modules begin that the pack imports."""

_IMPORT_ROOT = str(Path(__file__).resolve().parent / "workers" / "import_root")
if _IMPORT_ROOT not in sys.path:
    sys.path.append(_IMPORT_ROOT)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import comfy_raylight.nodes
    except (ImportError, AttributeError) as error:
        missing = error.name if isinstance(error, ImportError) else "comfy"
        if (missing or "").startswith(_COMFYUI):
            from comfy_raylight.workers.wire import standing

            standing.announce()
        raise

    return getattr(comfy_raylight.nodes, name)
