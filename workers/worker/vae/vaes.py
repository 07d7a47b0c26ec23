"""The VAEs of one worker: what is loaded, what was found out about each, and the verbs that use them."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy import model_management

from ....loaders.source import Source
from ....raylight.config import ModelSpec
from ....raylight.errors import UnsupportedError
from ....raylight.mesh import Mesh
from ....raylight.rows import selftest
from ....raylight.rows.strips import Rows, Strips
from ....vae import budget
from ....vae.divided import strip_of
from ....vae.frames import last_convolution
from ...wire.vae_messages import Block, DecodeRequest, EncodeRequest, PartReply, TileSizes, VAEFacts, VAEPlan
from .. import memory
from ..conversation import Line
from . import own_tiles as vae_own_tiles
from . import strips as vae_strips
from . import tiles as vae_tiles
from .loading import attend, load_vae

log = logging.getLogger(__name__)

COLUMNS = 6
FRAMES = 3
"""Size of a self-test's latent: enough for a decoder's caches of time."""
NEVER_CUT = 1 << 50
ROW_DIMS = (2, 3)
"""Dims of a latent, besides batch and channels, that has rows."""


@dataclass(frozen=True)
class Tested:
    """What a self-test showed.

    Attributes:
        difference: see VAEFacts, as `refusal`.
        made: shape of the whole test's result; () where it failed.
        given: shape of its input.
        last: name of the convolution that ran last, "" for none.
    """

    difference: float
    refusal: str
    made: tuple[int, ...]
    given: tuple[int, ...]
    last: str


class WorkerVAEs:
    """Loads VAEs by spec and keeps them until they are released; results of self-tests outlive them.

    Args:
        here: the spec by which this machine has the file that the driver's names.
    """

    def __init__(self, here: Callable[[ModelSpec], ModelSpec] = lambda spec: spec) -> None:
        self._here = here
        self._loaded: dict[ModelSpec, tuple[Any, Source]] = {}
        self._tested: dict[tuple[Any, ...], Tested] = {}

    def plan(self, request: VAEPlan, mesh: Mesh) -> VAEFacts | None:
        """Load the VAE and see what this rank can do with it. None from ranks that have no rows to do.

        All ranks of the pool are asked at once: they test together.

        Raises:
            LoadError: the file is no VAE.
            UnsupportedError: the VAE makes something other than pictures or sound.
        """
        vae = self._vae(request.spec)
        refusal = vae_strips.undividable(vae)
        shape = vae_strips.latent_shape(vae, request) if not refusal else ()
        if not refusal and len(shape) - 2 not in ROW_DIMS:
            refusal = "it has no rows"
        if refusal:
            return VAEFacts(
                family=type(vae.first_stage_model).__name__,
                ranks=0,
                difference=float("inf"),
                limit=0.0,
                refusal=refusal,
                batch=1,
                budget=0,
                shape=(),
                dtype=vae_strips.output_dtype(vae),
                tiles=not getattr(vae, "handles_tiling", False),
                own=vae_own_tiles.shape_of(vae, request),
            )
        ranks = min(mesh.parallel.world, shape[-2])
        # a group can only be made by all ranks together
        comm = mesh.first(ranks)
        if comm is None:
            return None
        rows = Rows(comm, Strips.of(ranks + 1, ranks=ranks, rank=comm.rank))
        tested = self._test(vae, request, rows, shape) if request.test else None
        model = vae.first_stage_model
        return VAEFacts(
            family=type(model).__name__,
            ranks=ranks,
            difference=tested.difference if tested else float("inf"),
            limit=selftest.limit(vae.vae_dtype),
            refusal=tested.refusal if tested else "it was not tried",
            batch=vae_strips.fitting(vae, request, shape, ranks, mesh.parallel.world),
            budget=budget.budget(model, vae.device),
            shape=vae_strips.result_shape(vae, request, shape, tested.given, tested.made) if tested else (),
            dtype=vae_strips.output_dtype(vae),
        )

    def tiled_shape(self, spec: ModelSpec, shape: tuple[int, ...], tiles: TileSizes) -> tuple[int, ...]:
        """Shape of what a tiled decode of a latent of this shape makes: [frames, rows, width, channels]."""
        return vae_tiles.shape_of(self._vae(spec), shape, tiles)

    def decode(self, request: DecodeRequest, mesh: Mesh, line: Line) -> PartReply:
        """Decode this rank's part.

        Raises:
            Cancelled: the driver wanted it to end. All ranks that take part raise it.
        """
        vae = self._vae(request.spec)
        if request.way == "whole":
            return self._timed(mesh, lambda: _whole(vae, request, mesh))
        if request.way == "own tiles":
            return self._timed(mesh, lambda: vae_own_tiles.decode(vae, request, mesh, line))
        if request.way == "tiles":
            return self._timed(mesh, lambda: vae_tiles.decode(vae, request, mesh, line))
        last = self._last(vae, request.latent.shape, encode=False, ranks=request.ranks)
        return self._timed(mesh, lambda: vae_strips.decode(vae, request, mesh, line, last))

    def encode(self, request: EncodeRequest, mesh: Mesh, line: Line) -> PartReply:
        """Encode this rank's part."""
        vae = self._vae(request.spec)
        if request.way == "own tiles":
            return self._timed(mesh, lambda: vae_own_tiles.encode(vae, request, mesh, line))
        return self._timed(mesh, lambda: vae_strips.encode(vae, request, mesh, line))

    def release(self, spec: ModelSpec) -> None:
        """Forget a VAE."""
        vae, _ = self._loaded.pop(spec, (None, None))
        if vae is not None:
            vae.patcher.detach()
            del vae
            model_management.cleanup_models_gc()
            memory.give_back()

    def close(self) -> None:
        """Forget all of them."""
        for spec in list(self._loaded):
            self.release(spec)

    def _vae(self, spec: ModelSpec) -> Any:
        if spec not in self._loaded:
            self._loaded[spec] = load_vae(self._here(spec))
        vae, source = self._loaded[spec]
        source.check()
        return vae

    def _timed(self, mesh: Mesh, work: Callable[[], PartReply]) -> PartReply:
        started, waited = time.perf_counter(), mesh.seconds
        reply = work()
        log.debug("%.2f s, %.2f in collectives", time.perf_counter() - started, mesh.seconds - waited)
        return PartReply(
            rows=reply.rows,
            part=reply.part,
            drew=reply.drew,
            seconds=time.perf_counter() - started,
            waiting=mesh.seconds - waited,
        )

    def _last(self, vae: Any, shape: tuple[int, ...], *, encode: bool, ranks: int) -> torch.nn.Module | None:
        """The convolution after which frames are finished, as the self-test saw it."""
        tested = self._tested.get(_kind(vae, shape, encode=encode, ranks=ranks))
        return vae.first_stage_model.get_submodule(tested.last) if tested and tested.last else None

    def _test(self, vae: Any, request: VAEPlan, rows: Rows, shape: tuple[int, ...]) -> Tested:
        """Run a small random input whole and in strips, once per class and configuration.

        All ranks know a kind or none does, since they are asked the same; a refusal is raised on all of them at the
        same call, and nothing is exchanged after it. So an error may be caught here, and the driver compares.
        """
        kind = _kind(vae, shape, encode=request.encode, ranks=rows.comm.size)
        if kind not in self._tested:
            self._tested[kind] = _tested(vae, request, rows, shape)
            log.info("self-test of %s: %s", type(vae.first_stage_model).__name__, self._tested[kind])
        return self._tested[kind]


def _kind(vae: Any, shape: tuple[int, ...], *, encode: bool, ranks: int) -> tuple[Any, ...]:
    """What a self-test's result holds for."""
    model = vae.first_stage_model
    configuration = tuple((name, tuple(weight.shape)) for name, weight in model.named_parameters())
    frames = min(shape[2], 2) if len(shape) == 5 else 0
    return type(model), configuration, vae.vae_dtype, encode, frames, ranks


def _tested(vae: Any, request: VAEPlan, rows: Rows, shape: tuple[int, ...]) -> Tested:
    model, strips = vae.first_stage_model, rows.strips
    sample = vae_strips.sample(vae, request, shape, rows=strips.total, columns=COLUMNS, frames=FRAMES)
    needed = (vae.memory_used_encode if request.encode else vae.memory_used_decode)(sample.shape, vae.vae_dtype)
    model_management.load_models_gpu([vae.patcher], memory_required=needed)
    function = model.encode if request.encode else model.decode

    def run(x: torch.Tensor) -> torch.Tensor:
        with budget.agreed(model, strips, NEVER_CUT):
            result: torch.Tensor = function(x)
        if not isinstance(result, torch.Tensor):
            raise UnsupportedError(f"{type(model).__name__} does not make pictures", type(result).__name__)
        return result

    torch.manual_seed(selftest.SEED)
    whole, last = last_convolution(model, lambda: run(sample))
    names = {module: name for name, module in model.named_modules()}
    known = functools.partial(
        Tested, made=tuple(whole.shape), given=tuple(sample.shape), last=names[last] if last else ""
    )
    if rows.comm.size == 1:
        return known(difference=0.0, refusal="")
    try:
        difference = selftest.difference(run, whole, sample, strips, lambda: strip_of(model, rows, attend))
    except UnsupportedError as error:
        return known(difference=float("inf"), refusal=str(error))
    return known(difference=difference, refusal="")


def _whole(vae: Any, request: DecodeRequest, mesh: Mesh) -> PartReply:
    """All of it on the first rank, by ComfyUI's own decode."""
    if mesh.rank:
        return PartReply(rows=(0, 0))
    result = vae.decode(request.latent.open())
    if not isinstance(result, torch.Tensor):
        raise UnsupportedError(
            f"{type(vae.first_stage_model).__name__} does not make pictures or sound", type(result).__name__
        )
    result = result.cpu().contiguous()
    inline = result.view(-1).view(torch.uint8).numpy().tobytes()
    part = Block(shape=tuple(result.shape), dtype=result.dtype, arena=None, inline=inline)
    return PartReply(rows=(0, result.shape[1]), part=part)
