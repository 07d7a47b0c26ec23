"""Checks numbers that ComfyUI lets through: NaN passes its comparisons, and a value from another node has none."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from ..raylight.errors import ConfigError

Specs = Mapping[str, tuple[Any, Mapping[str, Any]]]
"""Inputs by name, as INPUT_TYPES has them: a type, and its options."""


def check(specs: Specs, values: Mapping[str, Any]) -> None:
    """Whether the values, all of them numbers with a least and a largest one, lie there.

    Raises:
        ConfigError: one does not; the message names it.
    """
    for name, value in values.items():
        options = specs[name][1]
        low, high = options["min"], options["max"]
        if not low <= value <= high:
            raise ConfigError(
                f"{name} is not a number that it can be", reprlib.repr(value), f"Use a number from {low:g} to {high:g}"
            )
