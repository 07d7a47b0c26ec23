"""Which cards share a run, and how: of what a plan allows and memory holds, what the cost model predicts best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from .. import cost, packing

GOALS = ("auto", "speed", "memory")
SLOWER = 1.03
"""What counts as equally fast; sharing may take this many times as long as one card, and no longer."""
FIRST_CALLS = 4
"""Calls of a run before they are recorded, where they are."""
CHANGE_S = 0.3
"""Seconds in which a pool of other settings takes over the workers of the last one."""
START_S = 8.0
"""Seconds in which workers start that are not there."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is shared.

    Attributes:
        world: workers of the pool; those that are not in `cards` rest.
        cards: numbers of the cards that compute, as many as the degrees multiply to.
        residency: one of packing.RESIDENCIES.
    """

    world: int
    cards: tuple[int, ...]
    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    residency: str = "resident"

    def __post_init__(self) -> None:
        assert len(self.cards) == self.cfg * self.ulysses * self.ring, self

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring

    @property
    def way(self) -> tuple[int, int, int, str]:
        """What it is, whichever cards do it."""
        return self.cfg, self.ulysses, self.ring, self.residency

    def __str__(self) -> str:
        degrees = {"cfg": self.cfg, "ring": self.ring, "ulysses": self.ulysses}
        shown = " x ".join(f"{name} {count}" for name, count in degrees.items() if count > 1)
        where = f"cards {', '.join(map(str, self.cards))}" if len(self.cards) > 1 else f"card {self.cards[0]} alone"
        weights = "" if self.residency == "resident" else f", {self.residency} weights"
        return f"{shown + ' on ' if shown else ''}{where}{weights}"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a choice goes by.

    Attributes:
        free: bytes on each card that the model and its calls may have; () where weights take none (a CPU maps them).
        count: of cards.
        machine: rates of the cards and their links.
        works: one forward for one condition; () where that is not known, or nothing can share it.
        most: ranks that can share one forward, at most; 1 where no plan says how.
        rings: whether its keys and values can go around a ring of ranks.
        conditions: entries in each list of conditions that a step evaluates.
        steps: of the run.
        blocks, outside: bytes of the weights of each block, and of all others.
        activations: bytes that a call takes beside weights, on whichever card: an estimate from above.
        parts: whether a pool of some of the cards can be had.
        records: whether calls of resident weights can be recorded and repeated.
        present: how the pool that runs shares, and whether the model's weights are on its cards.
    """

    count: int
    machine: cost.Machine
    works: tuple[cost.Work, ...] = ()
    most: int = 1
    rings: bool = False
    conditions: tuple[int, ...] = (1,)
    steps: int = 20
    blocks: tuple[int, ...] = ()
    outside: int = 0
    activations: int = 0
    parts: bool = True
    records: bool = False
    free: tuple[int, ...] = ()
    present: Layout | None = None
    loaded: bool = False
    goal: str = "auto"

    def __post_init__(self) -> None:
        assert self.goal in GOALS and self.count >= 1 and len(self.free) in (0, self.count), self
        assert self.conditions and min(self.conditions) >= 1 and self.steps >= 1, self


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way that is possible. `seconds` is for a step, on average over the run; `bytes` what its fullest card needs."""

    layout: Layout
    seconds: float
    bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is best, what is next best, and what one card would take; None where there is no such candidate.

    `kept` says that it is what runs already, and another one would not win back what the change costs.
    """

    best: Candidate
    next: Candidate | None
    alone: Candidate | None
    known: bool
    kept: bool

    @property
    def layout(self) -> Layout:
        return self.best.layout

    def __str__(self) -> str:
        return f"{self.layout}: {'; '.join(self._reasons())}"

    def _reasons(self) -> Iterator[str]:
        if not self.best.fits:
            yield (
                f"no way fits into the free memory, and this needs least ({packing.gigabytes(self.best.bytes)} on "
                "each); ComfyUI loads a part and brings the rest at every step"
            )
        if not self.known:
            yield "what a call computes is not known for this model, so that only what sends nothing is shared"
        else:
            gain = self.alone.seconds / self.best.seconds if self.alone is not None else 0.0
            shared = len(self.layout.cards) > 1
            times = f", {gain:.2f} times the speed of one card" if gain and shared else ""
            yield f"{_seconds(self.best.seconds)} a step predicted{times}"
        if self.alone is None and self.best.fits:
            yield "it does not fit on one card"
        if self.kept:
            yield "kept, since a change costs more than it gains"
        if self.next is not None:
            yield f"next best: {self.next.layout}" + (f", {_seconds(self.next.seconds)}" if self.known else "")


def choose(situation: Situation) -> Choice:
    """The best way to run, by the goal.

    auto takes the fewest cards of those within SLOWER of the fastest, speed the fastest, memory what needs least on
    each card. None takes longer than SLOWER times what one card does, where one card can hold the model.
    """
    found = list(candidates(situation))
    fitting = [candidate for candidate in found if candidate.fits]
    known = bool(situation.works)
    if not fitting:
        best, *rest = sorted(found, key=lambda each: (each.bytes, each.seconds))
        return Choice(best=best, next=rest[0] if rest else None, alone=None, known=known, kept=False)
    alone = min((each for each in fitting if len(each.layout.cards) == 1), key=_seconds_of, default=None)
    allowed = [each for each in fitting if alone is None or each.seconds <= SLOWER * alone.seconds]
    best = _best(allowed, situation.goal)
    running = next((each for each in allowed if each.layout == situation.present), None)
    kept = running is not None and running.layout != best.layout and _keeps(situation, running, best)
    if kept and running is not None:
        best = running
    others = [each for each in fitting if each.layout.way != best.layout.way]
    return Choice(best=best, next=min(others, key=_seconds_of, default=None), alone=alone, known=known, kept=kept)


def candidates(situation: Situation) -> Iterator[Candidate]:
    """Every way, whether it fits or not."""
    count = situation.count
    for cfg in range(1, min(count, len(situation.conditions)) + 1):
        for ulysses in range(1, min(count // cfg, situation.most) + 1):
            for ring in _rings(situation, cfg, ulysses):
                if count % (cfg * ulysses * ring) and not situation.parts:
                    continue
                for residency in _residencies(situation, ulysses * ring):
                    yield _candidate(situation, cfg, ulysses, ring, residency)


def _rings(situation: Situation, cfg: int, ulysses: int) -> Iterator[int]:
    """Ulysses sends no more than a ring and computes in one piece, so that rings are for cards beyond the heads."""
    heads = min((work.heads for work in situation.works if work.width), default=0)
    most = min(situation.count // (cfg * ulysses), situation.most // ulysses)
    yield 1
    yield from (ring for ring in range(2, most + 1) if situation.rings and heads and ulysses * ring > heads)


def weights(situation: Situation, residency: str, ranks: int) -> int:
    """Bytes of one card's weights."""
    packed = [packing.Packing((size,), ranks) for size in situation.blocks]
    if residency == "resident" or not packed:
        return situation.outside + sum(situation.blocks)
    return packing.footprint(residency, packed, outside=situation.outside, prefetch=True).total


def step_seconds(situation: Situation, layout: Layout) -> float:
    """Predicted duration of a step, on average over the run; 1 for each forward where nothing is known."""
    groups = [sum(situation.conditions[group :: layout.cfg]) for group in range(layout.cfg)]
    if not situation.works:
        return float(max(groups))
    plain = max(_forward(situation, layout, rows, situation.machine) for rows in groups)
    if not situation.records or layout.residency != "resident":
        return plain
    recorded = max(_forward(situation, layout, rows, situation.machine.repeating()) for rows in groups)
    first = min(FIRST_CALLS, situation.steps)
    return (first * plain + (situation.steps - first) * recorded) / situation.steps


def change_seconds(situation: Situation, layout: Layout) -> float:
    """What it costs to run this way in place of how the pool runs."""
    present = situation.present
    if present is None or layout == present:
        return 0.0
    pool = layout.way != present.way or layout.world != present.world
    size = weights(situation, layout.residency, layout.sequence) if situation.free and situation.loaded else 0
    started = START_S if layout.world > present.world else 0.0
    return CHANGE_S * pool + started + size / situation.machine.bus


def _candidate(situation: Situation, cfg: int, ulysses: int, ring: int, residency: str) -> Candidate:
    size = cfg * ulysses * ring
    held = weights(situation, residency, ulysses * ring)
    needs = held + situation.activations
    world, cards = _cards(situation, size)
    layout = Layout(world=world, cards=cards, cfg=cfg, ulysses=ulysses, ring=ring, residency=residency)
    fits = not situation.free or needs <= min(situation.free[card] for card in cards)
    return Candidate(layout=layout, seconds=step_seconds(situation, layout), bytes=held, fits=fits)


def _cards(situation: Situation, size: int) -> tuple[int, tuple[int, ...]]:
    """How many workers the pool has, and which of the cards compute: those with most free memory.

    Where `size` divides the cards all workers stay, and neighbours compute: those with most free memory to a GiB, of
    equal ones those that do it now.
    """
    count, present = situation.count, situation.present
    free = situation.free or (0,) * count
    if count % size:
        chosen = sorted(range(count), key=lambda card: (-(free[card] >> 30), card))[:size]
        return size, tuple(sorted(chosen))
    parts = [tuple(range(start, start + size)) for start in range(0, count, size)]
    running = present.cards if present is not None and present.world == count else ()
    return count, max(parts, key=lambda part: (min(free[i] for i in part) >> 30, part == running, -part[0]))


def _residencies(situation: Situation, ranks: int) -> Iterator[str]:
    """Those that are possible, the simplest first. What would take more than resident weights is none."""
    yield "resident"
    whole = weights(situation, "resident", ranks)
    if situation.free and situation.blocks:
        for residency in ("sharded", "streamed") if ranks > 1 else ("streamed",):
            if weights(situation, residency, ranks) < whole:
                yield residency


def _forward(situation: Situation, layout: Layout, rows: int, machine: cost.Machine) -> float:
    works = [dataclasses.replace(work, batch=work.batch * rows) for work in situation.works]
    total = cost.seconds(works, machine, ulysses=layout.ulysses, ring=layout.ring)
    if layout.residency == "resident":
        return total
    computing, ranks = total / len(situation.blocks), layout.sequence
    late = 0.0
    for size in situation.blocks:
        gather = size * (ranks - 1) / ranks / machine.link + machine.latency * (ranks > 1)
        if layout.residency == "streamed":
            gather += size / ranks / machine.bus
        late += max(0.0, gather - computing)
    return total + late


def _best(found: list[Candidate], goal: str) -> Candidate:
    fastest = min(found, key=_seconds_of)
    if goal == "speed":
        return fastest
    if goal == "memory":
        return min(found, key=lambda each: (each.bytes, len(each.layout.cards), each.seconds))
    near = [each for each in found if each.seconds <= SLOWER * fastest.seconds]
    order = packing.RESIDENCIES.index
    return min(near, key=lambda each: (len(each.layout.cards), order(each.layout.residency), each.seconds))


def _keeps(situation: Situation, running: Candidate, best: Candidate) -> bool:
    """Whether what runs stays. Memory is asked for whatever it costs."""
    if situation.goal == "memory" and running.bytes > best.bytes:
        return False
    return (running.seconds - best.seconds) * situation.steps <= change_seconds(situation, best.layout)


def _seconds_of(candidate: Candidate) -> float:
    return candidate.seconds


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"
