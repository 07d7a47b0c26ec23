"""Nothing of the engine makes the host wait for a device, and models whose own code does are known.

A wait costs a step of a GPU its lead, and a call that has one in it cannot be recorded (workers/worker/recorded.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.patches.registry import ASKING

from . import verdicts
from .conftest import comfy_roots
from .families import CASES

pytestmark = pytest.mark.timeout(2000)  # it may be the first to want the ranks' results
PACK = Path(__file__).resolve().parents[2]
MAY_ASK = {
    "raylight/sequence/attention.py:_here",  # whether a user's override failed on a rank that has heads
    "raylight/sequence/overrides.py:local",  # whether it drew random numbers
    "raylight/rows/row_hooks.py:_test",  # the self-test before a UNet's first call
}
"""The first two where a call has a function of the user's in it, which is never recorded anyway."""


def watched(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """The names of cases and what was seen of them, on every mesh."""
    for ranks in results["ranks"].values():
        for name, modes in verdicts.tables_of(ranks)[0].items():
            yield from ((name, result) for result in modes.values() if "asked" in result)


@pytest.mark.parametrize("root", comfy_roots())
def test_the_engine_asks_a_device_for_nothing(run_ranks: Any, root: str) -> None:
    found = list(watched(run_ranks(root)))
    assert len({name for name, _ in found}) > 100
    places = {Path(place) for _, result in found for place in result["asked"] + result["brought"]}
    folders = [PACK / name for name in ("raylight", "patches", "workers")]
    ours = {place.relative_to(PACK).as_posix() for place in places if any(map(place.is_relative_to, folders))}
    assert ours <= MAY_ASK
    assert ours, "what may ask is seen, where overrides do"


@pytest.mark.parametrize("root", comfy_roots())
def test_families_that_ask_are_known(run_ranks: Any, root: str) -> None:
    family = {case.name: case.family for case in CASES}
    comfy = Path(root, "comfy").resolve()
    asking = {
        family[name]
        for name, result in watched(run_ranks(root))
        if any(Path(place).is_relative_to(comfy) for place in result["asked"])
    }
    assert asking <= ASKING.keys()
    assert {"HiDreamImageTransformer2DModel", "HunYuanDiTPlain"} <= asking, "they always do"
    text = (PACK / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert not [name for name in ASKING if f"`{name}`" not in text]
