"""What cutting a sequence costs and gains, on the engine alone: P ranks against one process in the same run.

    python benchmarks/parallel.py families | modes | bytes | memory [--comfy PATH] [--only NAME,...]

families: speed-up of 2 ranks, one thread each, over one with one thread, for every family at a size where
computing dominates. modes: Ulysses against ring, q, k and v in one exchange or three, cutting once against
cutting around every block. bytes: what each rank sends per step on 2, 4 and 8 ranks, counted, against the
closed form (raylight/cost.py). memory: the most bytes of tensors, weights and inputs not counted, that a rank has
alive at once, with PyTorch's attention as on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import environment

ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to share a forward."""

    ulysses: int = 1
    ring: int = 1
    overlap: int = 0
    granularity: str | None = None

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    def __str__(self) -> str:
        axes = [f"{axis} {n}" for axis, n in (("ulysses", self.ulysses), ("ring", self.ring)) if n > 1]
        return ", ".join(
            [*axes, *(["in turns"] if self.overlap else []), *([self.granularity] if self.granularity else [])]
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one way, per forward: seconds (median, slowest rank), share of them in collectives, bytes by kind of
    the rank that sends most, largest relative difference, and what the engine says it had to do."""

    seconds: float
    waiting: float
    bytes: dict[str, int]
    difference: float
    works: tuple[Any, ...]


def main() -> int:
    """Set up, then measure in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("families", "modes", "bytes", "memory"))
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    parser.add_argument(
        "--only", default="", help="families to measure, separated by commas; all that there are by default"
    )
    options = parser.parse_args()
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    {"families": families, "modes": modes, "bytes": count_bytes, "memory": memory}[options.what](options)
    return 0


def measure(model: Any, make: Callable[[], Any], ways: Sequence[Way], rounds: int) -> tuple[float, list[Measured]]:
    """Seconds of a plain forward, and of one in each way; `rounds` of each after a first one."""
    import torch
    from comfy_raylight.tests.engine.ranks import fork, forward_of

    forward = forward_of(model)
    with torch.inference_mode():
        args, kwargs = make()
        reference = forward(*args, **kwargs)
        plain = _times(forward, make, rounds)
        found = []
        for way in ways:
            ranks = fork(way.ranks, _on_ranks, way, model, make, reference, rounds)
            problems = [rank for rank in ranks.values() if isinstance(rank, str)]
            if problems:
                raise RuntimeError("\n".join(problems))
            slowest = max(ranks.values(), key=lambda rank: rank.seconds)
            most = max((rank.bytes for rank in ranks.values()), key=lambda sent: sum(sent.values()))
            wrong = max(rank.difference for rank in ranks.values())
            found.append(dataclasses.replace(slowest, bytes=most, difference=wrong))
        plain += _times(forward, make, rounds) if rounds > 1 else []
    return statistics.median(plain), found


def _on_ranks(  # noqa: PLR0917, called as `fork` calls its job
    rank: int, size: int, path: str, way: Way, model: Any, make: Any, reference: Any, rounds: int
) -> Any:
    import torch
    from comfy_raylight.tests.engine.ranks import difference

    mesh, installation, forward = _shared(model, way, rank=rank, path=path)
    with torch.inference_mode():
        args, kwargs = make()
        wrong = difference(forward(*args, **kwargs), reference)
        sent, waited = mesh.bytes, mesh.seconds
        seconds = _times(forward, make, rounds, together=lambda: mesh.control.all_reduce(torch.zeros(1)))
    moved = {kind: (count - sent.get(kind, 0)) // rounds for kind, count in mesh.bytes.items()}
    measured = Measured(
        statistics.median(seconds),
        (mesh.seconds - waited) / sum(seconds),
        moved,
        wrong,
        tuple(installation.works.values()),
    )
    mesh.close()
    return measured


def _shared(model: Any, way: Way, *, rank: int, path: str) -> tuple[Any, Any, Callable[..., Any]]:
    """This rank's mesh, its hooks on the model, and the forward that goes through them."""
    from comfy_raylight.patches.registry import plan_for
    from comfy_raylight.raylight.config import ParallelConfig
    from comfy_raylight.raylight.install import install
    from comfy_raylight.raylight.sequence import kernels
    from comfy_raylight.tests.engine.ranks import forward_of, mesh_of

    parallel = ParallelConfig(world=way.ranks, ulysses=way.ulysses, ring=way.ring, cfg=1, overlap=way.overlap)
    mesh = mesh_of(parallel, rank=rank, path=path)
    granularity: Any = way.granularity
    installation = install(model, plan_for(model), mesh, kernel=kernels.chosen(parallel), granularity=granularity)
    return mesh, installation, partial(installation.wrapper, forward_of(model))


def _times(
    forward: Callable[..., Any], make: Callable[[], Any], rounds: int, *, together: Callable[[], Any] = lambda: None
) -> list[float]:
    """Seconds of each of `rounds` forwards, with inputs made anew since models write into theirs."""
    times = []
    for _ in range(rounds):
        args, kwargs = make()
        together()
        began = time.perf_counter()
        forward(*args, **kwargs)
        times.append(time.perf_counter() - began)
    return times


def families(options: argparse.Namespace) -> None:
    """Speed-up of two ranks for every family this ComfyUI has."""
    import sizes

    chosen = sizes.wide(options.only)
    print("| family | tokens | plain s | 2 ranks s | speed-up | in collectives | MB sent per rank | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (model, make) in chosen.items():
        plain, (two,) = measure(model(), make, [Way(ulysses=2)], ROUNDS)
        tokens = max(work.tokens for work in two.works)
        print(
            f"| {name} | {tokens} | {plain:.3f} | {two.seconds:.3f} | {plain / two.seconds:.2f} | {two.waiting:.0%} | "
            f"{sum(two.bytes.values()) / 1e6:.1f} | {two.difference:.0e} |",
            flush=True,
        )


def modes(options: argparse.Namespace) -> None:
    """The ways to share one forward, on two ranks."""
    import sizes

    ways = [
        Way(ulysses=2),
        Way(ulysses=2, overlap=2),
        Way(ulysses=2, granularity="block"),
        Way(ring=2),
        Way(ring=2, granularity="block"),
    ]
    chosen = sizes.wide(options.only or "wan,flux")
    print("| family | way | plain s | seconds | speed-up | in collectives | MB sent per rank | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (model, make) in chosen.items():
        plain, found = measure(model(), make, ways, ROUNDS)
        for way, one in zip(ways, found, strict=True):
            print(
                f"| {name} | {way} | {plain:.3f} | {one.seconds:.3f} | {plain / one.seconds:.2f} | {one.waiting:.0%} | "
                f"{sum(one.bytes.values()) / 1e6:.1f} | {one.difference:.0e} |",
                flush=True,
            )


def count_bytes(options: argparse.Namespace) -> None:
    """Bytes of one forward, counted and computed."""
    import sizes
    from comfy_raylight.raylight import cost

    chosen = sizes.even(options.only)
    print("| family | way | attention bytes | closed form | bytes to leave | closed form, full width | difference |")
    print("|---|---|---|---|---|---|---|")
    ways = [Way(ulysses=2), Way(ring=2), Way(ulysses=4), Way(ulysses=2, ring=2), Way(ulysses=8), Way(ulysses=4, ring=2)]
    for name, (model, make) in chosen.items():
        _, found = measure(model(), make, ways, 1)
        for way, one in zip(ways, found, strict=True):
            inside = sum(one.bytes.get(kind, 0) for kind in ("all_to_all", "ring"))
            leaving = sum(one.bytes.values()) - inside
            least = sum(cost.attention_bytes(work, ulysses=way.ulysses, ring=way.ring) for work in one.works)
            joined = sum(cost.exit_bytes(work, ranks=way.ranks) for work in one.works)
            print(
                f"| {name} | {way} | {inside} | {least:.0f} | {leaving} | {joined:.0f} | {one.difference:.0e} |",
                flush=True,
            )


def memory(options: argparse.Namespace) -> None:
    """What a forward takes beside weights, on one process and on each of several ranks."""
    import sizes
    import torch
    from comfy.cli_args import args as comfy_args
    from comfy_raylight.tests.engine.ranks import fork, forward_of

    # ComfyUI's own choice for a CPU keeps the scores of all tokens, which would hide everything else
    comfy_args.use_pytorch_cross_attention = True
    ways = [Way(ulysses=2), Way(ulysses=4), Way(ulysses=2, ring=2), Way(ring=4), Way(ulysses=4, granularity="block")]
    chosen = sizes.wide(options.only)
    print(f"| family | plain MB | {' | '.join(f'{way}: part of it' for way in ways)} |")
    print(f"|---|---|{'---|' * len(ways)}")
    for name, (build, make) in chosen.items():
        model = build()
        with torch.inference_mode():
            plain = _peak(forward_of(model), make)
            parts = [max(fork(way.ranks, _peak_on_ranks, way, model, make).values()) / plain for way in ways]
        print(f"| {name} | {plain / 1e6:.1f} | {' | '.join(f'{part:.2f}' for part in parts)} |", flush=True)


def _peak(forward: Callable[..., Any], make: Callable[[], Any]) -> int:
    """Bytes of a second forward."""
    from comfy_raylight.tests.host.live_bytes import LiveBytes

    args, kwargs = make()
    forward(*args, **kwargs)
    args, kwargs = make()
    with LiveBytes() as alive:
        forward(*args, **kwargs)
    return alive.peak


def _peak_on_ranks(  # noqa: PLR0917, called as `fork` calls its job
    rank: int, size: int, path: str, way: Way, model: Any, make: Any
) -> int:
    import torch

    mesh, _, forward = _shared(model, way, rank=rank, path=path)
    with torch.inference_mode():
        peak = _peak(forward, make)
    mesh.control.all_reduce(torch.zeros(1))
    mesh.close()
    return peak


if __name__ == "__main__":
    sys.exit(main())
