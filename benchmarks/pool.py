"""What the pool costs and what it gains, against plain ComfyUI in the same run.

    python benchmarks/pool.py start | again | overhead | sampling | cfg | rows | data [--workers 2] [--comfy PATH]

start: seconds from nothing to a pool that can be used. again: milliseconds of a run of one step outside of its model
call, with models and LoRAs where the run before left them. overhead: milliseconds of a model call beyond the
workers' own time, and the bytes that cross. sampling: seconds per step of a Wan-like model wide enough that
computing dominates, workers with one thread each against plain ComfyUI with one thread. cfg: the same at cfg 4,
where two workers can share the tokens (ulysses_degree 2) or the conditions (cfg_degree 2). rows: the same of an
SDXL-shaped UNet, whose rows are shared in place of tokens. data: a picture for each
worker at the same time (all degrees 0) against the same pictures one after another.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import environment

ROUNDS = 3
CALLS = 25
STEPS = 2


def main() -> int:
    """Set up, then measure in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "again", "overhead", "sampling", "cfg", "rows", "data"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    options = parser.parse_args()
    code = environment.enter(options.comfy)
    if code is not None:
        return code
    parts = {"start": start, "again": again, "overhead": overhead}
    parts |= {"sampling": sampling, "cfg": guidance, "rows": rows, "data": pictures}
    parts[options.what](options)
    return 0


def config(workers: int, *, cfg: int = 1) -> Any:
    """A pool whose workers share conditions in `cfg` groups, and tokens inside of them."""
    from comfy_raylight.raylight.config import ParallelConfig, PoolConfig

    return PoolConfig(parallel=ParallelConfig(world=workers, ulysses=workers // cfg, ring=1, cfg=cfg))


def checkpoint(folder: str, family: str = "wan", size: Mapping[str, int] = MappingProxyType({})) -> Path:
    """A checkpoint of these sizes, in fp32."""
    from comfy_raylight.tests.host.checkpoints import Job, write

    path = Path(folder) / f"{family}.safetensors"
    write([Job(family=family, path=path, size=size, dtype="float32")], comfy_root=Path(sys.path[0]))
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is wide enough, and what it is sampled with.

    Attributes:
        family: of `checkpoint`, with `size`.
        latent: its shape, 0 for the dim that varies.
        text: tokens and width of the text.
        pooled: width of the pooled text, 0 for none.
        patch: latent's positions in a token.
    """

    family: str
    title: str
    latent: tuple[int, ...]
    text: tuple[int, int]
    size: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pooled: int = 0
    patch: int = 1

    def conditions(self, generator: Any) -> tuple[Any, Any]:
        """A positive and a negative prompt as ComfyUI has them, in the order in which they are drawn."""
        import torch

        def drawn() -> list[Any]:
            text = torch.randn(1, *self.text, generator=generator)
            more = {"pooled_output": torch.randn(1, self.pooled, generator=generator)} if self.pooled else {}
            return [[text, more]]

        return drawn(), drawn()


WAN = Subject(
    family="wan",
    title="width 768, 8 layers",
    latent=(1, 16, 5, 40, 0),
    text=(128, 4096),
    size={"dim": 768, "ffn": 3072, "layers": 8},
    patch=4,
)
SDXL = Subject(
    family="sdxl", title="SDXL with less blocks and 320 channels", latent=(1, 4, 64, 0), text=(77, 2048), pooled=1280
)


def start(options: argparse.Namespace) -> None:
    """Cold: no Ray, no workers. Then with Ray running, as after a failure; with other settings, which takes over."""
    from comfy_raylight.workers.driver import remote
    from comfy_raylight.workers.pool import pool

    usual = config(options.workers)
    other = dataclasses.replace(usual, parallel=dataclasses.replace(usual.parallel, sync_ulysses=True))

    print(f"| pool of {options.workers} | total s | Ray s | workers s (spawn, import torch and ComfyUI) | groups s |")
    print("|---|---|---|---|---|")
    for name, wanted in (("cold", usual), ("Ray running", usual), ("other settings, workers running", other)):
        if name == "Ray running":
            pool.close_all()
        began = time.perf_counter()
        laps = remote.start_pool(wanted).laps
        total = time.perf_counter() - began
        print(
            f"| {name} | {total:.1f} | {laps['ray']:.1f} | {laps['workers']:.1f} | {laps['groups']:.2f} |", flush=True
        )
    pool.close_all()


def again(options: argparse.Namespace) -> None:
    """Sample twice and more, bare and with a LoRA: what a run takes beside its model call."""
    import comfy.sample
    import comfy.sd
    import comfy.utils
    import torch
    from comfy_raylight.raylight.config import ModelSpec
    from comfy_raylight.tests.host.checkpoints import lora
    from comfy_raylight.workers.driver import remote

    generator = torch.Generator().manual_seed(1)
    positive, negative = WAN.conditions(generator)
    noise = torch.randn(1, 16, 5, 20, 22, generator=generator)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = checkpoint(folder, size=WAN.size)
        bare = remote.load_model(config(options.workers), ModelSpec.of(file))
        adapter = comfy.utils.load_torch_file(str(lora(file, Path(folder) / "lora.safetensors")), safe_load=True)
        print("| model | first run ms | later runs ms, median | worst |")
        print("|---|---|---|---|")
        for name, model in (
            ("bare", bare),
            ("with a LoRA", comfy.sd.load_lora_for_models(bare, None, adapter, 1, 0)[0]),
        ):
            times = []
            for _ in range(CALLS):
                inside = model.rpc.traffic().seconds
                began = time.perf_counter()
                comfy.sample.sample(
                    model.clone(), noise, 1, 1.0, "euler", "simple", positive, negative, torch.zeros_like(noise),
                    disable_pbar=True, seed=1,
                )  # fmt: skip
                times.append((time.perf_counter() - began - (model.rpc.traffic().seconds - inside)) * 1e3)
            print(
                f"| {name} | {times[0]:.1f} | {statistics.median(times[1:]):.1f} | {max(times[1:]):.1f} |", flush=True
            )


def overhead(options: argparse.Namespace) -> None:
    """Calls of a narrow model with many channels: large latents, little work."""
    import torch
    from comfy_raylight.raylight.config import ModelSpec
    from comfy_raylight.workers.driver import remote

    channels = 2048
    sizes = {"1": 64, "8": 512}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = checkpoint(folder, size={"dim": 128, "ffn": 128, "layers": 1, "channels": channels})
        model = remote.load_model(config(options.workers), ModelSpec.of(file))
        print("| latent MB | context MB | overhead ms, median | worst | bytes of the first call | of later calls |")
        print("|---|---|---|---|---|---|")
        for frames, height, width in ((1, 2, 6), (1, 14, 18), (5, 20, 26)):
            for name, tokens in sizes.items():
                x = torch.randn(1, channels, frames, height, width)
                context = torch.randn(1, tokens, 4096)
                times, sent = [], []
                for _ in range(CALLS + 1):
                    x, same = x.roll(1), context.clone()  # equal content in a new tensor, as ComfyUI makes it
                    traffic = model.rpc.traffic()
                    before = (traffic.worker_seconds, traffic.bytes_sent)
                    began = time.perf_counter()
                    answer = model.model.diffusion_model._forward(
                        x, torch.tensor([500.0]), same, transformer_options={"sigmas": x[0, 0, 0, 0]}
                    )
                    elapsed = time.perf_counter() - began
                    assert answer.shape == x.shape
                    times.append((elapsed - (traffic.worker_seconds - before[0])) * 1e3)
                    sent.append(traffic.bytes_sent - before[1] - x.nbytes)
                print(
                    f"| {x.nbytes / 1e6:.1f} | {name} | {statistics.median(times[1:]):.2f} | {max(times[1:]):.2f} "
                    f"| latent + {sent[0]} | latent + {max(sent[1:])} |",
                    flush=True,
                )


def sampling(options: argparse.Namespace) -> None:
    """Tokens shared, without guidance."""
    compare(WAN, [(f"ulysses {options.workers}", config(options.workers))], scale=1.0, widths=(44, 88))


def guidance(options: argparse.Namespace) -> None:
    """Positive and negative prompt at cfg 4: tokens shared against conditions shared."""
    compare(WAN, _sharing(options.workers), scale=4.0, widths=(22, 44))


def rows(options: argparse.Namespace) -> None:
    """The same of a UNet: rows shared against conditions shared."""
    compare(SDXL, _sharing(options.workers), scale=4.0, widths=(64, 96))


def _sharing(workers: int) -> list[tuple[str, Any]]:
    return [(f"ulysses {workers}", config(workers)), ("cfg 2", config(workers, cfg=2))]


def pictures(options: argparse.Namespace) -> None:
    """A picture for each worker: plain ComfyUI and one replica make them one after another, all replicas at once."""
    import comfy.sample
    import comfy.sd
    import torch
    from comfy_raylight.raylight.config import ModelSpec, ParallelConfig, PoolConfig
    from comfy_raylight.workers.driver import jobs, remote

    generator = torch.Generator().manual_seed(1)
    positive, negative = WAN.conditions(generator)
    count = options.workers
    print(f"{count} pictures, width 768, 8 layers, one thread each; medians of {ROUNDS} rounds of {STEPS} steps")
    print(
        "| tokens | plain s | one replica s | all replicas s | against plain | against one replica "
        "| replicas at work at a time | difference |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = checkpoint(folder, size=WAN.size)
        plain = comfy.sd.load_diffusion_model(str(path))
        pooled = remote.load_model(PoolConfig(parallel=ParallelConfig(world=count)), ModelSpec.of(path))
        for width in (22, 44):
            noises = [torch.randn(1, 16, 5, 40, width, generator=generator) for _ in range(count)]

            def sample(model: Any, noise: torch.Tensor) -> torch.Tensor:
                return comfy.sample.sample(
                    model, noise, STEPS, 1.0, "euler", "simple", positive, negative, torch.zeros_like(noise),
                    disable_pbar=True, seed=1,
                )  # fmt: skip

            def in_turn(model: Any, noises: Sequence[torch.Tensor] = noises) -> list[torch.Tensor]:
                return [sample(model, noise) for noise in noises]

            def at_once(model: Any, noises: Sequence[torch.Tensor] = noises) -> list[torch.Tensor]:
                return jobs.run(model, [{"noise": noise} for noise in noises], sample)

            ways = [(in_turn, plain), (in_turn, pooled), (at_once, pooled)]
            results = [way(model) for way, model in ways]  # also loads what is not loaded yet
            difference = max((a - b).abs().max() / a.abs().max() for a, b in zip(results[0], results[2], strict=True))
            rounds, traffics = [], [pooled.rpc.at(replica).traffic() for replica in range(count)]
            working = 0.0
            for _ in range(ROUNDS):
                seconds = []
                for way, model in ways:
                    before = sum(traffic.worker_seconds for traffic in traffics)
                    began = time.perf_counter()
                    way(model)
                    seconds.append(time.perf_counter() - began)
                rounds.append(seconds)
                working += sum(traffic.worker_seconds for traffic in traffics) - before  # all replicas came last
            plain_s, one_s, all_s = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(
                f"| {noises[0][0, 0].numel() // 4} | {plain_s:.2f} | {one_s:.2f} | {all_s:.2f} | "
                f"{plain_s / all_s:.2f} | {one_s / all_s:.2f} | "
                f"{working / sum(seconds[-1] for seconds in rounds):.2f} | {difference:.1e} |",
                flush=True,
            )


def compare(subject: Subject, ways: Sequence[tuple[str, Any]], *, scale: float, widths: Sequence[int]) -> None:
    """Seconds per step of each pool and of plain ComfyUI, in alternating runs, so that both see the same machine.

    Args:
        scale: the guidance scale.
        widths: of the latents.
    """
    import comfy.sample
    import comfy.sd
    import torch
    from comfy_raylight.raylight.config import ModelSpec
    from comfy_raylight.workers.driver import remote

    generator = torch.Generator().manual_seed(1)
    positive, negative = subject.conditions(generator)

    def run(model: Any, noise: torch.Tensor) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        samples = comfy.sample.sample(
            model, noise, STEPS, scale, "euler", "simple", positive, negative, torch.zeros_like(noise),
            disable_pbar=True, seed=1,
        )  # fmt: skip
        return (time.perf_counter() - began) / STEPS, samples

    print(f"{subject.title}, cfg {scale:g}, one thread each; medians of {ROUNDS} alternating runs of {STEPS} steps")
    print(
        "| shared by | tokens | plain s/step | pool s/step | speed-up (worst to best) | in collectives | difference |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = checkpoint(folder, subject.family, subject.size)
        plain = comfy.sd.load_diffusion_model(str(path))
        for way, pool_config in ways:
            pooled = remote.load_model(pool_config, ModelSpec.of(path))
            for width in widths:
                noise = torch.randn(*(size or width for size in subject.latent), generator=generator)
                first, second = run(plain, noise)[1], run(pooled, noise)[1]
                difference = (first - second).abs().max() / first.abs().max()
                traffic = pooled.rpc.traffic()
                before = (traffic.seconds, traffic.collective_seconds)
                seconds = [(run(plain, noise)[0], run(pooled, noise)[0]) for _ in range(ROUNDS)]
                share = (traffic.collective_seconds - before[1]) / (traffic.seconds - before[0])
                plain_s, pool_s = (statistics.median(column) for column in zip(*seconds, strict=True))
                ratios = sorted(a / b for a, b in seconds)
                print(
                    f"| {way} | {noise[0, 0].numel() // subject.patch} | {plain_s:.3f} | {pool_s:.3f} | "
                    f"{plain_s / pool_s:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {share:.0%} | {difference:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
