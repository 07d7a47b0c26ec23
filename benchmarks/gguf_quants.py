"""How fast GGUF's quantised weights become floats (loaders/quants.py), next to the `gguf` package and to a matmul.

    python benchmarks/gguf_quants.py [--device cpu] [--threads 1] [--tokens 1024] [--rounds 5] [--types Q4_K,Q8_0]

Run it with a Python that has torch and gguf; no ComfyUI is needed. The weight is [4096, 4096] of random blocks, and
each call makes a new result. GB/s are of float32 weights, whatever the result's dtype; the package runs on the CPU.
The last columns are the time of dequantising the weight to the dtype of the matmul, and that over the time of the
matmul itself, [tokens, 4096] x [4096, 4096].

On a CPU, writing to new memory can take longer than the arithmetic; THP_MEM_ALLOC_ENABLE=1 in the environment lets
torch have it in large pages, as numpy does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "workers" / "import_root"))

from comfy_raylight.loaders.quants import QUANTS, dequantise

SHAPE = (4096, 4096)
WEIGHTS = SHAPE[0] * SHAPE[1]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the matmul's other matrix")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of calls, of which the fastest counts")
    parser.add_argument("--types", type=lambda text: text.split(","), default=list(QUANTS), help="comma-separated")
    options = parser.parse_args()
    unknown = set(options.types) - set(QUANTS)
    if unknown:
        parser.error(f"--types names {', '.join(sorted(unknown))}; there are {', '.join(QUANTS)}")
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        table(options)
    return 0


def table(options: argparse.Namespace) -> None:
    """One line for each type."""
    device: torch.device = options.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x, weight = (torch.randn(rows, SHAPE[1], device=device).to(dtype) for rows in (options.tokens, SHAPE[0]))
    (matmul,) = fastest([lambda: torch.nn.functional.linear(x, weight)], options)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} CPU threads"
    name = str(dtype).removeprefix("torch.")
    print(f"{where}, torch {torch.__version__}, {options.tokens} tokens, {name} matmul {1e3 * matmul:.2f} ms\n")
    columns = ["type", "to float32 GB/s", "to bfloat16 GB/s", "package GB/s"]
    columns += ["float32 / package", "bfloat16 / package", "ms", "ms / matmul"]
    print(f"| {' | '.join(columns)} |\n{len(columns) * '|---'}|")
    for quant in options.types:
        measure(quant, dtype, matmul, options)


def measure(name: str, dtype: torch.dtype, matmul: float, options: argparse.Namespace) -> None:
    """A type's line."""
    from gguf import GGMLQuantizationType, quants

    quant = QUANTS[name]
    generator = torch.Generator().manual_seed(1)
    host = torch.randint(256, (WEIGHTS // quant.weights, quant.nbytes), dtype=torch.uint8, generator=generator)
    blocks = host.to(options.device)

    def ours(result: torch.dtype) -> Callable[[], object]:
        return partial(dequantise, blocks, name, SHAPE, dtype=result)

    theirs = partial(quants.dequantize, host.view(1, -1).numpy(), GGMLQuantizationType[name])
    calls: list[Callable[[], object]] = [ours(torch.float32), ours(torch.bfloat16), theirs, ours(dtype)]
    with np.errstate(all="ignore"):  # random scales are infinite at times
        float32, bfloat16, package, matmuls = fastest(calls, options)
    rates = " | ".join(f"{4e-9 * WEIGHTS / each:.2f}" for each in (float32, bfloat16, package))
    print(
        f"| {name} | {rates} | {package / float32:.1f} | {package / bfloat16:.1f} | {1e3 * matmuls:.2f} | "
        f"{matmuls / matmul:.2f} |",
        flush=True,
    )


def fastest(calls: list[Callable[[], object]], options: argparse.Namespace) -> list[float]:
    """The seconds of each call's fastest round, its work on a GPU included: other load on the machine only adds.

    A round makes every call once, so that such load meets them alike.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(options.rounds):
        for call, seconds in zip(calls, times, strict=True):
            wait(options.device)
            began = time.perf_counter()
            call()
            wait(options.device)
            seconds.append(time.perf_counter() - began)
    return [min(seconds) for seconds in times]


def wait(device: torch.device) -> None:
    """For what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
