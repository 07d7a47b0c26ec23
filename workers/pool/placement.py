"""Which nodes of a cluster get the workers of a pool: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine of a cluster, as Ray counts it.

    Attributes:
        id: Ray's.
        address: under which the others reach it.
        free: workers it can take now: accelerators, or cores for CPU workers, that nobody uses.
        total: and those that it has in all.
    """

    id: str
    address: str
    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.address} ({self.free} of {self.total} free)"


def place(nodes: Sequence[Node], here: str, world: int) -> list[Node]:
    """The node of each rank; [] where there is no room for all.

    One node takes all of them if one can, since what ranks send each other across nodes is slow: this process's own
    first, then the one with the most room. Otherwise nodes are filled one after another in the same order, so that
    neighbours in the mesh are neighbours here.

    Args:
        here: id of this process's node.
    """
    order = sorted(nodes, key=lambda node: (node.id != here, -node.free, node.id))
    for node in order:
        if node.free >= world:
            return [node] * world
    seats = [node for node in order for _ in range(node.free)]
    return seats[:world] if len(seats) >= world else []
