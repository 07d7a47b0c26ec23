"""TeaCache in ComfyUI's process: evaluations of the model that would hardly differ from the last one are left out.

After "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (Liu et al., CVPR 2025,
https://arxiv.org/abs/2411.19108): the relative L1 change of an indicator is summed up from evaluation to evaluation,
and the model runs again once the sum reaches a threshold. Two things differ, so that it holds for every family without
numbers measured for it. The indicator is the noisy latent itself, one of those the paper compares, in place of the
input of the first block modulated by the timestep. And what is reused is the whole guided output, with all conditions
in it, in place of what the blocks add: of an evaluation that is left out, nothing is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import torch

from ...raylight.errors import ConfigError

log = logging.getLogger(__name__)

KEY = "raylight_teacache"
KINDS = comfy.patcher_extension.WrappersMP


@dataclass(frozen=True, kw_only=True)
class TeaCache:
    """When evaluations are left out.

    Attributes:
        threshold: sum of relative changes of the latent at which the model runs again; 0 never leaves anything out.
        warmup: part of the schedule at its beginning in which the model always runs.
        interval: of as many evaluations in a row, one is computed.
        start, end: part of the schedule in which evaluations may be left out.
        subsample: every how many rows and columns of the latent are looked at.
        verbose: whether each decision is logged.

    Raises:
        ConfigError: a part of the schedule ends before it begins.
    """

    threshold: float
    warmup: float = 0.1
    interval: int = 8
    start: float = 0.15
    end: float = 0.95
    subsample: int = 8
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ConfigError(
                "TeaCache would end before it starts",
                f"start_percent is {self.start}, end_percent {self.end}",
                "Make end_percent the larger one",
            )


def cached(model: Any, settings: TeaCache) -> Any:
    """A clone of a MODEL, on the pool or not, whose samplings leave evaluations out."""
    clone = model.clone()
    cache = _Cache(settings)
    clone.remove_wrappers_with_key(KINDS.OUTER_SAMPLE, KEY)
    clone.remove_wrappers_with_key(KINDS.PREDICT_NOISE, KEY)
    clone.add_wrapper_with_key(KINDS.OUTER_SAMPLE, KEY, cache.sample)
    clone.add_wrapper_with_key(KINDS.PREDICT_NOISE, KEY, cache.predict)
    return clone


class Run:
    """One sampling: what the model gave last, and how far the latent has come since.

    Args:
        first, last: highest and lowest noise level at which evaluations may be left out.
    """

    def __init__(self, settings: TeaCache, *, first: float, last: float) -> None:
        self.evaluations = self.left_out = 0
        self._settings = settings
        self._first, self._last = first, last
        self._seen: torch.Tensor | None = None
        self._direction: torch.Tensor | None = None
        self._change = 0.0
        self._in_a_row = 0

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, evaluate: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The denoised latent, [batch, ...] as `x`, of an evaluation or of the last one's direction.

        Args:
            sigma: noise level by row of the batch.
            evaluate: runs the model.
        """
        self.evaluations += 1
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        if self._may_leave_out(x, float(sigma.max())):
            assert self._direction is not None
            self.left_out += 1
            self._in_a_row += 1
            return x - level * self._direction
        denoised = evaluate()
        self._change, self._in_a_row = 0.0, 0
        # the direction from the latent to the result, which is what flow and noise models predict
        self._direction = (x - denoised) / level if float(sigma.min()) > 0 else None
        return denoised

    def _may_leave_out(self, x: torch.Tensor, sigma: float) -> bool:
        step = self._settings.subsample
        before, self._seen = self._seen, x[..., ::step, ::step].clone() if x.ndim > 3 else x[..., ::step].clone()
        if before is None or before.shape != self._seen.shape:
            self._direction = None
            return False
        self._change += float((self._seen - before).abs().mean() / before.abs().mean().clamp_min(1e-12))
        known = self._direction is not None and self._direction.shape == x.shape
        allowed = self._last < sigma <= self._first and self._in_a_row < self._settings.interval - 1
        chosen = known and allowed and self._change < self._settings.threshold
        if self._settings.verbose:
            log.info("TeaCache: sigma %.4f, change %.4f: %s", sigma, self._change, "left out" if chosen else "computed")
        return chosen


class _Cache:
    """The wrappers of one node, and the run at hand."""

    def __init__(self, settings: TeaCache) -> None:
        self._settings = settings
        self._run: Run | None = None

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE wrapper: nothing is kept from one sampling to another."""
        settings = self._settings
        sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
        first = min(float(sampling.percent_to_sigma(part)) for part in (settings.start, settings.warmup))
        run = self._run = Run(settings, first=first, last=float(sampling.percent_to_sigma(settings.end)))
        try:
            return executor(*args, **kwargs)
        finally:
            self._run = None
            log.info("TeaCache: %d of %d evaluations of the model were left out", run.left_out, run.evaluations)

    def predict(self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PREDICT_NOISE wrapper: around all conditions and their guidance."""
        if self._run is None:
            return executor(x, timestep, *args, **kwargs)
        return self._run.predict(x, timestep, lambda: executor(x, timestep, *args, **kwargs))
