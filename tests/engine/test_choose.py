"""The choice of cards: a table of situations, and what holds in all of them, against a search of its own."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from comfy_raylight.raylight import cost, packing
from comfy_raylight.raylight.choice.choose import CHANGE_S, SLOWER, START_S, Choice, Layout, Situation, choose

GB = 10**9
GAMING = cost.RATES["cuda"]
H200 = replace(GAMING, linear=5.6e14, attention=5.4e14, link=2.55e11, latency=3e-5, call=5e-3)
CPU = cost.RATES["cpu"]
SLOW_LINK = replace(GAMING, link=1e8, latency=5e-3)

WAN = cost.Work(tokens=32760, width=5120, blocks=40, weights=3.5e8, context=512, out=64, heads=40)
FLUX = cost.Work(tokens=4608, width=3072, blocks=57, weights=1.1e8, heads=24)
SMALL = replace(FLUX, tokens=320)
SDXL = (
    cost.Work(tokens=4096, width=640, blocks=10, weights=7e6, out=1, heads=10),
    cost.Work(tokens=1024, width=1280, blocks=60, weights=2.6e7, out=1, heads=20),
    cost.Work(tokens=4096, width=0, blocks=40, weights=6e6),
)
"""At 1024 x 1024, roughly: attentions on two levels, and convolutions."""
WAN_WEIGHTS: dict[str, Any] = dict(blocks=(700_000_000,) * 40, outside=600_000_000)
FLUX_WEIGHTS: dict[str, Any] = dict(blocks=(410_000_000,) * 57, outside=400_000_000)
SDXL_WEIGHTS: dict[str, Any] = dict(blocks=(70_000_000,) * 70, outside=200_000_000)


def wan(count: int, free: int = 140, **more: Any) -> Situation:
    given: dict[str, Any] = dict(machine=H200, works=(WAN,), most=10**6, rings=True, activations=4 * GB, **WAN_WEIGHTS)
    return Situation(count=count, free=(free * GB,) * count, **{**given, **more})


def flux(count: int, free: int = 140, **more: Any) -> Situation:
    given: dict[str, Any] = dict(machine=H200, works=(FLUX,), most=10**6, rings=True, activations=2 * GB)
    return Situation(count=count, free=(free * GB,) * count, **{**given, **FLUX_WEIGHTS, **more})


def sdxl(count: int, free: int = 24, **more: Any) -> Situation:
    given: dict[str, Any] = dict(machine=GAMING, works=SDXL, most=32, activations=3 * GB, **SDXL_WEIGHTS)
    return Situation(count=count, free=(free * GB,) * count, **{**given, **more})


def cpu(count: int, work: cost.Work, **more: Any) -> Situation:
    given: dict[str, Any] = dict(machine=CPU, works=(work,), most=10**6, rings=True)
    return Situation(count=count, **{**given, **more})


def unknown(count: int, **more: Any) -> Situation:
    """A family that has no plan."""
    given: dict[str, Any] = dict(machine=GAMING, free=(24 * GB,) * count, outside=8 * GB)
    return Situation(count=count, **{**given, **more})


BOTH = (1, 1)
ONE = dict(cfg=1, ulysses=1, ring=1, residency="resident")


def way(cfg: int = 1, ulysses: int = 1, ring: int = 1, residency: str = "resident") -> dict[str, Any]:
    return dict(cfg=cfg, ulysses=ulysses, ring=ring, residency=residency)


TABLE: dict[str, tuple[Situation, dict[str, Any]]] = {
    "one card": (wan(1), ONE),
    "video, two, cfg 1": (wan(2), way(ulysses=2)),
    "video, three, cfg 1": (wan(3), way(ulysses=3)),
    "video, four, cfg 1": (wan(4), way(ulysses=4)),
    "video, eight, cfg 1": (wan(8), way(ulysses=8)),
    "video, two, cfg 5": (wan(2, conditions=BOTH), way(cfg=2)),
    "video, four, cfg 5": (wan(4, conditions=BOTH), way(cfg=2, ulysses=2)),
    "video, six, cfg 5": (wan(6, conditions=BOTH), way(cfg=2, ulysses=3)),
    "video, eight, cfg 5": (wan(8, conditions=BOTH), way(cfg=2, ulysses=4)),
    "video, three lists of conditions, three": (wan(3, conditions=(1, 1, 1)), way(cfg=3)),
    "video, three lists of conditions, six": (wan(6, conditions=(1, 1, 1)), way(cfg=3, ulysses=2)),
    "gaming cards, video, two": (wan(2, machine=GAMING), way(ulysses=2)),
    "gaming cards, video, two, cfg 5": (wan(2, machine=GAMING, conditions=BOTH), way(cfg=2)),
    "gaming cards, video, four, cfg 5": (wan(4, machine=GAMING, conditions=BOTH), way(cfg=2, ulysses=2)),
    "slow links, video, two": (wan(2, machine=SLOW_LINK), ONE),
    "slow links, video, two, cfg 5": (wan(2, machine=SLOW_LINK, conditions=BOTH), way(cfg=2)),
    "slow links, video, four, cfg 5": (wan(4, machine=SLOW_LINK, conditions=BOTH), way(cfg=2)),
    "more cards than heads": (
        wan(8, works=(replace(WAN, heads=4),), conditions=(1,)),
        way(ulysses=4, ring=2),
    ),
    "28 GB on two of 24": (wan(2, free=24, machine=GAMING), way(ulysses=2, residency="sharded")),
    "28 GB on four of 24": (wan(4, free=24, machine=GAMING), way(ulysses=4, residency="sharded")),
    "28 GB on one of 24": (wan(1, free=24, machine=GAMING), way(residency="streamed")),
    "28 GB on two of 36": (wan(2, free=36, machine=GAMING), way(ulysses=2)),
    "28 GB on two of 12": (wan(2, free=12, machine=GAMING), way(ulysses=2, residency="streamed")),
    "picture on H200, Python waits": (flux(2), ONE),
    "picture on H200, recorded": (flux(2, records=True), way(ulysses=2)),
    "picture on H200, recorded but over soon": (flux(2, records=True, steps=4), ONE),
    "picture on gaming cards": (flux(2, machine=GAMING), way(ulysses=2)),
    "picture on gaming cards of 24": (flux(2, free=24, machine=GAMING), way(ulysses=2, residency="sharded")),
    "small picture": (flux(4, works=(SMALL,)), ONE),
    "small picture, recorded, cfg 5": (flux(2, works=(SMALL,), records=True, conditions=BOTH), way(cfg=2)),
    "small picture, Python waits, cfg 5": (flux(2, works=(SMALL,), conditions=BOTH), ONE),
    "SDXL, one condition, eager": (sdxl(2), ONE),
    "SDXL, two, cfg 7, recorded": (sdxl(2, conditions=BOTH, records=True), way(cfg=2)),
    "SDXL, four, cfg 7, recorded, fast links": (
        sdxl(4, machine=H200, conditions=BOTH, records=True, steps=200),
        way(cfg=2),
    ),
    "a part of the rows only": (sdxl(4, most=1, records=True), ONE),
    "no plan, cfg 1": (unknown(4), ONE),
    "no plan, cfg 5": (unknown(4, conditions=BOTH), way(cfg=2)),
    "no plan, three cards, cfg 5": (unknown(3, conditions=BOTH), way(cfg=2)),
    "cores, few tokens": (cpu(2, replace(WAN, tokens=24, width=256, blocks=4, weights=1e6, heads=4)), ONE),
    "cores, many tokens": (
        cpu(2, replace(WAN, tokens=4096, width=256, blocks=4, weights=1e6, heads=4)),
        way(ulysses=2),
    ),
    "cores, cfg 5": (
        cpu(2, replace(WAN, tokens=64, width=256, blocks=4, weights=1e6, heads=4), conditions=BOTH),
        way(cfg=2),
    ),
    "memory, two": (wan(2, goal="memory"), way(ulysses=2, residency="streamed")),
    "speed, recorded": (flux(8, records=True, steps=100, goal="speed"), way(ulysses=8)),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str) -> None:
    situation, expected = TABLE[name]
    layout = choose(situation).layout
    assert {key: getattr(layout, key) for key in expected} == expected, str(choose(situation))
    assert_right(situation, choose(situation))


def test_there_are_enough() -> None:
    assert len(TABLE) >= 40


def some(number: int) -> Situation:
    """A situation of all kinds by chance."""
    draw = random.Random(number)
    count = draw.choice((1, 2, 3, 4, 5, 6, 8))
    blocks = draw.choice((WAN_WEIGHTS, FLUX_WEIGHTS, SDXL_WEIGHTS, dict(blocks=(), outside=9 * GB)))
    works = draw.choice(((WAN,), (FLUX,), (SMALL,), SDXL, ()))
    made = Situation(
        count=count,
        machine=draw.choice((GAMING, H200, CPU, SLOW_LINK)),
        works=works,
        most=1 if not works else draw.choice((1, 2, 32, 10**6)),
        rings=draw.random() < 0.5,
        conditions=draw.choice(((1,), (1, 1), (2, 1), (1, 1, 1), (3,))),
        steps=draw.choice((1, 4, 20, 50)),
        activations=draw.choice((0, 2, 8)) * GB,
        records=draw.random() < 0.5,
        free=tuple(draw.choice((4, 12, 24, 48, 140)) * GB for _ in range(count)) if draw.random() < 0.8 else (),
        goal=draw.choice(("auto", "speed", "memory")),
        **blocks,
    )
    if draw.random() < 0.5:
        return replace(made, present=choose(replace(made, conditions=(1,), goal="auto")).layout, loaded=True)
    return made


def test_by_chance() -> None:
    kept = shared = 0
    for number in range(600):
        situation = some(number)
        choice = choose(situation)
        assert_right(situation, choice)
        kept += choice.kept
        shared += len(choice.layout.cards) > 1
    assert kept > 10 and shared > 100


def seconds(situation: Situation, cfg: int, ulysses: int, ring: int, residency: str) -> float:
    """A step, the long way."""
    shares = [situation.conditions[number::cfg] for number in range(cfg)]
    if not situation.works:
        return float(max(map(sum, shares)))

    def one(rows: int, machine: cost.Machine) -> float:
        plain = cost.seconds(
            [replace(work, batch=rows * work.batch) for work in situation.works], machine, ulysses=ulysses, ring=ring
        )
        ranks, late = ulysses * ring, 0.0
        for size in situation.blocks if residency != "resident" else ():
            gather = size * (ranks - 1) / ranks / machine.link + (machine.latency if ranks > 1 else 0)
            bus = size / ranks / machine.bus if residency == "streamed" else 0
            late += max(0, gather + bus - plain / len(situation.blocks))
        return plain + late

    slow = max(one(sum(share), situation.machine) for share in shares)
    if not (situation.records and residency == "resident"):
        return slow
    fast = max(one(sum(share), situation.machine.repeating()) for share in shares)
    calls = [slow] * min(4, situation.steps) + [fast] * max(0, situation.steps - 4)
    return sum(calls) / len(calls)


def held(situation: Situation, ranks: int, residency: str) -> int:
    """Bytes of weights on a card."""
    if residency == "resident" or not situation.blocks:
        return situation.outside + sum(situation.blocks)
    parts = [math.ceil(size / ranks / packing.ALIGN) * packing.ALIGN for size in situation.blocks]
    largest = max(parts)
    room = 2 * largest * ranks if len(parts) > 1 else largest * ranks
    return situation.outside + room + (sum(parts) if residency == "sharded" else 2 * largest)


def every(situation: Situation) -> Iterator[tuple[tuple[int, int, int, str], float, int, bool]]:
    """All ways, their seconds and bytes, and whether some of the cards can hold them."""
    count, rings = situation.count, range(1, situation.count + 1) if situation.rings else (1,)
    whole = held(situation, 1, "resident")
    for cfg, ulysses, ring in itertools.product(range(1, count + 1), range(1, count + 1), rings):
        ranks, size = ulysses * ring, cfg * ulysses * ring
        if size > count or cfg > len(situation.conditions) or ranks > situation.most:
            continue
        if ring > 1 and not ranks > min(work.heads for work in situation.works if work.width) > 0:
            continue
        for residency in ("resident", "sharded", "streamed"):
            needs = held(situation, ranks, residency)
            if residency != "resident" and (not situation.free or needs >= whole):
                continue
            if residency == "sharded" and ranks == 1:
                continue
            parts = [situation.free[at : at + size] for at in range(0, count, size)]
            if count % size:
                parts = [tuple(sorted(situation.free)[::-1][:size])]
            room = max((min(part) for part in parts if part), default=None)
            fits = room is None or not situation.free or needs + situation.activations <= room
            yield (cfg, ulysses, ring, residency), seconds(situation, cfg, ulysses, ring, residency), needs, fits


def assert_right(situation: Situation, choice: Choice) -> None:
    """What holds of every choice."""
    layout = choice.layout
    found = {way: (took, needs, fits) for way, took, needs, fits in every(situation)}
    took, needs, _ = found[layout.way]
    assert choice.best.seconds == pytest.approx(took) and choice.best.bytes == needs
    assert layout.world in (situation.count, len(layout.cards)) and max(layout.cards) < situation.count
    if layout.world == situation.count:
        size = len(layout.cards)
        assert layout.cards == tuple(range(layout.cards[0], layout.cards[0] + size)) and layout.cards[0] % size == 0
    fitting = {way: it for way, it in found.items() if it[2]}
    if situation.free:
        inside = needs + situation.activations <= min(situation.free[card] for card in layout.cards)
        assert inside or not fitting, "a choice violates no memory bound that another one holds"
        assert choice.best.fits == inside
    if not fitting:
        assert needs == min(it[1] for it in found.values())
        return
    alone = min((it[0] for way, it in fitting.items() if way[0] * way[1] * way[2] == 1), default=None)
    if alone is not None:
        assert took <= SLOWER * alone * 1.0001, "never slower than one card"
    allowed = [it for it in fitting.values() if alone is None or it[0] <= SLOWER * alone]
    if choice.kept:
        assert layout == situation.present
        return
    if situation.goal == "memory":
        assert needs == min(it[1] for it in allowed)
    elif situation.goal == "speed":
        assert took == pytest.approx(min(it[0] for it in allowed))
    else:
        fastest = min(it[0] for it in allowed)
        assert took <= SLOWER * fastest * 1.0001
        fewer = [
            way
            for way, it in fitting.items()
            if it[0] <= SLOWER * fastest and way[0] * way[1] * way[2] < len(layout.cards)
        ]
        assert not fewer, "the fewest cards of those that are as fast"


def test_the_best_card() -> None:
    """One card computes: that with most room, and every worker stays."""
    situation = flux(4, works=(SMALL,), free=140)
    layout = choose(replace(situation, free=(24 * GB, 60 * GB, 140 * GB, 60 * GB))).layout
    assert layout == Layout(world=4, cards=(2,))


def test_a_part_of_the_cards() -> None:
    """Where they cannot be divided, those with most room do it, in a pool of their own."""
    layout = choose(wan(3, machine=SLOW_LINK, conditions=BOTH)).layout
    assert layout == Layout(world=2, cards=(0, 1), cfg=2)
    free = (40 * GB, 140 * GB, 140 * GB)
    assert choose(replace(wan(3, machine=SLOW_LINK, conditions=BOTH), free=free)).layout.cards == (1, 2)


def test_a_change_that_costs_more_than_it_gains() -> None:
    """Few steps of a small gain leave the pool as it is; many do not."""
    present = Layout(world=2, cards=(0, 1), ulysses=2)
    work = replace(FLUX, tokens=2048)
    short = flux(2, machine=GAMING, works=(work,), conditions=BOTH, present=present, steps=1)
    gain = seconds(short, 1, 2, 1, "resident") - seconds(short, 2, 1, 1, "resident")
    assert 0 < gain < CHANGE_S
    assert choose(short).layout == present and choose(short).kept
    assert "kept" in str(choose(short))
    enough = replace(short, steps=math.ceil(CHANGE_S / gain) + 1)
    assert choose(enough).layout.way == (2, 1, 1, "resident")
    # weights that lie on the cards would be read again
    assert choose(replace(enough, loaded=True)).kept
    # a slower present that is not slower than one card is no reason to stay for ever
    assert not choose(replace(short, loaded=True, steps=1000)).kept


def test_workers_that_are_not_there_take_time() -> None:
    present = Layout(world=2, cards=(0, 1), cfg=2)
    situation = wan(3, present=present, steps=1, machine=GAMING)
    gain = seconds(situation, 1, 1, 1, "resident") - seconds(situation, 1, 3, 1, "resident")
    assert gain > START_S
    assert choose(situation).layout.world == 3


def test_what_it_says() -> None:
    told = str(choose(wan(4, conditions=BOTH)))
    assert told.startswith("cfg 2 x ulysses 2 on cards 0, 1, 2, 3: ")
    assert "times the speed of one card" in told and "next best: " in told
    assert "does not fit on one card" in str(choose(wan(4, free=20, blocks=(5 * GB,) * 4)))
    assert "no way fits" in str(choose(wan(2, free=1)))
    assert "not known" in str(choose(unknown(2)))
    assert str(choose(wan(1))).startswith("card 0 alone: ")


@pytest.mark.parametrize("bad", ({"goal": "fastest"}, {"count": 0}, {"conditions": ()}, {"steps": 0}))
def test_impossible_situations(bad: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        replace(cpu(1, WAN), **bad)
