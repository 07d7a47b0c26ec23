"""The driver's side of a VAE on the pool: asks what the workers can do, decides, and collects what they made."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy import model_management

from ...raylight.config import ModelSpec
from ...raylight.errors import UnsupportedError, WorkerError
from ..pool.pool import Pool
from ..wire import random_states, standing
from ..wire.vae_messages import DecodeRequest, EncodeRequest, Mode, PartReply, TileSizes, VAEFacts, VAEPlan, Way
from . import remote
from .group import can_share
from .model_rpc import interruptible
from .output import Output, reserve, share

log = logging.getLogger(__name__)


def decode(
    model: remote.RemotePatcher, latent: Any, spec: ModelSpec, *, mode: Mode, tiles: TileSizes, keep: bool
) -> torch.Tensor:
    """Pixels of a latent, on the pool of `model`, started where needed; see `decode_on`.

    Args:
        latent: of several nested ones the first is meant, as ComfyUI's VAEDecode takes it.
    """
    if not isinstance(latent, torch.Tensor):
        latent = latent.unbind()[0]
    with interruptible(), standing.explaining():
        pool = remote.start_pool(model.rpc.config)
        return decode_on(pool, latent, spec, mode=mode, tiles=tiles, keep=keep)


def decode_on(
    pool: Pool, latent: torch.Tensor, spec: ModelSpec, *, mode: Mode, tiles: TileSizes, keep: bool
) -> torch.Tensor:
    """Pixels of a latent, as ComfyUI's VAEDecode returns them: [frames, rows, width, channels].

    Args:
        latent: [batch, channels, (frames,) rows, width].
        spec: of the VAE file, its `dtype` the type to compute in or "".
        mode: see MODES.
        tiles: for tiles.
        keep: whether the workers keep the VAE for the next time.

    Raises:
        UnsupportedError: the mode cannot be had for this VAE.
        LoadError: the file is no VAE.
        ConfigError: there is no room for the pixels.
        Cancelled: ComfyUI's cancel flag was set.
        WorkerError: a worker failed.
    """
    try:
        pool.agree_on(spec)
        plan = VAEPlan(spec=spec, shape=tuple(latent.shape), test=mode != "tiles")
        try:
            facts = _facts(pool, plan)
            way, why = _way(mode, facts)
        except WorkerError as error:
            # all of them failed alike, or the pool would be gone: something no rule knows
            if mode != "auto" or not pool.alive():
                raise
            facts = _facts(pool, dataclasses.replace(plan, test=False))
            way, why = _way("tiles", facts)[0], str(error)
        ranks = {"seamless": facts[0].ranks, "whole": 1}.get(way, len(pool.members))
        log.info("decoding on %d workers, %s%s", ranks, way, f" ({why})" if why else "")
        return _decode(pool, latent, facts, _Job(spec=spec, way=way, ranks=ranks, tiles=tiles))
    finally:
        _let_go(pool, spec, keep=keep)


def encode(model: remote.RemotePatcher, pixels: torch.Tensor, spec: ModelSpec, *, keep: bool) -> torch.Tensor:
    """Latent of pictures, on the pool of `model`, started where needed; see `encode_on`."""
    with interruptible(), standing.explaining():
        return encode_on(remote.start_pool(model.rpc.config), pixels, spec, keep=keep)


def encode_on(pool: Pool, pixels: torch.Tensor, spec: ModelSpec, *, keep: bool) -> torch.Tensor:
    """Latent of pictures, as ComfyUI's VAEEncode makes it.

    Args:
        pixels: [frames, rows, width, channels].

    Raises:
        UnsupportedError: this VAE can encode neither in strips nor by tiles of its own.
        LoadError, Cancelled, WorkerError: as for `decode_on`.
    """
    try:
        pool.agree_on(spec)
        facts = _facts(pool, VAEPlan(spec=spec, shape=tuple(pixels.shape), encode=True))
        own = bool(facts[0].own)
        refusal = "" if own else _refusal(facts)
        if refusal:
            raise UnsupportedError(
                f"{facts[0].family} cannot encode on several workers", refusal, "Use ComfyUI's own VAE Encode"
            )
        given = share(pixels, shared=can_share(pool, range(len(pool.members))))
        request = EncodeRequest(
            spec=spec,
            pixels=given.block,
            ranks=len(facts),
            way="own tiles" if own else "seamless",
            batch=max(1, min(fact.batch for fact in facts)),
            budget=_budget(facts),
            random=random_states.take(),
        )
        replies = _ask(pool, "encode", request, range(len(facts)))
        return torch.cat([_part(reply) for reply in replies if reply.part is not None], -2)
    finally:
        _let_go(pool, spec, keep=keep)


def _facts(pool: Pool, plan: VAEPlan) -> list[VAEFacts]:
    """What the ranks say that have rows to do."""
    found: list[VAEFacts | None] = pool.call("plan_vae", plan)
    return [facts for facts in found if facts is not None]


def _way(mode: Mode, facts: Sequence[VAEFacts]) -> tuple[Way, str]:
    """What a mode comes to for these ranks, and why, where that is not what was asked for first.

    Raises:
        UnsupportedError: seamless or tiles were asked for, and cannot be.
    """
    first = facts[0]
    if mode == "tiles" and not first.tiles:
        raise UnsupportedError(
            f"The tiles of {first.family} cannot be dealt out to workers",
            first.refusal,
            "Set mode to auto, or use ComfyUI's own VAE Decode (Tiled)",
        )
    if first.ranks == 0:
        return ("own tiles", "") if first.own and len(facts) > 1 else ("whole", first.refusal)
    if mode == "tiles":
        return "tiles", ""
    refusal = _refusal(facts)
    if not refusal and not first.shape:
        refusal = "the shape of its result is not known beforehand"
    if mode == "auto":
        if not refusal and min(fact.batch for fact in facts) < 1:
            refusal = "a strip does not fit into the memory of every worker"
        return ("tiles", refusal) if refusal else ("seamless", "")
    if refusal:
        raise UnsupportedError(f"{first.family} cannot decode in strips", refusal, "Set mode to auto or tiles")
    return "seamless", ""


def _refusal(facts: Sequence[VAEFacts]) -> str:
    """Why strips cannot be, "" where they can."""
    for fact in facts:
        if fact.refusal:
            return fact.refusal
    worst = max(fact.difference for fact in facts)
    if worst <= facts[0].limit:
        return ""
    return f"its self-test is off by {worst:.1e}, where rounding explains {facts[0].limit:.0e}"


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What was decided about a decode."""

    spec: ModelSpec
    way: Way
    ranks: int
    tiles: TileSizes


def _decode(pool: Pool, latent: torch.Tensor, facts: Sequence[VAEFacts], job: _Job) -> torch.Tensor:
    shared = can_share(pool, range(len(pool.members)))
    output: Output | None = None
    if job.way == "seamless":
        output = reserve(facts[0].shape, facts[0].dtype, shared=shared)
    elif job.way == "own tiles":
        output = reserve(facts[0].own, facts[0].dtype, shared=shared)
    elif job.way == "tiles":
        shape = pool.call("tiled_shape", job.spec, tuple(latent.shape), job.tiles, ranks=[0])[0]
        output = reserve(shape, facts[0].dtype, shared=shared)
    given = share(latent, shared=shared)
    states = random_states.take()
    request = DecodeRequest(
        spec=job.spec,
        way=job.way,
        latent=given.block,
        output=output.block if output else None,
        ranks=job.ranks,
        batch=max(1, min(fact.batch for fact in facts)),
        budget=_budget(facts),
        tiles=job.tiles,
        # tied to the driver's state, so that a seeded run repeats
        seed=int(torch.from_numpy(states[0].copy()).to(torch.int64).sum()),
        random=states,
    )
    try:
        replies = _ask(pool, "decode", request, range(job.ranks))
    except BaseException:
        # the error keeps this frame, which must not keep the memory
        del output, given
        raise
    if any(reply.drew for reply in replies):
        log.warning("this VAE draws noise: each tile has a seed of its own, so tiles differ from VAEDecodeTiled's")
    if output is None:
        result = _part(replies[0])
    else:
        result = output.tensor
        height = sum(last - first for first, last in (reply.rows for reply in replies))
        if height != result.shape[-3]:
            raise WorkerError("The workers did not decode every row", f"{height} of {result.shape[-3]}")
        for reply in replies:
            if reply.part is not None:
                first, last = reply.rows
                result[..., first:last, :, :] = _part(reply)
    # as ComfyUI does, batches of videos become one row of frames
    return result.view(-1, *result.shape[-3:]) if result.ndim == 5 else result


def _ask(pool: Pool, verb: str, request: Any, ranks: Sequence[int]) -> list[PartReply]:
    """Send a request, and show how it goes on the canvas."""
    bars: list[comfy.utils.ProgressBar] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        try:
            bars[0].update_absolute(done, total)
        except model_management.InterruptProcessingException:
            # it has taken the flag down, which the pool is to see: the workers end together
            model_management.interrupt_current_processing()

    replies: list[PartReply] = pool.call(verb, request, ranks=ranks, progress=show)
    return replies


def _budget(facts: Sequence[VAEFacts]) -> int:
    return min(fact.budget for fact in facts) * len(facts)


def _part(reply: PartReply) -> torch.Tensor:
    assert reply.part is not None
    return reply.part.open()


def _let_go(pool: Pool, spec: ModelSpec, *, keep: bool) -> None:
    if not keep and pool.alive():
        pool.call("release_vae", spec)
