"""Loading, reloading, exchanging a LoRA, and memory: the pool against plain ComfyUI in the same run.

    python benchmarks/loading.py [--only load,reload,lora,memory] [--size 1] [--dtype float32] [--workers 1,2]
        [--comfy PATH]

Plain ComfyUI is its own loader in one process per worker, as packs without a shared copy do it, with as many threads as
the workers have; starting the processes and importing ComfyUI is counted on neither side. Both sides load the same Wan
file and run it on the same few tokens, which the workers share. Seconds are those until the last process has answered,
median and fastest; a ratio is plain over pool. Other load on the machine only adds: the fastest is the less noisy one.

A CPU has no memory of its own to move weights to: what is left of offloading and reloading there is bookkeeping.
There ComfyUI also turns a bfloat16 file into float32 while it loads, and the pool's workers in every call.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import environment
from loading_sides import Plain, Pool, Side, timed

TABLES = ("load", "reload", "lora", "memory")
COLD_RUNS = 3
RUNS = 5
ROUNDS = 3
DIM, FFN = 1280, 5120
"""Weights below 32 MiB, which glibc does not take from the system anew each time."""
RANK = 32
STILL_COLD = 0.01
"""Part of the file in the page cache up to which it counts as cold."""
MIB = 1 << 20


def main() -> int:
    """Set up, then print the tables in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names, default=TABLES, help="tables, comma-separated")
    parser.add_argument("--size", type=float, default=1.0, help="of the file, in GiB")
    parser.add_argument("--dtype", default="float32", help="of the file")
    parser.add_argument("--workers", type=numbers, default=None, help="default: 1,2 and for memory 1,2,4")
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    options = parser.parse_args()
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    import torch

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files = Files(Path(folder), options.size, options.dtype)
        print(f"file: {files.big.stat().st_size / MIB:.0f} MiB, {options.dtype}")
        for table in options.only:
            print()
            {"load": loads, "reload": reloads, "lora": exchanges, "memory": memory}[table](files, options.workers)
    return 0


def names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= set(TABLES):
        raise argparse.ArgumentTypeError(f"tables are {', '.join(TABLES)}")
    return chosen


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


class Files:
    """The checkpoint, two tiny ones, and three LoRAs for each case."""

    def __init__(self, folder: Path, gib: float, dtype: str) -> None:
        import torch
        from comfy_raylight.tests.host.checkpoints import Job, lora, write
        from comfy_raylight.tests.weights.adapters import write_adapter

        layer = (8 * DIM + 2 * FFN) * DIM * getattr(torch, dtype).itemsize
        size = {"dim": DIM, "ffn": FFN, "layers": max(1, -(-int(gib * (1 << 30)) // layer))}
        self.big = folder / "big.safetensors"
        self.tiny = [folder / f"tiny{number}.safetensors" for number in range(2)]
        jobs = [Job(family="wan", path=path, dtype=dtype, seed=seed) for seed, path in enumerate(self.tiny)]
        write([Job(family="wan", path=self.big, dtype=dtype, size=size), *jobs], comfy_root=Path(sys.path[0]))
        attention = [lora(self.big, folder / f"attn{seed}.safetensors", rank=RANK, seed=seed) for seed in range(3)]
        feed = [
            write_adapter(self.big, folder / f"ffn{seed}.safetensors", "lora", seed=seed, part="ffn") for seed in (1, 2)
        ]
        self.loras = {"the same weights": attention, "other weights": [attention[0], *feed]}
        """The first stays, the second is exchanged for the third, by what the exchanged ones are for."""

    def to_disk(self) -> float:
        """Take the checkpoint out of the page cache; the part of it that is still there."""
        fd = os.open(self.big, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return cached(fd)
        finally:
            os.close(fd)

    def to_cache(self) -> None:
        """Bring it there."""
        with self.big.open("rb", buffering=0) as file:
            buffer = bytearray(16 * MIB)
            while file.readinto(buffer):
                pass


def cached(fd: int) -> float:
    """The part of a file that is in the page cache, without reading any of it (mincore; a read would bring more)."""
    import torch

    size = os.fstat(fd).st_size
    mapped = mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in pages) / len(pages)


# ---- tables --------------------------------------------------------------------------------------


def loads(files: Files, workers: Sequence[int]) -> None:
    """Load to ready."""
    print(
        "| processes | page cache | side | load s | load + first forward s | later forward s | ratio load | ratio sum |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for count in workers or (1, 2):
        sides: list[Side] = [Plain(count, files.tiny), Pool(count, files.tiny)]
        for cold, runs in ((False, RUNS), (True, COLD_RUNS)):
            loading: list[list[float]] = [[] for _ in sides]
            ready: list[list[float]] = [[] for _ in sides]
            later: list[list[float]] = [[] for _ in sides]
            warm = 0.0
            for _ in range(runs):
                for number, side in enumerate(sides):
                    if cold:
                        warm = max(warm, files.to_disk())
                    else:
                        files.to_cache()
                    loading[number].append(timed(functools.partial(side.load, files.big)))
                    ready[number].append(loading[number][-1] + timed(side.forward))
                    later[number].append(timed(side.forward))
                    side.release()
            cache = f"cold, but {warm:.0%}" if cold and warm > STILL_COLD else "cold" if cold else "warm"
            for number, side in enumerate(sides):
                print(
                    f"| {count} | {cache} | {side.name} | {shown(loading[number])} | {shown(ready[number])} "
                    f"| {shown(later[number])} | {ratio(loading, number)} | {ratio(ready, number)} |",
                    flush=True,
                )
        close(sides)


def reloads(files: Files, workers: Sequence[int]) -> None:
    """Offload, then the same model again."""
    print("| processes | side | offload s | until the next forward starts s | ratio |")
    print("|---|---|---|---|---|")
    for count in workers or (1, 2):
        sides: list[Side] = [Plain(count, files.tiny), Pool(count, files.tiny)]
        for side in sides:
            side.load(files.big)
            side.forward()
        leaving: list[list[float]] = [[] for _ in sides]
        back: list[list[float]] = [[] for _ in sides]
        for _ in range(RUNS):
            for number, side in enumerate(sides):
                leaving[number].append(timed(side.offload))
                back[number].append(side.resume())
        for number, side in enumerate(sides):
            print(
                f"| {count} | {side.name} | {shown(leaving[number])} | {shown(back[number])} | {ratio(back, number)} |",
                flush=True,
            )
        close(sides)


def exchanges(files: Files, workers: Sequence[int]) -> None:
    """Of two LoRAs the second is exchanged, there and back."""
    print("| processes | the LoRAs change | side | until the next forward starts s | ratio | MiB sent first | later |")
    print("|---|---|---|---|---|---|---|")
    for count in workers or (1, 2):
        plain, pool = Plain(count, files.tiny), Pool(count, files.tiny)
        sides: list[Side] = [plain, pool]
        for side in sides:
            side.load(files.big)
            side.forward()
        for case, (stays, *others) in files.loras.items():
            contenders: list[tuple[str, Side, bool]] = [
                ("plain", plain, True), ("pool, stock LoRA nodes", pool, True), ("pool, Ray LoRA nodes", pool, False)
            ]  # fmt: skip
            seconds: list[list[float]] = []
            sent: list[list[int]] = []
            for _, side, stock in contenders:
                side.patch(stays, others, stock=stock)
                side.switch(0)
                found = [side.switch(1 - turn % 2) for turn in range(2 * ROUNDS)]
                seconds.append([each for each, _ in found])
                sent.append([size for _, size in found])
            for number, (name, _, _) in enumerate(contenders):
                crossed = f"{sent[number][0] / MIB:.2f} | {statistics.median(sent[number][1:]) / MIB:.2f}"
                print(
                    f"| {count} | {case} | {name} | {shown(seconds[number])} | {ratio(seconds, number)} "
                    f"| {crossed if number else '- | -'} |",
                    flush=True,
                )
        close(sides)


def memory(files: Files, workers: Sequence[int]) -> None:
    """What all processes of a side take beyond what they had before they loaded it."""
    from comfy_raylight.tests.weights.memory import Watch, proportional

    size = files.big.stat().st_size
    print("MiB beyond what the processes had before, sum of Pss; times the file")
    print("| processes | side | peak while loading | loaded | peak in first forward | after it | offloaded, reloaded |")
    print("|---|---|---|---|---|---|---|")
    kinds: tuple[type[Plain] | type[Pool], ...] = (Plain, Pool)
    for count in workers or (1, 2, 4):
        for kind in kinds:
            side = kind(count, files.tiny)
            base = proportional(side.pids)
            with Watch(proportional, side.pids) as loading:
                side.load(files.big)
            with Watch(proportional, side.pids) as running:
                side.forward()
            side.offload()
            side.resume()
            again = proportional(side.pids)
            marks = (loading.peak, loading.last, running.peak, running.last, again)
            grown = (f"{(mark - base) / MIB:.0f} ({(mark - base) / size:.2f})" for mark in marks)
            print(f"| {count} | {side.name} | {' | '.join(grown)} |", flush=True)
            close([side])


def shown(seconds: Sequence[float]) -> str:
    """Median and fastest."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f})"


def ratio(seconds: Sequence[Sequence[float]], number: int) -> str:
    """Plain over another one, of the medians and of the fastest."""
    if not number:
        return "-"
    plain, other = seconds[0], seconds[number]
    return f"{statistics.median(plain) / statistics.median(other):.1f} ({min(plain) / min(other):.1f})"


def close(sides: Sequence[Side]) -> None:
    for side in sides:
        side.close()


if __name__ == "__main__":
    sys.exit(main())
