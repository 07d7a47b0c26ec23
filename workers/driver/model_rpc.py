"""What all clones of one MODEL share: where its weights are, and how a model call gets there and back."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy
import torch
from comfy import model_management

from ...loaders.files import changed
from ...raylight import cfg
from ...raylight.config import ModelSpec, PoolConfig, WorkerSettings
from ...raylight.errors import UnsupportedError, WorkerError
from ...raylight.names import functions, name_of, on_options
from ..pool.lanes import Lanes
from ..pool.pool import REGISTRY, Pool, acquire
from ..wire import deferred, numerics, random_states, standing
from ..wire.comfy_host import describe, device_uuid
from ..wire.messages import PREFIX, Kind, LoadRequest, ModelFacts, Wrapped, seen
from ..wire.parcels import CPU, Reference
from ..wire.said import Told
from . import refusals
from .conds import PER_ROW, rows_of
from .group import Call, Patches, Run, Traffic
from .groups import Groups
from .place import Place

log = logging.getLogger(__name__)

FORWARD = frozenset({"forward", "_forward"})
"""Methods that groups may share out; all others run on the first."""
DRIVER_ONLY = frozenset({"wrappers", "callbacks", "easycache", "lazycache", PER_ROW})
"""Keys of transformer_options that only code around the cut reads."""
AROUND = "diffusion_model"
"""Kind of the wrappers of nodes around the model's forward, which may change what comes in."""
SETTINGS = "raylight_settings"
"""Key of the patcher's attachment that holds its WorkerSettings."""
LANES = "lanes"
"""Key of a pool's notes; replicas are under their numbers."""
CARRIED_OBJECTS = frozenset({"manual_cast_dtype"})
"""Object patches outside the diffusion model that change what the model does with its weights."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise ComfyUI's interrupt before and after: it outranks an error that ending a wait caused."""
    model_management.throw_exception_if_processing_interrupted()
    try:
        yield
    finally:
        model_management.throw_exception_if_processing_interrupted()


class ModelRpc:
    """The way to one model on a pool, which may have several cfg groups.

    It holds a spec, not actors: after a failure the next call builds a new pool and loads there again.

    Args:
        place: which pool.
        dtype: what plain ComfyUI keeps the weights in.
        refer: names live objects that the workers have their own of (see Encoder).
        told: what ComfyUI's log has of the model.
        replica: which data-parallel replica of the pool answers.

    Attributes:
        answered: model calls that have come back so far.
        together: runs the evaluation of several conditions side by side (see conds.calc_cond_batch).
    """

    KIND: ClassVar[Kind] = "diffusion"

    def __init__(
        self, place: Place, spec: ModelSpec, dtype: torch.dtype, refer: Reference, told: Told, *, replica: int = 0
    ) -> None:
        self.place = place
        self.spec = spec
        self.told = told
        self._replica = replica
        self._dtype = dtype
        self._request = LoadRequest(spec=spec, dtype=str(dtype).removeprefix("torch."), kind=self.KIND)
        self.answered = 0
        self.together = cfg.Together()
        self._refer = refer
        self._others: dict[int, ModelRpc] = {}
        self._environment = describe()
        self._told: set[str] = set()
        self._wrapped: Wrapped | None = None
        self._lock = threading.RLock()

    @property
    def config(self) -> PoolConfig:
        """The settings of its pool, as they are now."""
        return self.place.config

    @property
    def replica(self) -> int:
        """Which data-parallel replica of the pool answers."""
        return self.place.replica if self.place.chooses else self._replica

    @property
    def resident(self) -> bool:
        """Whether the model's weights may be on the workers' devices now."""
        groups = self._live_groups()
        return groups is not None and any(self.spec in group.resident for group in groups.parts)

    def at(self, replica: int) -> ModelRpc:
        """The way to the same model on another replica; it lives as long as this one does."""
        if replica == self.replica:
            return self
        if replica not in self._others:
            self._others[replica] = type(self)(
                self.place, self.spec, self._dtype, self._refer, self.told, replica=replica
            )
        return self._others[replica]

    def lanes(self) -> Lanes:
        """What runs tasks side by side on the pool, which is started where needed."""
        with interruptible():
            return _lanes(self._pool())

    def load(self) -> list[ModelFacts]:
        """Have the weights on the workers, starting the pool where needed."""
        with self._lock:
            return self._loaded().load(self._request, self)

    def share(self, *, resident: bool) -> int:
        """Bytes of the pool's copy on the device of this process, once it is used or (`resident`) now."""
        mine = device_uuid(model_management.get_torch_device())
        groups = self._live_groups()
        return groups.share(self.spec, mine, resident=resident) if mine and groups is not None else 0

    @contextlib.contextmanager
    def wrapping(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Iterator[None]:
        """Calls of the model's forward meanwhile are made by a node's function, on the workers.

        Args:
            arguments: what ComfyUI gives to it beside the function that calls the model.
        """
        more = {key: value for key, value in arguments.items() if key not in ("input", "timestep", "c")}
        self._wrapped = Wrapped(
            function=function,
            input=arguments["input"],
            timestep=arguments["timestep"],
            given=seen(arguments["c"]),
            more=more,
        )
        try:
            yield
        finally:
            self._wrapped = None

    def call(
        self, patcher: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: Sequence[str] = ()
    ) -> Any:
        """Run a method of the diffusion model on the pool and return its output on the input's device.

        Args:
            patcher: the RemotePatcher that samples, or None.
            names: the method's positional parameters.
        """
        if method in FORWARD and self.together.inside():
            output = self.together.ask(self._prepare(patcher, method, args, kwargs))
        else:
            parts = self._divide(method, args, kwargs, names)
            calls = {number: self._prepare(patcher, method, *part) for number, part in enumerate(parts)}
            answers = self.answer(calls, several=len(calls) > 1)
            output = cfg.join([answers[number] for number in calls]) if len(calls) > 1 else answers[0]
        self.answered += 1
        return output

    def answer(self, calls: Mapping[int, Call], *, several: bool = True) -> dict[int, Any]:
        """Outputs of some of the calls, by number: one per group and at the same time.

        Args:
            calls: by number of the condition or part they belong to, the oldest first.
            several: whether there are more calls than these to the same model, which may be elsewhere.

        Raises:
            UnsupportedError: a patch drew random numbers in one of several calls.
        """
        with self._lock:
            groups = self._loaded()
            self._tell(sum(call.method in FORWARD for call in calls.values()))
            chosen = cfg.assign(calls, len(groups.parts))
            for call in calls.values():
                for control in call.controls:
                    control.at(self.replica).load()
                if not groups.holds(call.spec, call.patches):
                    for other in _rpcs(call.patches.weights):
                        other.at(self.replica).load()  # a new pool, or one that made room, may not have it
            with interruptible(), standing.explaining(lambda: _changes(calls.values())), self._explained():
                found = groups.run({group: calls[number] for number, group in chosen.items()})
            outputs = {}
            for number, group in chosen.items():
                outputs[number], after = found[group]
                before = calls[number].random
                if before is None or after is None or _equal(before, after):
                    continue
                if several:
                    _refuse_random(self.config.parallel.degrees["cfg"])
                random_states.put(after)
            return outputs

    def offload(self) -> None:
        """Free the workers' devices; the next call brings the weights back."""
        with self._lock:
            groups = self._live_groups()
            if groups is not None:
                groups.offload(self.spec)

    def forget(self) -> None:
        """A sampling run has ended."""
        with self._lock:
            self._told.clear()
            groups = self._live_groups()
            if groups is not None:
                groups.forget()

    def live_pool(self) -> Pool | None:
        """The pool, where it runs."""
        pool = REGISTRY.get(self.config)
        return pool if pool is not None and pool.alive() else None

    def last_runs(self) -> list[Run]:
        """The last sampling run on each cfg group, where the pool lives since then."""
        groups = self._live_groups()
        return [group.last_run for group in groups.parts] if groups is not None else []

    def traffic(self, group: int = 0) -> Traffic:
        """Totals of the pool's calls on one cfg group so far."""
        return self._groups().parts[group].traffic

    def _pool(self) -> Pool:
        return acquire(self.config, self._environment, model_management.processing_interrupted)

    def _groups(self) -> Groups:
        pool = self._pool()
        if self.replica not in pool.notes:
            pool.notes[self.replica] = Groups(pool, _lanes(pool), pool.replicas[self.replica], self._refer)
        groups: Groups = pool.notes[self.replica]
        return groups

    def _loaded(self) -> Groups:
        with interruptible():
            groups = self._groups()
            groups.pool.agree_on(self.spec, _lanes(groups.pool).call_groups)
            with standing.explaining():
                facts = groups.load(self._request, self)
            self.told.say(facts[0].said, loading=True)
            return groups

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the file where it is the cause: a worker that touches a page of a truncated one just dies."""
        try:
            yield
        except WorkerError as error:
            if self.spec.now() != self.spec:
                raise changed(self.spec.path, str(error)) from error
            raise

    def _live_groups(self) -> Groups | None:
        pool = self.live_pool()
        return pool.notes.get(self.replica) if pool is not None else None

    def _tell(self, calls: int) -> None:
        """Say once per run that cfg_degree does not help, unless it did."""
        degree = self.config.parallel.degrees["cfg"]
        if degree == 1 or calls == 0 or self.replica:
            return
        if calls == 1 and "cfg" not in self._told:
            log.info(
                "cfg_degree=%d has nothing to divide: the model is called for one condition at a time "
                "(cfg 1, or a patch around the model that needs it so), on one of the groups",
                degree,
            )
        self._told.add("cfg")

    def _tell_sent(self, control: Any) -> None:
        """Say once per run what residuals cost that another process computed."""
        size = sum(tensor.nbytes for tensor in deferred.carried(control))
        if size and "control" not in self._told:
            self._told.add("control")
            log.warning(
                "The ControlNet runs in ComfyUI's process: its residuals, %.1f MiB, are sent to the workers at every "
                "model call. Load ControlNet (Ray) has the workers compute them",
                size / (1 << 20),
            )

    def _divide(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments for each group that takes part in a call that is not one condition's already."""
        if method in FORWARD and self.config.parallel.degrees["cfg"] > 1:
            divided = rows_of(args, kwargs, names, self.config.parallel.degrees["cfg"])
            if divided is not None:
                return divided
        return [(args, kwargs)]

    def _prepare(self, patcher: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Everything about a call that depends on when it is made; nothing is sent yet."""
        patches = patches_in(patcher) if patcher is not None else Patches()
        found: list[Callable[..., Any]] = []
        around: list[Callable[..., Any]] = []

        def strip(options: Any) -> Any:
            if not isinstance(options, dict):
                return options
            refusals.check_options(options)
            kept = {key: value for key, value in options.items() if key not in DRIVER_ONLY}
            found.extend(functions(kept))
            around.extend(functions(options.get("wrappers", {}).get(AROUND, {})))
            return kept

        args, kwargs = on_options(args, kwargs, strip)
        self._tell_sent(kwargs.get("control"))
        wrapped = self._wrapped if method in FORWARD else None
        if wrapped is not None:
            found.append(wrapped.function)
        inputs = cfg.tensors(args[:1])
        sources = {source for tensor in deferred.deferred_in(kwargs.get("control")) for source in tensor.sources}
        return Call(
            spec=self.spec,
            method=method,
            args=args,
            kwargs=kwargs,
            functions=tuple(found),
            around=tuple(around),
            patches=patches,
            fresh=(
                *inputs,
                *((wrapped.input, wrapped.timestep) if wrapped else ()),
                *(tensor for asked, _ in sources for tensor in cfg.tensors(asked.arguments.get("x"))),
            ),
            random=random_states.take() if found or patches.objects else None,
            settings=settings_of(patcher),
            numerics=numerics.take(),
            controls=tuple(self._checked(control) for control in {control for _, control in sources}),
            device=inputs[0].device if inputs else CPU,
            told=self.told,
            wrapped=wrapped,
        )

    def _checked(self, control: ModelRpc) -> ModelRpc:
        """The way to a ControlNet, which must be on this pool."""
        if control.config != self.config:
            raise UnsupportedError(
                "The ControlNet and the model are on different pools",
                f"{control.config} and {self.config}",
                "Connect Load ControlNet (Ray) to the model that is sampled",
            )
        return control


def _lanes(pool: Pool) -> Lanes:
    if LANES not in pool.notes:
        pool.notes[LANES] = Lanes(pool, random_states.keep)
    lanes: Lanes = pool.notes[LANES]
    return lanes


def settings_of(patcher: Any) -> WorkerSettings:
    """How a patcher, or None, wants the workers to run its model."""
    found: WorkerSettings | None = patcher.get_attachment(SETTINGS) if patcher is not None else None
    return found or WorkerSettings()


def patches_in(patcher: Any, prefix: str = PREFIX) -> Patches:
    """The weight and object patches of a patcher with the hooks it has at the moment.

    Args:
        prefix: of the names of what the workers have of its model.
    """
    objects = {
        name: value
        for name, value in patcher.object_patches.items()
        if name.startswith(prefix) or name in CARRIED_OBJECTS
    }
    weights = {name: list(value) for name, value in patcher.patches.items() if name.startswith(prefix)}
    for name, value in patcher.get_combined_hook_patches(patcher.current_hooks).items():
        weights[name] = weights.get(name, []) + list(value)
    hooks = patcher.current_hooks.hooks if patcher.current_hooks else []
    if not (weights or objects or patcher.force_cast_weights):
        return Patches()
    fingerprint = (
        patcher.patches_uuid,
        patcher.force_cast_weights,
        *(part for item in objects.items() for part in item),
        *(part for hook in hooks for part in (hook.hook_ref, hook.strength)),
    )
    return Patches(fingerprint=fingerprint, weights=weights, objects=objects, force_cast=patcher.force_cast_weights)


def patches_of(patcher: Any, key: str) -> list[Any]:
    """The patches of one weight of a patcher, with those of the hooks it has at the moment."""
    hooked = patcher.get_combined_hook_patches(patcher.current_hooks)
    return [*patcher.patches.get(key, ()), *hooked.get(key, ())]


def _changes(calls: Iterable[Call]) -> list[str]:
    """What nodes change in the model, by name."""
    found: list[str] = []
    for call in calls:
        found += map(name_of, (*call.functions, *call.around))
        replaced = {name: value for name, value in call.patches.objects.items() if name.startswith(PREFIX)}
        found += [f"{name_of(value)}, in the place of {name}" for name, value in replaced.items()]
        if call.kwargs.get("control"):
            found.append("a ControlNet")
    return found


def _rpcs(value: Any) -> Iterator[ModelRpc]:
    """The models whose weights patches refer to."""
    if isinstance(value, torch.Tensor):
        rpc = getattr(value, "raylight_rpc", None)
        if rpc is not None:
            yield rpc
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _rpcs(item)


def _refuse_random(degree: int) -> None:
    raise UnsupportedError(
        "A patch inside the model draws random numbers, and the conditions are divided over several groups",
        f"cfg_degree is {degree}: each group would draw the same numbers, where ComfyUI draws them in turn",
        "Set cfg_degree to 1 (ulysses_degree can have the workers), or remove the node",
    )


def _equal(left: tuple[Any, Any], right: tuple[Any, Any]) -> bool:
    return all(numpy.array_equal(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None)
