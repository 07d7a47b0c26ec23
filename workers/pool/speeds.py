"""How fast the workers of a pool are beside each other: their parts of a model call are in proportion to that."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...raylight.errors import ConfigError
from ..wire.messages import WorkerPlace
from ..wire.rates import Rates

VARIABLE = "RAYLIGHT_SPEEDS"
"""Environment variable: relative speeds of the workers, separated by commas, in place of what is measured."""
ALIKE = 1.1
"""A device that is faster by less than this is as fast: measurements vary by as much."""
MOST = 100.0


def asked(world: int) -> tuple[float, ...]:
    """What the variable says of so many workers; () where it is not set, or says that they are alike, and for one.

    Raises:
        ConfigError: it is no list of that many speeds.
    """
    text = os.environ.get(VARIABLE, "")
    if not text or world == 1:  # Load Model (all GPUs) may take one of them
        return ()
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if len(found) != world or not all(1 / MOST <= speed <= MOST for speed in found):
        raise ConfigError(
            f"{VARIABLE} is not a list of speeds, one for each worker",
            f"{text!r}, for {world} workers",
            f"Set it to {world} numbers of {1 / MOST:g} to {MOST:g}, separated by commas, or unset it",
        )
    return found if len(set(found)) > 1 else ()


def differ(places: Sequence[WorkerPlace]) -> bool:
    """Whether the workers' devices are of several kinds, so that it is worth while to measure them."""
    return len({place.device_name for place in places}) > 1


def measured(rates: Sequence[Rates]) -> tuple[float, ...]:
    """Speeds beside the fastest worker's, for calls that spend as long in linear layers as in attention; () for alike.

    Args:
        rates: of each worker, by rank.
    """
    linear, attention = max(each.linear for each in rates), max(each.attention for each in rates)
    slowness = [linear / each.linear + attention / each.attention for each in rates]
    found = tuple(round(min(slowness) / each, 2) for each in slowness)
    return found if max(found) > ALIKE * min(found) else ()


def described(speeds: Sequence[float]) -> str:
    """For the log."""
    return " : ".join(f"{speed:g}" for speed in speeds)
