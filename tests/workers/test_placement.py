"""Which machines of a cluster get a pool's workers."""

from __future__ import annotations

import pytest
from comfy_raylight.workers.pool.placement import Node, place


def nodes(**free: int) -> list[Node]:
    return [Node(id=name, address=name, free=count, total=8) for name, count in free.items()]


@pytest.mark.parametrize(
    ("free", "world", "expected"),
    [
        ({"here": 2, "there": 8}, 2, "here here"),
        ({"here": 1, "there": 2}, 2, "there there"),
        ({"here": 0, "a": 2, "b": 4}, 2, "b b"),
        ({"here": 1, "there": 1}, 2, "here there"),
        ({"a": 1, "here": 1, "b": 2}, 4, "here b b a"),
        ({"here": 0, "there": 3}, 4, ""),
        ({"here": 0}, 1, ""),
    ],
)
def test_place(free: dict[str, int], world: int, expected: str) -> None:
    assert [node.id for node in place(nodes(**free), "here", world)] == expected.split()
