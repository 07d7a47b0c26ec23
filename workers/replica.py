"""The driver's view of the ranks that answer one model call together, and of what they already hold."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..raylight.config import ModelSpec
from .arena import Arena
from .messages import Forward, ForwardReply, FunctionRef, ModelFacts, PatchRequest
from .pool import Pool
from .transfer import Encoder, Reference

NO_PATCHES = ""


@dataclass
class Traffic:
    """Running totals of a replica's model calls: bytes that crossed or were named, and seconds by place."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_held: int = 0
    seconds: float = 0.0
    worker_seconds: float = 0.0
    collective_seconds: float = 0.0


class Replica:
    """Sends model calls to one data-parallel replica of a pool.

    It lives as long as the pool does: a new pool gets new replicas, so nothing is assumed to be held there.
    `resident` names the models whose weights may be on the workers' devices.

    Args:
        refer: names live objects that the workers have their own of (see transfer.Encoder).
    """

    def __init__(self, pool: Pool, ranks: Sequence[int], refer: Reference) -> None:
        self.pool = pool
        self.traffic = Traffic()
        self.resident: set[ModelSpec] = set()
        self._ranks = tuple(ranks)
        self._encoder = Encoder(refer, shared=self._can_share())
        self._facts: dict[ModelSpec, list[ModelFacts]] = {}
        self._holders: dict[ModelSpec, weakref.WeakSet[Any]] = {}
        self._states: dict[ModelSpec, str] = {}
        self._functions: dict[int, tuple[int, Callable[..., Any]]] = {}
        self._next_function = 0

    def load(self, spec: ModelSpec, holder: object) -> list[ModelFacts]:
        """Have the model loaded on every rank; what each says of its copy.

        It stays loaded as long as one of its holders lives: another load makes room by releasing the others.
        """
        self._holders.setdefault(spec, weakref.WeakSet()).add(holder)
        if spec not in self._facts:
            for unused in [known for known in self._facts if not self._holders[known]]:
                self._release(unused)
            self._facts[spec] = self._call("load", spec)
            self._states[spec] = NO_PATCHES
        return self._facts[spec]

    def patch(
        self, spec: ModelSpec, state: str, patches: dict[str, Any], objects: dict[str, Any], *, force_cast: bool
    ) -> None:
        """Bring the model's weight and object patches to `state`; does nothing where it is there already."""
        if self._states[spec] == state:
            return
        parcel = self._encoder.encode((patches, objects), keep=True)
        self._call("patch", PatchRequest(spec=spec, state=state, patches=parcel, force_cast=force_cast))
        self._states[spec] = state

    def define(self, functions: Sequence[Callable[..., Any]]) -> dict[int, FunctionRef]:
        """Make callables known to the workers, all new ones in one parcel so that they share what they close over.

        Returns references by `id()` of the callable; the callables are held until `forget`.
        """
        new = {}
        for function in functions:
            if id(function) not in self._functions:
                self._next_function += 1
                self._functions[id(function)] = (self._next_function, function)
                new[self._next_function] = function
        if new:
            try:
                self._call("define", self._encoder.encode(new))
            except BaseException:
                self._functions.clear()
                raise
        return {identity: FunctionRef(number) for identity, (number, _) in self._functions.items()}

    def forget(self) -> None:
        """The run is over: drop its callables, whose state must not reach the next one."""
        if self._functions and self.pool.alive():
            self._functions.clear()
            self._call("forget")

    def forward(
        self,
        spec: ModelSpec,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        fresh: Sequence[torch.Tensor],
        random: tuple[Any, Any] | None,
    ) -> tuple[Any, tuple[Any, Any] | None]:
        """Run a method of the diffusion model on all ranks. Returns its output (CPU tensors) and generator states."""
        started = time.perf_counter()
        self.resident.add(spec)
        call = self._encoder.encode((args, kwargs), fresh=fresh)
        replies: list[ForwardReply] = self._call("forward", Forward(spec=spec, method=method, call=call, random=random))
        first = replies[0]
        if first.output is not None and first.output.inline:
            self._encoder.expect_reply(len(first.output.inline))
        output = self._encoder.decode_reply(first.output)
        traffic = self.traffic
        traffic.calls += 1
        traffic.seconds += time.perf_counter() - started
        traffic.worker_seconds += max(reply.seconds for reply in replies)
        traffic.collective_seconds += max(reply.waiting for reply in replies)
        traffic.bytes_sent, traffic.bytes_held = self._encoder.bytes_sent, self._encoder.bytes_held
        return output, first.random

    def offload(self) -> None:
        """Take the weights off the workers' devices."""
        if self.resident and self.pool.alive():
            self._call("offload")
            self.resident.clear()

    def _release(self, spec: ModelSpec) -> None:
        del self._facts[spec], self._states[spec], self._holders[spec]
        self.resident.discard(spec)
        self._call("release", spec)

    def _call(self, verb: str, *arguments: Any) -> list[Any]:
        return self.pool.call(verb, *arguments, ranks=self._ranks)

    def _can_share(self) -> bool:
        if not Arena.supported():
            return False
        probe = Arena(1 << 12)
        return all(self._call("share", probe.ref))
