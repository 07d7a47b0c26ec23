"""What the devices and links of a pool reach, measured on them: what a choice of cards goes by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ...raylight import cost
from .link_test import Link, finish

ROUNDS = 3
LINEAR, ATTENTION = 0.8, 0.95
"""Of one product and one attention, what a model's layers reach with the norms, sums and ropes between them: on an H200
these are 693 and 559 TFLOP/s, and Wan 14B reaches 560 and 540 (docs/scaling.md)."""
SIZES = {"cpu": (512, 512, 8, 64)}
LARGE = (4096, 4096, 16, 128)
"""Side of the matrices; tokens, heads and channels of the attention: a millisecond of a large GPU's time."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOPs per second of one device, and what each axis of more than one rank carries."""

    linear: float
    attention: float
    links: dict[str, Link]


def measure(device: torch.device, links: dict[str, Link]) -> Rates:
    """Time a product and an attention, in the type that a device computes models in."""
    side, tokens, heads, channels = SIZES.get(device.type, LARGE)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # a generator of its own: nothing that a seed decides may change
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(side, side, generator=generator).to(device, dtype)
    q = torch.randn(1, heads, tokens, channels, generator=generator).to(device, dtype)
    product = _seconds(lambda: a @ a, device)
    attention = _seconds(lambda: F.scaled_dot_product_attention(q, q, q), device)
    return Rates(
        linear=LINEAR * 2.0 * side**3 / product,
        attention=ATTENTION * 4.0 * tokens**2 * heads * channels / attention,
        links=links,
    )


def machine(found: Sequence[Rates], device_type: str) -> cost.Machine:
    """The rates of the slowest device and link; what was not measured is assumed (cost.RATES)."""
    assumed = cost.RATES.get(device_type, cost.RATES["cuda"])
    links = [link for rates in found for link in rates.links.values()]
    made = replace(
        assumed, linear=min(rates.linear for rates in found), attention=min(rates.attention for rates in found)
    )
    if not links:
        return made
    return replace(made, link=min(link.exchange for link in links) * 1e9, latency=max(link.latency for link in links))


def described(made: cost.Machine) -> str:
    """For the log."""
    return (
        f"{made.linear / 1e12:.2f} TFLOP/s in linear layers, {made.attention / 1e12:.2f} in attention, links "
        f"{made.link / 1e9:.2f} GB/s, {made.latency * 1e6:.0f} us"
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    finish(device)
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        finish(device)
        best = min(best, time.perf_counter() - begun)
    return best
