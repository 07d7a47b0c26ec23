"""Where a model is: the settings of its pool, which all clones and ControlNets of one model have together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...raylight.config import ModelSpec, PoolConfig


class Place:
    """A pool that a user has set."""

    chooses = False
    """Whether the settings change from run to run."""
    told = ""
    """How the last run was shared, where that was chosen, and why."""

    def __init__(self, config: PoolConfig) -> None:
        self._config = config

    @property
    def config(self) -> PoolConfig:
        """The settings of the pool that the model is on now."""
        return self._config

    @property
    def replica(self) -> int:
        """Which data-parallel replica of the pool answers, where that is chosen."""
        return 0

    def prepare(self, model: Any, spec: ModelSpec) -> None:
        """A model without weights (meta_model.build) is about to be loaded here, from this file."""

    def wrappers(self) -> Mapping[str, Callable[..., Any]]:
        """What is to be around ComfyUI's sampling of a model here, by its key."""
        return {}
