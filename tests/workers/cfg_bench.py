"""What the checks of CFG parallelism are made of: a plain model beside one on a pool of two cfg groups."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_raylight.tests.dropin.driver import node, noise
from comfy_raylight.tests.sweep.sweep import FAMILIES, conditioning

if TYPE_CHECKING:
    import torch

GROUPS = 2
STEPS = 2

Model = Any
WAN, UNET, WAN4 = "wan:2", "unet:2", "wan:4"
"""Settings: family and workers."""


class Bench:
    """A plain model and one on a pool with two cfg groups, of the same file, and what to sample them with."""

    def __init__(self, family: str, file: Path, workers: int, folder: Path) -> None:
        import comfy.sd
        import comfy.utils
        from comfy_raylight.raylight.config import ModelSpec, ParallelConfig, PoolConfig
        from comfy_raylight.tests.host.checkpoints import lora
        from comfy_raylight.workers.driver import remote

        self.family = FAMILIES[family]
        self.folder = folder
        parallel = ParallelConfig(world=workers, cfg=GROUPS, ring=1, ulysses=workers // GROUPS)
        self.config = PoolConfig(parallel=parallel)
        self.plain = comfy.sd.load_diffusion_model(str(file))
        self.far = remote.load_model(self.config, ModelSpec.of(file))
        self.positive, self.negative, self.other = (self.text(seed) for seed in (1, 2, 5))
        self.lora = comfy.utils.load_torch_file(str(lora(file, folder / f"{family}.safetensors")), safe_load=True)
        self.first = self.picture(self.far)

    def text(self, seed: int, tokens: int = 0) -> Any:
        return conditioning(replace(self.family, tokens=tokens or self.family.tokens), seed)

    def noise(self, batch: int = 1) -> dict[str, Any]:
        return {"samples": noise(4, batch, *self.family.shape[1:])}

    def picture(self, model: Model, **changes: Any) -> torch.Tensor:
        """What KSampler makes: euler at cfg 4, with some inputs changed."""
        inputs = {
            "seed": 3,
            "steps": STEPS,
            "cfg": 4.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.noise(),
            "denoise": 1.0,
            **changes,
        }
        result: torch.Tensor = node("KSampler", model=model, **inputs)["samples"]
        return result

    def guided(self, model: Model, guider: str, **inputs: Any) -> torch.Tensor:
        """What SamplerCustomAdvanced makes with a guider."""
        made: torch.Tensor = node(
            "SamplerCustomAdvanced",
            noise=node("RandomNoise", noise_seed=3),
            guider=node(guider, model=model, negative=self.negative, **inputs),
            sampler=node("KSamplerSelect", sampler_name="euler"),
            sigmas=node("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0),
            latent_image=self.noise(),
        )["samples"]
        return made

    def calls(self) -> list[int]:
        """Model calls of each group so far."""
        return [self.far.rpc.traffic(group).calls for group in range(GROUPS)]

    def sent(self) -> list[int]:
        """Bytes sent to each group so far."""
        return [self.far.rpc.traffic(group).bytes_sent for group in range(GROUPS)]


@contextmanager
def infos() -> Iterator[list[str]]:
    """What the link logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("comfy_raylight.workers.driver.model_rpc")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
