"""The MODEL on the pool: a standard ComfyUI patcher over a model without weights whose forward runs on the workers."""

from __future__ import annotations

import contextlib
import inspect
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy import model_management

from ..patches.registry import plan_for
from ..raylight.config import ModelSpec, PoolConfig
from . import ghost, refusals
from .comfy_host import describe, device_uuid
from .messages import ModelFacts
from .pool import REGISTRY, Pool, acquire
from .replica import NO_PATCHES, Replica

PREFIX = "diffusion_model."
DRIVER_ONLY = frozenset({"wrappers", "callbacks", "easycache", "lazycache"})
"""Keys of transformer_options that only code around the cut reads."""
CARRIED_OBJECTS = frozenset({"manual_cast_dtype"})
"""Object patches outside the diffusion model that change what the model does with its weights."""
REMOTE_METHODS = ("_forward", "forward", "preprocess_text_embeds")
"""Methods that need weights and are called from outside the diffusion model. `_forward` lies below the
DIFFUSION_MODEL wrappers, so those run in the driver; families without it are cut at `forward`."""


def load_model(config: PoolConfig, spec: ModelSpec) -> RemotePatcher:
    """A MODEL whose weights are loaded on the pool's workers, none of them here.

    Raises:
        LoadError: the file cannot be loaded.
        UnsupportedError: the family has no plan and the pool divides sequences. Nothing was loaded then.
        WorkerError: the pool did not start, or a worker failed while loading.
    """
    model, state = ghost.build(spec)
    if config.parallel.needs_plan:
        plan_for(type(model.diffusion_model))
    link = ModelLink(config, spec)
    facts = link.load()[0]
    base = ghost.without_weights(
        model, state, getattr(torch, facts.dtype), getattr(torch, facts.manual_cast) if facts.manual_cast else None
    )
    base.diffusion_model = remote_module(model.diffusion_model, link, base, getattr(torch, facts.dtype))
    # each rank holds one part of every activation
    base.memory_usage_factor /= config.parallel.sequence
    return RemotePatcher(base, model_management.get_torch_device(), model_management.unet_offload_device())


def start_pool(config: PoolConfig) -> Pool:
    """The running pool of a config, started where needed.

    Raises:
        WorkerError: it did not start in time, or a worker died while starting.
    """
    with _interruptible():
        return acquire(config, describe(), model_management.processing_interrupted)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise ComfyUI's interrupt before and after: it outranks an error that ending a wait caused."""
    model_management.throw_exception_if_processing_interrupted()
    try:
        yield
    finally:
        model_management.throw_exception_if_processing_interrupted()


class ModelLink:
    """What all clones of one MODEL share: where its weights are and how to reach them.

    It holds a spec, not actors: after a failure the next call builds a new pool and loads there again.
    """

    def __init__(self, config: PoolConfig, spec: ModelSpec) -> None:
        self.config = config
        self.spec = spec
        self._environment = describe()
        self._facts: list[ModelFacts] = []
        self._last_state: tuple[tuple[Any, ...], str] = ((), NO_PATCHES)
        self._lock = threading.RLock()

    def load(self) -> list[ModelFacts]:
        """Have the weights on the workers, starting the pool where needed."""
        with self._lock:
            self._loaded()
            return self._facts

    def share(self) -> int:
        """Bytes the pool's copy occupies on the device of this process."""
        mine = device_uuid(model_management.get_torch_device())
        replica = self._live_replica()
        if not mine or replica is None or self.spec not in replica.resident:
            return 0
        return sum(facts.bytes for facts in self._facts if facts.uuid == mine)

    def call(self, patcher: RemotePatcher | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method of the diffusion model on the pool and return its output on the input's device."""
        with self._lock:
            replica = self._loaded()
            objects: dict[str, Any] = {}
            if patcher is not None:
                objects = self._bring_patches(replica, patcher)
            args, kwargs, functions = self._replace_functions(replica, args, kwargs)
            random = _random_states() if functions or objects else None
            inputs = _tensors(args[:1])
            with _interruptible():
                output, after = replica.forward(self.spec, method, args, kwargs, fresh=inputs, random=random)
            if after is not None:
                _set_random_states(after)
            device = inputs[0].device if inputs else torch.device("cpu")
            return _map_tensors(output, lambda tensor: tensor.to(device))

    def offload(self) -> None:
        """Free the workers' devices; the next call brings the weights back."""
        with self._lock:
            replica = self._live_replica()
            if replica is not None:
                replica.offload()

    def forget(self) -> None:
        """A sampling run has ended."""
        with self._lock:
            replica = self._live_replica()
            if replica is not None:
                replica.forget()

    def traffic(self) -> Any:
        """Totals of this pool's calls so far (`replica.Traffic`)."""
        return self._replica().traffic

    def _pool(self) -> Pool:
        return acquire(self.config, self._environment, model_management.processing_interrupted)

    def _replica(self, index: int = 0) -> Replica:
        pool = self._pool()
        if index not in pool.notes:
            pool.notes[index] = Replica(pool, pool.replicas[index], refer)
        replica: Replica = pool.notes[index]
        return replica

    def _loaded(self) -> Replica:
        with _interruptible():
            replica = self._replica()
            self._facts = replica.load(self.spec, self)
            return replica

    def _live_replica(self) -> Replica | None:
        pool = REGISTRY.get(self.config)
        return pool.notes.get(0) if pool is not None and pool.alive() else None

    def _bring_patches(self, replica: Replica, patcher: RemotePatcher) -> dict[str, Any]:
        objects = {
            name: value
            for name, value in patcher.object_patches.items()
            if name.startswith(PREFIX) or name in CARRIED_OBJECTS
        }
        patches = {name: list(value) for name, value in patcher.patches.items() if name.startswith(PREFIX)}
        hooks = patcher.current_hooks.hooks if patcher.current_hooks else []
        for name, value in patcher.get_combined_hook_patches(patcher.current_hooks).items():
            patches[name] = patches.get(name, []) + list(value)
        state = NO_PATCHES
        if patches or objects or patcher.force_cast_weights:
            fingerprint = (
                patcher.patches_uuid,
                patcher.force_cast_weights,
                *(part for item in objects.items() for part in item),
                *(part for hook in hooks for part in (hook.hook_ref, hook.strength)),
            )
            if not _same(fingerprint, self._last_state[0]):
                self._last_state = (fingerprint, uuid.uuid4().hex)
            state = self._last_state[1]
        replica.patch(self.spec, state, patches, objects, force_cast=patcher.force_cast_weights)
        return objects

    def _replace_functions(
        self, replica: Replica, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
        """Take driver-only entries out of transformer_options and name the callables in it by number."""

        def on_options(change: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            """The arguments with `change` applied to transformer_options, wherever the family passes them."""
            changed = {key: change(value) if key == "transformer_options" else value for key, value in kwargs.items()}
            return tuple(change(value) if _is_options(value) else value for value in args), changed

        found: list[Callable[..., Any]] = []

        def strip(options: Any) -> Any:
            if not isinstance(options, dict):
                return options
            kept = {key: value for key, value in options.items() if key not in DRIVER_ONLY}
            found.extend(refusals.functions(kept))
            return kept

        def replace(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: replace(item) for key, item in value.items()}
            if type(value) in (list, tuple):
                return type(value)(replace(item) for item in value)
            return references[id(value)] if refusals.is_patch(value) else value

        args, kwargs = on_options(strip)
        if found:
            references = replica.define(found)
            args, kwargs = on_options(replace)
        return args, kwargs, bool(found)


def _is_options(value: Any) -> bool:
    """Whether a positional argument is transformer_options: ComfyUI's sampling always puts these in."""
    return isinstance(value, dict) and ("cond_or_uncond" in value or "sigmas" in value)


class _RemoteModule(torch.nn.Module):
    """Stands in for a diffusion model: no parameters, no children, so nothing to load, move or count.

    Mixed in before the family's own class, so that the family's `forward` (its wrapper handling and argument
    order) and its weightless helpers run here unchanged, and `isinstance` holds. Attributes come from the ghost.
    """

    weight_function = ()
    """With it, ComfyUI's training node takes this for a layer, asks for its `weight`, and is refused by name."""

    @property
    def weight(self) -> Any:
        refusals.refuse_training()

    def __getattr__(self, name: str) -> Any:
        if name == "_ghost":  # not set yet
            raise AttributeError(name)
        return getattr(self._ghost, name)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The ghost's: LoRA key maps and add_patches look keys up here. Values have no data."""
        return self._ghost.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


def remote_module(shadow: torch.nn.Module, link: ModelLink, base: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The diffusion model of `base`: of the ghost's class, its weights on the pool."""
    family: Any = type(shadow)
    cut = "_forward" if hasattr(family, "_forward") else "forward"
    base_ref = weakref.ref(base)

    def remote(method: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            owner = base_ref()
            return self.link.call(owner.current_patcher if owner else None, method, args, kwargs)

        return call

    methods = {name: remote(name) for name in REMOTE_METHODS if hasattr(family, name) and name != "forward"}
    if cut == "forward":
        inner = remote("forward")

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            options = kwargs.get("transformer_options", {})
            wrappers = comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
            )
            executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(
                lambda *a, **k: inner(self, *a, **k), self, wrappers
            )
            return executor.execute(*args, **kwargs)

        # families without `_forward` ignore these wrappers in plain ComfyUI too, unless their forward looks itself
        methods["forward"] = inner if not _handles_wrappers(family) else forward
    names = {"__module__": family.__module__, "__qualname__": family.__qualname__}
    module: Any = type(family.__name__, (_RemoteModule, family), {**methods, **names})
    instance: torch.nn.Module = module.__new__(module)
    torch.nn.Module.__init__(instance)
    instance.__dict__.update(_ghost=shadow, link=link, dtype=dtype)
    for key, parameter in shadow.state_dict(keep_vars=True).items():
        parameter.raylight_source = (link.spec, PREFIX + key)
    return instance.eval()


def _handles_wrappers(family: Any) -> bool:
    return "DIFFUSION_MODEL" in inspect.getsource(family.forward)


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher over a weightless model: clones, patches, hooks and options are ComfyUI's own code.

    What differs is where weights are: sizes are the pool's share of this process's device, unloading goes to
    the workers, weight hooks are recorded here and applied there.
    """

    @property
    def link(self) -> ModelLink:
        link: ModelLink = self.model.diffusion_model.link
        return link

    def model_size(self) -> int:
        """Bytes on this process's device; never 0, which ComfyUI takes for "not computed yet"."""
        return max(1, self.link.share())

    def loaded_size(self) -> int:
        return self.link.share()

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        """Nothing can be freed in part: ComfyUI then asks for all of it."""
        return 0

    def detach(self, unpatch_all: bool = True) -> Any:
        """ComfyUI wants the memory back. `unpatch_all=False` only means that a clone takes this one's place."""
        model = super().detach(unpatch_all)
        if unpatch_all:
            self.link.offload()
        return model

    def pre_run(self) -> None:
        """Sampling begins: refuse by name what cannot run on the workers."""
        refusals.check(self)
        super().pre_run()

    def cleanup(self) -> None:
        """Sampling has ended."""
        super().cleanup()
        self.link.forget()

    def patch_hooks(self, hooks: Any) -> None:
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        self.current_hooks = None

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        refusals.refuse_saving()


def refer(value: object) -> tuple[Any, ...] | None:
    """Name a live object the workers have their own of; None for everything else.

    Raises:
        UnsupportedError: the object holds another model's weights.
    """
    if isinstance(value, torch.Tensor):
        source = getattr(value, "raylight_source", None)
        return None if source is None else ("weight", *source)
    if isinstance(value, _RemoteModule):
        return ("diffusion", value.link.spec)
    if isinstance(value, comfy.model_base.BaseModel) and isinstance(value.diffusion_model, _RemoteModule):
        return ("base", value.diffusion_model.link.spec)
    if isinstance(value, RemotePatcher):
        return ("patcher", value.link.spec)
    if isinstance(value, (comfy.model_base.BaseModel, comfy.model_patcher.ModelPatcher)):
        refusals.refuse_foreign_model(value)
    return None


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    if len(left) != len(right):
        return False
    return all(
        a is b or (isinstance(a, (uuid.UUID, float, int, str)) and a == b) for a, b in zip(left, right, strict=True)
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_map_tensors(item, change) for item in value) if isinstance(value, (list, tuple)) else value


def _generators() -> Iterator[Any]:
    yield torch
    device = model_management.get_torch_device()
    if not model_management.is_device_cpu(device):
        yield torch.get_device_module(device)


def _random_states() -> tuple[Any, Any]:
    states = [module.get_rng_state().numpy() for module in _generators()]
    return states[0], states[1] if len(states) > 1 else None


def _set_random_states(states: tuple[Any, Any]) -> None:
    for module, state in zip(_generators(), states, strict=False):
        if state is not None:
            module.set_rng_state(torch.from_numpy(state.copy()))
