"""Text encoders on a pool against plain ComfyUI's on one GPU: load, seconds for a prompt, memory, difference.

    python benchmarks/gpu/encoders.py --comfy ROOT [--kinds clip_l:stable_diffusion,t5_xxl:chroma] [--gpus 1,2]
        [--rounds 5]

The files have ComfyUI's sizes and random weights of float16, their pages in the page cache. `load` is what the first
prompt takes longer than the others, from a pool that runs. `memory` is what the weights take on each GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ranks import enter
from tables import Table

TEXT = "a photograph of a red fox in the snow at sunset, (detailed:1.2), " * 4
KINDS = "clip_l:stable_diffusion,t5_xxl:chroma"


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("--kinds", default=KINDS, help="file and type of each, comma-separated")
    parser.add_argument("--gpus", default="1,2", help="how many, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="prompts to take the median of")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        enter(str(options.comfy.resolve()))
        import torch
        from comfy_raylight.tests.host.checkpoints.encoders import write_encoders

        kinds = [kind.split(":") for kind in options.kinds.split(",")]
        write_encoders({folder / f"{kind}.safetensors": kind for kind, _ in kinds}, comfy_root=options.comfy.resolve())
        columns = ["encoder", "GPUs", "weights", "load s", "s for a prompt", "memory GB", "difference"]
        table = Table("encoders", columns, difference=".1e")
        with torch.inference_mode():
            for kind, name in kinds:
                measure(table, kind, name, folder / f"{kind}.safetensors", options)
    return 0


def measure(table: Table, kind: str, name: str, file: Path, options: argparse.Namespace) -> None:
    """The rows of one encoder."""
    import comfy.sd
    from comfy import model_management
    from comfy_raylight.raylight.config import ModelSpec, ParallelConfig, PoolConfig
    from comfy_raylight.workers.driver import remote
    from comfy_raylight.workers.driver.encoders import load_encoders
    from comfy_raylight.workers.driver.place import Place

    began = time.perf_counter()
    plain = comfy.sd.load_clip([str(file)], clip_type=getattr(comfy.sd.CLIPType, name.upper()))
    load, seconds, expected = timed(plain, options.rounds, began)
    table.row(kind, "plain", "resident", load, seconds, plain.patcher.model_size() / 1e9, 0.0)
    del plain
    model_management.unload_all_models()
    gc.collect()
    model_management.soft_empty_cache()
    for world in map(int, options.gpus.split(",")):
        for residency in ("resident", "streamed"):
            parallel = ParallelConfig(world=world, ulysses=world, ring=1, cfg=1, residency=residency)
            place = Place(PoolConfig(parallel=parallel))
            remote.start_pool(place.config)
            began = time.perf_counter()
            clip = load_encoders(place, ModelSpec.of(file, encoder=name))
            load, seconds, found = timed(clip, options.rounds, began)
            facts = clip.patcher.rpc.load()[0]
            difference = float((found - expected).abs().max() / expected.abs().max())
            table.row(kind, world, facts.weights.split(" ")[0], load, seconds, facts.bytes / 1e9, difference)
            del clip
            remote.end_pools(ray=False)
    remote.end_pools(ray=True)


def timed(clip: Any, rounds: int, began: float) -> tuple[float, float, Any]:
    """Seconds that the first prompt took beside encoding, median of the others, and what comes out."""
    tokens = clip.tokenize(TEXT)
    cond = clip.encode_from_tokens(tokens)
    first, taken = time.perf_counter() - began, []
    for _ in range(rounds):
        began = time.perf_counter()
        cond = clip.encode_from_tokens(tokens)
        taken.append(time.perf_counter() - began)
    seconds = statistics.median(taken)
    return first - seconds, seconds, cond


if __name__ == "__main__":
    sys.exit(main())
