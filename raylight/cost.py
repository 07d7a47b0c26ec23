"""What a step costs and what sharing it saves: bytes and FLOPs in closed form, seconds from a machine's rates.

Bytes are those a rank sends to other ranks. Ulysses moves q, k and v before an attention and its output after it,
each rank (U-1)/U of its share (Jacobs et al., DeepSpeed Ulysses, 2023); a ring passes keys and values R-1 times
(Liu et al., Ring Attention, 2023). Cross-attention to text that every rank holds moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

PAYS = 1.05
"""Predicted speed-up below which sharing a sequence is not worth it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One forward of a transformer, per row of the batch.

    Attributes:
        tokens: L, all segments together.
        width: C, channels of q, k, v and the output.
        blocks: how many attentions over all tokens there are.
        weights: multiply-adds per token and block: the weights of its linear layers.
        context: tokens of a cross-attention that every rank holds whole.
        out: channels per token that are joined at the exit; 0 is `width`.
        batch: rows.
        itemsize: bytes per element.
        heads: of the attention, of which a Ulysses rank gets whole ones; 0 where they divide evenly.
    """

    tokens: int
    width: int
    blocks: int
    weights: float
    context: int = 0
    out: int = 0
    batch: int = 1
    itemsize: int = 2
    heads: int = 0

    @property
    def linear_flops(self) -> float:
        """FLOPs of the linear layers."""
        return 2.0 * self.batch * self.tokens * self.blocks * self.weights

    @property
    def attention_flops(self) -> float:
        """FLOPs of the attentions: 2 L k C for the scores and as many for the values, k keys."""
        return 4.0 * self.batch * self.tokens * (self.tokens + self.context) * self.width * self.blocks

    def attention_share(self, *, ulysses: int, ring: int) -> float:
        """The part of the attention that the busiest of ulysses x ring ranks computes."""
        heads = math.ceil(self.heads / ulysses) / self.heads if self.heads else 1 / ulysses
        return heads / ring


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates that a device really reaches.

    Attributes:
        linear: FLOPs per second in linear layers.
        attention: FLOPs per second in attention.
        link: bytes per second that one rank sends while all do.
        latency: seconds that one collective takes besides its bytes.
        call: seconds that a step costs outside the model: driver, shared memory, messages.
        launch: seconds in which a process starts what one block computes: a device that is faster waits for it.
        launch_shared: the same where the block is shared, with its hooks and exchanges.
        bus: bytes per second from the mapped file to one device, as streamed blocks came to each of two H200.
    """

    linear: float
    attention: float
    link: float
    latency: float
    call: float
    launch: float = 0.0
    launch_shared: float = 0.0
    bus: float = 6e9

    def repeating(self) -> Machine:
        """The same where calls are recorded and repeated: a device waits for nobody."""
        return replace(self, launch=0.0, launch_shared=0.0)


RATES = {
    "cuda": Machine(
        linear=1.0e14, attention=8e13, link=6e9, latency=5e-5, call=4e-3, launch=1.6e-3, launch_shared=2.7e-3
    ),
    "cpu": Machine(linear=5e10, attention=3e10, link=1.5e9, latency=3e-4, call=4e-3),
}
"""Rates by device type, to say where sharing does not pay: an RTX 4090 on PCIe 4 x8, and one CPU core
(docs/scaling.md)."""


def attention_bytes(work: Work, *, ulysses: int, ring: int) -> float:
    """Bytes one rank sends for all attentions of a forward, tokens and heads dividing evenly."""
    share = work.batch * work.tokens / (ulysses * ring) * work.width * work.itemsize
    return work.blocks * share * (4 * (ulysses - 1) / ulysses + 2 * (ring - 1))


def exit_bytes(work: Work, *, ranks: int) -> float:
    """Bytes one rank sends to join the output: its own part to each other rank."""
    return work.batch * work.tokens / ranks * (work.out or work.width) * work.itemsize * (ranks - 1)


def seconds(works: Sequence[Work], machine: Machine, *, ulysses: int = 1, ring: int = 1) -> float:
    """Predicted duration of a forward on ulysses x ring ranks; transfers are not hidden behind computing.

    Args:
        works: its regions, one after another.
    """
    ranks = ulysses * ring
    total = machine.call if ranks > 1 else 0.0
    for work in works:
        device = work.linear_flops / machine.linear / ranks
        device += work.attention_flops / machine.attention * work.attention_share(ulysses=ulysses, ring=ring)
        if ranks > 1:
            moved = attention_bytes(work, ulysses=ulysses, ring=ring) + exit_bytes(work, ranks=ranks)
            collectives = work.blocks * ((2 if ulysses > 1 else 0) + ring - 1) + 1
            device += moved / machine.link + collectives * machine.latency
        total += max(device, work.blocks * (machine.launch_shared if ranks > 1 else machine.launch))
    return total


def speedup(works: Sequence[Work], machine: Machine, *, ulysses: int = 1, ring: int = 1) -> float:
    """Predicted duration on one rank over that on ulysses x ring."""
    return seconds(works, machine) / seconds(works, machine, ulysses=ulysses, ring=ring)


def enough_tokens(work: Work, machine: Machine, *, ulysses: int = 1, ring: int = 1) -> int:
    """The fewest tokens, to a power of two, from which sharing this model is predicted to pay."""
    tokens = 64
    while tokens < 1 << 20 and speedup([replace(work, tokens=tokens)], machine, ulysses=ulysses, ring=ring) < PAYS:
        tokens *= 2
    return tokens


def gather_seconds(work: Work, machine: Machine, *, ranks: int, weight_bytes: float) -> float:
    """Time to gather the weights of one block, of which every rank has a part and sends it to all others.

    Args:
        weight_bytes: bytes per weight, as they are stored.
    """
    return work.weights * weight_bytes * (ranks - 1) / ranks / machine.link + machine.latency


def hidden_from(work: Work, machine: Machine, *, ranks: int, weight_bytes: float) -> int:
    """The fewest tokens, to a power of two, from which a block computes longer than the next one's gather takes."""
    gather = gather_seconds(work, machine, ranks=ranks, weight_bytes=weight_bytes)
    tokens = 64
    while tokens < 1 << 20:
        block = replace(work, tokens=tokens, blocks=1)
        if (block.linear_flops / machine.linear + block.attention_flops / machine.attention) / ranks >= gather:
            break
        tokens *= 2
    return tokens


def advice(works: Sequence[Work], machine: Machine, *, ulysses: int = 1, ring: int = 1) -> str:
    """What to tell the user where sharing these tokens does not pay; "" where it does."""
    ranks = ulysses * ring
    gain = speedup(works, machine, ulysses=ulysses, ring=ring) if works and ranks > 1 else PAYS
    if gain >= PAYS:
        return ""
    tokens = max(work.tokens for work in works)
    return (
        f"{tokens} tokens are few for {ranks} workers: {gain:.1f}x the speed of one is predicted (docs/scaling.md). "
        "Use fewer workers per picture: cfg_degree or data parallel"
    )
