"""Plans that were found and proved, kept for the next start: beside all that a proof depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...loaders.content import content_key
from ...raylight.found.plan_data import from_data, to_data
from ...raylight.plan import Plan
from ..wire import standing
from ..wire.node_facts import look

log = logging.getLogger(__name__)

KEPT = 200
"""Files at most; those that were written first go."""
MOST_BYTES = 1 << 22
"""Of a file: what is larger is none of ours."""


def folder() -> Path:
    """Where they are: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "raylight" / "plans"


class KeptPlans:
    """The plans of one model file on this machine, by the kind of call.

    A proof holds for the file's content, the versions of ComfyUI, torch and this pack, and the structure of the model
    and the dtypes of its weights: of anything else there is another name.

    Args:
        paths: the model's files.
    """

    def __init__(self, paths: Sequence[str], model: nn.Module) -> None:
        structure = hashlib.sha256()
        for name, module in model.named_modules():
            structure.update(f"{name} {type(module).__module__}.{type(module).__qualname__}\n".encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            structure.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        pack = look("", str(Path(__file__).resolve().parents[2]))["Raylight"]
        self._about = [content_key(paths), standing.version(), torch.__version__, pack, structure.hexdigest()]

    def get(self, kind: Hashable) -> dict[str, Any] | None:
        """What was kept for a kind of call, its plan as one; None for nothing that can be read."""
        path = self._path(kind)
        try:
            if path.stat().st_size > MOST_BYTES:
                return None
            held = json.loads(path.read_text("utf-8"))
            if held["about"] != self._about or held["kind"] != repr(kind):
                return None
            found = {**held["verdict"], "plan": from_data(held["verdict"]["plan"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.debug("%s is not read: %s", path, error)
            return None
        return found if isinstance(found["plan"], Plan) else None

    def put(self, kind: Hashable, verdict: dict[str, Any]) -> None:
        """Keep a plan that is proved; where that cannot be, it is found again the next time."""
        path = self._path(kind)
        try:
            text = json.dumps(
                {"about": self._about, "kind": repr(kind), "verdict": {**verdict, "plan": to_data(verdict["plan"])}}
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
                file.write(text)
            Path(file.name).replace(path)
            files = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
            for old in files[:-KEPT]:
                old.unlink(missing_ok=True)
        except (OSError, TypeError) as error:
            log.debug("%s is not written: %s", path, error)

    def drop(self, kind: Hashable) -> None:
        """Forget one: a real call was not as it says."""
        path = self._path(kind)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            # it will be contradicted by the next call as well
            log.debug("%s is not deleted: %s", path, error)

    def _path(self, kind: Hashable) -> Path:
        digest = hashlib.sha256("\n".join([*self._about, repr(kind)]).encode()).hexdigest()
        return folder() / f"{digest[:40]}.json"
