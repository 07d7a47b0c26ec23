"""The processes of a pool's workers: those that serve it, and those that the next pool can take over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil

from ...raylight.cost import Machine
from ..wire.messages import HostEnvironment, Standing, WorkerPlace
from . import processes


@dataclass
class Member:
    """One worker as the driver sees it."""

    rank: int
    actor: Any
    place: WorkerPlace
    serving: Any
    connection: Connection
    process: psutil.Process | None
    """None on another machine."""
    heartbeat: Any = None
    standing: Standing = field(default_factory=Standing)
    busy: bool = False

    def ended(self) -> bool:
        """Whether its process is known to have ended, as far as that can be told at once."""
        # an idle worker says nothing: what can be read from its connection is the end of it
        if not self.busy and self.connection.poll():
            return True
        # a killed process may hold its connection for some time yet, until the last of its threads has gone
        return self.process is not None and not processes.running(self.process)


@dataclass
class Crew:
    """The workers of a pool as processes, as far as they have been started.

    In one that a pool has left, they have imported everything and hold nothing.

    Attributes:
        environment: what they know of this process.
        actors, places, variables: by rank; the variables are those of the environment that they were started with.
        processes: those on this machine.
        machine: what was measured of them, None for nothing.
    """

    environment: HostEnvironment
    actors: list[Any] = field(default_factory=list)
    places: list[WorkerPlace] = field(default_factory=list)
    processes: list[psutil.Process] = field(default_factory=list)
    variables: list[dict[str, str]] = field(default_factory=list)
    machine: Machine | None = None

    def fitting(self, variables: Sequence[dict[str, str]], environment: HostEnvironment) -> int:
        """How many of them, from rank 0 on, are as workers with these variables would be."""
        if environment != self.environment:
            return 0
        alike = [mine == wanted for mine, wanted in zip(self.variables, variables, strict=False)]
        return alike.index(False) if False in alike else len(alike)
