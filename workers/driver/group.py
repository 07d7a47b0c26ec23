"""The driver's view of the ranks that answer one model call together, and of what they already hold."""

from __future__ import annotations

import logging
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch

from ...raylight import cfg
from ...raylight.config import ModelSpec, WorkerSettings
from ...raylight.names import on_options
from ..wire.arena import Arena
from ..wire.encoder import Encoder, Shelf
from ..wire.messages import Forward, ForwardReply, FunctionRef, LoadRequest, ModelFacts, PatchRequest, Wrapped
from ..wire.parcels import CPU, Reference
from ..wire.said import Told

log = logging.getLogger(__name__)

NO_PATCHES = ""


class Caller(Protocol):
    """The pool, or what stands before it."""

    def call(self, verb: str, *arguments: Any, ranks: Sequence[int]) -> list[Any]: ...

    def alive(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Patches:
    """A state of weight and object patches. `fingerprint` has what tells it from others; it is empty for none."""

    fingerprint: tuple[Any, ...] = ()
    weights: Mapping[str, Any] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    force_cast: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """A model call as the driver means it: nothing of it has been sent.

    Attributes:
        functions: the callables in its transformer_options.
        around: those of nodes that run around it, in the driver.
        fresh: tensors that change at each call.
        random: the driver's generator states where a patch may draw.
        settings: how the workers run it.
        numerics: how this process's torch sums products when the call is made.
        controls: links to the ControlNets that its arguments are to come from.
        device: where its output is to be.
        told: what ComfyUI's log has of the model.
        wrapped: a function around it that runs on the workers, one of `functions`.
        sampling: whether it is one of a sampling run, whose traffic is reported.
    """

    spec: ModelSpec
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    functions: tuple[Callable[..., Any], ...]
    patches: Patches
    fresh: tuple[torch.Tensor, ...]
    random: tuple[Any, Any] | None
    settings: WorkerSettings
    numerics: tuple[Any, ...] = ()
    around: tuple[Callable[..., Any], ...] = ()
    controls: tuple[Any, ...] = ()
    device: torch.device = CPU
    told: Told = field(default_factory=Told)
    wrapped: Wrapped | None = None
    sampling: bool = True


@dataclass
class Traffic:
    """Running totals of a group's model calls: bytes that crossed or were named, and seconds by place."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_held: int = 0
    seconds: float = 0.0
    worker_seconds: float = 0.0
    collective_seconds: float = 0.0

    def since(self, before: Traffic) -> Traffic:
        """What was added to an earlier state."""
        return Traffic(**{part.name: getattr(self, part.name) - getattr(before, part.name) for part in fields(self)})


@dataclass(frozen=True)
class Run:
    """A sampling run that has ended: at how many noise levels it called the model, and its traffic."""

    steps: int = 0
    traffic: Traffic = field(default_factory=Traffic)


class Group:
    """Sends model calls to the ranks of a pool that share one sequence.

    It lives as long as the pool does: a new pool gets new groups, so nothing is assumed to be held there.
    `resident` names the models whose weights may be on the workers' devices, `last_run` has the traffic of the last
    sampling run that called a model here, and `noise_levels` those of the run at hand.

    Args:
        refer: names live objects that the workers have their own of (see Encoder).
        models_kept: models that stay loaded although nothing holds them, at most, together with those held.
        shelf: shared with the groups that get the same patches.
    """

    def __init__(
        self,
        pool: Caller,
        ranks: Sequence[int],
        refer: Reference,
        *,
        models_kept: int = 2,
        shelf: Shelf | None = None,
    ) -> None:
        self.pool = pool
        self.traffic = Traffic()
        self.resident: set[ModelSpec] = set()
        self.last_run = Run()
        self._levels: set[float] = set()
        self._before = Traffic()
        self._ranks = tuple(ranks)
        self._encoder = Encoder(refer, shared=can_share(pool, self._ranks), shelf=shelf)
        self._facts: dict[ModelSpec, list[ModelFacts]] = {}
        self._holders: dict[ModelSpec, weakref.WeakSet[Any]] = {}
        self._states: dict[ModelSpec, tuple[Any, ...]] = {}
        self._functions: dict[int, tuple[int, Callable[..., Any]]] = {}
        self._next_function = 0
        self._told: set[str] = set()
        self._recorded: set[ModelSpec] = set()  # whose calls are, without the user having asked for it
        self._models_kept = models_kept

    def load(self, request: LoadRequest, holder: object) -> list[ModelFacts]:
        """Have the model loaded on every rank; what each says of its copy.

        It stays loaded as long as one of its holders lives. Another load releases what nobody holds, the
        least recently used first, where there are too many.
        """
        spec = request.spec
        self._holders.setdefault(spec, weakref.WeakSet()).add(holder)
        if spec in self._facts:
            self._facts[spec] = self._facts.pop(spec)  # the last one used
            return self._facts[spec]
        unused = [known for known in self._facts if not self._holders[known]]
        while unused and len(self._facts) >= self._models_kept:
            self._release(unused.pop(0))
        if spec.reader == "map":
            self._facts[spec] = self._call("load", request)
        else:  # one reader at a time: such files are on a network, and each rank reads all of it
            self._facts[spec] = [
                facts for rank in self._ranks for facts in self.pool.call("load", request, ranks=[rank])
            ]
        self._states[spec] = ()
        return self._facts[spec]

    @property
    def loaded(self) -> dict[ModelSpec, list[ModelFacts]]:
        """What the ranks have said of each model that is loaded on them."""
        return dict(self._facts)

    def holds(self, spec: ModelSpec, patches: Patches) -> bool:
        """Whether the model has these patches already."""
        return _same(self._states[spec], patches.fingerprint)

    def share(self, spec: ModelSpec, device: str, *, resident: bool) -> int:
        """Bytes of the model on the device of this uuid once it is used, or (`resident`) that may be there now."""
        held = self._facts.get(spec, []) if spec in self.resident or not resident else []
        return sum(facts.bytes for facts in held if facts.uuid == device)

    def run(self, call: Call) -> tuple[Any, tuple[Any, Any] | None]:
        """Run a call on all ranks, its patches and callables first.

        Returns its output, and the workers' generator states where the call brought some.
        """
        self.patch(call.spec, call.patches)
        args, kwargs, wrapped = call.args, call.kwargs, call.wrapped
        if call.functions:
            references = self.define(call.functions)

            def named(options: Any) -> Any:
                return cfg.mapped(options, lambda value: references.get(id(value), value))

            args, kwargs = on_options(args, kwargs, named)
            wrapped = wrapped and replace(wrapped, function=references[id(wrapped.function)])
        return self._forward(call, args, kwargs, wrapped)

    def patch(self, spec: ModelSpec, patches: Patches) -> None:
        """Bring the model's weight and object patches to a state; does nothing where it is there already."""
        if self.holds(spec, patches):
            return
        parcel = self._encoder.encode((dict(patches.weights), dict(patches.objects)), keep=True)
        state = uuid.uuid4().hex if patches.fingerprint else NO_PATCHES
        self._states[spec] = (object(),)  # equals nothing: this may be left before the answer comes
        self._call("patch", PatchRequest(spec=spec, state=state, patches=parcel, force_cast=patches.force_cast))
        self._encoder.arrived()
        self._states[spec] = patches.fingerprint

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
        if self._levels:
            self.last_run = Run(steps=len(self._levels), traffic=self.traffic.since(self._before))
            self._levels, self._before = set(), replace(self.traffic)
        if self._functions and self.pool.alive():
            self._functions.clear()
            self._call("forget")

    def _forward(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], wrapped: Wrapped | None
    ) -> tuple[Any, Any]:
        started = time.perf_counter()
        self.resident.add(call.spec)
        self.resident.update(control.spec for control in call.controls)
        if len(args) > 1 and isinstance(args[1], torch.Tensor):
            self._levels.add(float(args[1].flatten()[0]))
        parcel = self._encoder.encode((args, kwargs, wrapped), fresh=call.fresh)
        settings = call.settings
        if call.spec in self._recorded and not settings.compile:
            settings = replace(settings, compile="cudagraphs")
        request = Forward(
            spec=call.spec,
            method=call.method,
            call=parcel,
            random=call.random,
            settings=settings,
            numerics=call.numerics,
        )
        replies: list[ForwardReply] = self._call("forward", request)
        first = replies[0]
        if first.output is not None and first.output.inline:
            self._encoder.expect_reply(len(first.output.inline))
        output = self._encoder.decode_reply(first.output, call.device)
        traffic = self.traffic
        traffic.calls += 1
        traffic.seconds += time.perf_counter() - started
        traffic.worker_seconds += max(reply.seconds for reply in replies)
        traffic.collective_seconds += max(reply.waiting for reply in replies)
        traffic.bytes_sent, traffic.bytes_held = self._encoder.bytes_sent, self._encoder.bytes_held
        if not call.sampling and not self._levels:  # the next run begins after it
            self._before = replace(traffic)
        call.told.say(first.said, loading=False)
        says = self._ranks[0] == 0  # every cfg group has the same tokens: one of them says it
        if first.advice and says and first.advice not in self._told:
            self._told.add(first.advice)
            log.warning("%s", first.advice)
        if first.waits and call.spec not in self._recorded:
            self._recorded.add(call.spec)
            if says:
                log.info(
                    "The GPUs wait for Python, which starts the kernels of a model call one by one: calls of this "
                    "model are recorded from now on and repeated at once, with the same result (docs/scaling.md)"
                )
        return output, first.random

    def outline(self, spec: ModelSpec, arguments: Mapping[str, Any]) -> Any:
        """What a call of a ControlNet would return, without the values (see deferred.outline)."""
        self.resident.add(spec)
        return self._call("outline", spec, self._encoder.encode(arguments))[0]

    def offload(self, spec: ModelSpec) -> None:
        """Take a model's weights, and those of models that nobody holds any more, off the workers' devices."""
        if not self.pool.alive():
            return
        for known in [known for known in self.resident if known == spec or not self._holders[known]]:
            self._call("offload", known)
            self.resident.discard(known)

    def _release(self, spec: ModelSpec) -> None:
        del self._facts[spec], self._states[spec], self._holders[spec]
        self.resident.discard(spec)
        self._recorded.discard(spec)
        self._call("release", spec)

    def _call(self, verb: str, *arguments: Any) -> list[Any]:
        return self.pool.call(verb, *arguments, ranks=self._ranks)


def can_share(pool: Caller, ranks: Sequence[int]) -> bool:
    """Whether these ranks can open this process's memory."""
    if not Arena.supported():
        return False
    probe = Arena.probe()
    return all(pool.call("share", probe.ref, ranks=ranks))


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    if len(left) != len(right):
        return False
    return all(
        a is b or (isinstance(a, (uuid.UUID, float, int, str)) and a == b) for a, b in zip(left, right, strict=True)
    )
