"""The MODEL on the pool: a standard ComfyUI patcher over a model without weights whose forward runs on the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

import comfy.model_base
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch
from comfy import model_management

from ...patches.registry import check
from ...raylight.config import ModelSpec, PoolConfig
from ...raylight.errors import ConfigError
from ...raylight.sequence.replaced import within
from ..mapping import meta_model
from ..pool.pool import HISTORY, Pool, acquire, close_all, shut_down
from ..wire import standing
from ..wire.comfy_host import describe
from ..wire.messages import PREFIX
from ..wire.parcels import FILE
from ..wire.said import Told
from . import conds, cores, layers, lending, reaching, refusals
from .model_rpc import SETTINGS, ModelRpc, interruptible, patches_of, settings_of
from .place import Place

log = logging.getLogger(__name__)

REMOTE_METHODS = ("_forward", "forward", "preprocess_text_embeds")
"""Methods that need weights and are called from outside the diffusion model. `_forward` lies below the
DIFFUSION_MODEL wrappers, so those run in the driver; families without it are cut at `forward`."""


def load_model(config: PoolConfig, spec: ModelSpec) -> RemotePatcher:
    """A MODEL whose weights are loaded on the pool's workers, none of them here.

    Raises:
        LoadError: the file cannot be loaded.
        UnsupportedError: the pool divides sequences, and the family has no plan and none can be looked for. Nothing
            was loaded then.
        WorkerError: the pool did not start, or a worker failed while loading.
    """
    return load_at(Place(config), spec)


def load_at(place: Place, spec: ModelSpec) -> RemotePatcher:
    """The same, where the settings of the pool may change later (see chosen.Chosen)."""
    told = Told()
    with told.here(loading=True):
        model, state, spec = meta_model.build(spec)
    place.prepare(model, spec)
    config = place.config
    if config.parallel.needs_plan:
        with standing.explaining():
            check(model.diffusion_model, config.parallel)
    dtype = model.get_dtype()
    rpc = ModelRpc(place, spec, dtype, refer, told)
    facts = rpc.load()[0]
    log.info("%s on %s: %s", os.path.basename(spec.path), facts.device, facts.weights)
    if facts.advice and not place.chooses:
        log.warning("%s", facts.advice)
    base = meta_model.without_weights(model, state, dtype, model.manual_cast_dtype)
    layers.marked(model.diffusion_model, spec, rpc)
    # each rank holds one part of every activation; where that changes, it is chosen before each run
    base.memory_usage_factor /= 1 if place.chooses else config.parallel.sequence
    replicas = 1 if place.chooses else config.parallel.degrees["dp"]
    twins = [_patcher(meta_model.twin(base), model.diffusion_model, rpc.at(i), dtype) for i in range(1, replicas)]
    patcher = _patcher(base, model.diffusion_model, rpc, dtype)
    base.raylight_twins = tuple(twins)
    if place.chooses or config.parallel.degrees["cfg"] > 1:
        patcher.add_wrapper_with_key(conds.KINDS.CALC_COND_BATCH, conds.KEY, conds.calc_cond_batch)
    return patcher


def _patcher(base: Any, meta: torch.nn.Module, rpc: ModelRpc, dtype: torch.dtype) -> RemotePatcher:
    base.diffusion_model = remote_module(meta, rpc, base, dtype)
    device = model_management.get_torch_device()
    patcher = RemotePatcher(base, device, model_management.unet_offload_device())
    base.raylight_device = device
    # the first is the outermost: what others do may depend on the pool that is chosen
    for name, wrapper in rpc.place.wrappers().items():
        patcher.add_wrapper_with_key(conds.KINDS.OUTER_SAMPLE, name, wrapper)
    patcher.add_wrapper_with_key(conds.KINDS.CALC_COND_BATCH, reaching.KEY, reaching.calc_cond_batch)
    patcher.add_wrapper_with_key(conds.KINDS.OUTER_SAMPLE, lending.__name__, lending.lend)
    patcher.add_wrapper_with_key(conds.KINDS.OUTER_SAMPLE, cores.__name__, cores.leave)
    return patcher


def with_settings(model: Any, **changes: Any) -> RemotePatcher:
    """A clone of a MODEL on the pool whose workers run it with some settings changed; no worker is called.

    Args:
        changes: fields of WorkerSettings.

    Raises:
        ConfigError: a value that cannot be, or a model that is not on the pool.
    """
    clone: RemotePatcher = on_pool(model).clone()
    clone.set_attachments(SETTINGS, dataclasses.replace(settings_of(model), **changes))
    return clone


def on_pool(model: Any) -> RemotePatcher:
    """The MODEL itself.

    Raises:
        ConfigError: it is not on the pool.
    """
    if not isinstance(model, RemotePatcher):
        raise ConfigError(
            "This node needs a model on the pool",
            f"it was given {type(model).__name__}",
            "Connect the ray_actors output of Load Diffusion Model (Ray)",
        )
    return model


def offload(model: Any) -> None:
    """Take a MODEL's weights off the workers' devices; its next use brings them back from the file's map.

    Raises:
        ConfigError: it is not on the pool.
    """
    on_pool(model).rpc.offload()
    for twin in model.model.raylight_twins:
        twin.rpc.offload()


def start_pool(config: PoolConfig) -> Pool:
    """The running pool of a config, started where needed.

    Raises:
        WorkerError: it did not start in time, or a worker died while starting.
    """
    with interruptible():
        return acquire(config, describe(), model_management.processing_interrupted)


def end_pools(*, ray: bool) -> None:
    """End all workers of this ComfyUI now; the next use of a model starts them again.

    Args:
        ray: end Ray as well. A cluster that was joined stays as it is.
    """
    HISTORY.forgive()
    if ray:
        shut_down()
    else:
        close_all()


BACKUPS = ("backup", "backup_buffers", "object_patches_backup", "hook_backup", "pinned")
"""What all patchers of one model share; names that a version of ComfyUI does not have are skipped."""
NOTED = ("training",)
"""Attributes of a module that torch sets."""
FILE_ATTRIBUTE = "raylight_file"
"""Holds the FileRef of a tensor that workers can take from the same file."""


class _RemoteModule(torch.nn.Module):
    """Stands in for a diffusion model: no parameters, no children, so nothing to load, move or count.

    Mixed in before the family's own class, so that the family's `forward` (its wrapper handling and argument
    order) and its weightless helpers run here unchanged, and `isinstance` holds. Attributes come from the meta model,
    layers and tensors from a model that is mapped when the first of them is asked for: ComfyUI and nodes patch, call
    and read them. They have the patches of the MODEL that samples.
    Whoever walks the model around this one, as ComfyUI does, finds none.
    """

    weight_function = ()
    """With it, ComfyUI's training node takes this for a layer, asks for its `weight`, and is refused by name."""

    @property
    def weight(self) -> Any:
        refusals.refuse_training()

    def __getattr__(self, name: str) -> Any:
        if name in ("_meta", "_layers", "_lent", "_patching"):  # not set yet
            raise AttributeError(name)
        value = getattr(self._shown(), name)
        return getattr(self._mapped(), name) if isinstance(value, (torch.nn.Module, torch.Tensor)) else value

    def __setattr__(self, name: str, value: Any) -> None:
        """What nodes put in the place of something of the model would never reach the workers, object patches apart."""
        if name in NOTED or self._patching or not hasattr(self._meta, name):
            super().__setattr__(name, value)
        else:
            refusals.refuse_replacing(value, name)

    def __delattr__(self, name: str) -> None:
        if name in vars(self) or not hasattr(self._meta, name):
            super().__delattr__(name)
        else:  # as whoever was not allowed to replace it does, to clean up
            refusals.refuse_replacing(None, name)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        refusals.refuse_copying()

    @property
    def meta(self) -> torch.nn.Module:
        """The model that has all names and shapes, and no values."""
        return self._meta

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """ComfyUI applies object patches meanwhile, which workers have as well."""
        self.__dict__["_patching"] = True
        try:
            yield
        finally:
            self.__dict__["_patching"] = False

    def _shown(self) -> torch.nn.Module:
        return self._meta if self._lent is None else self._lent

    def _mapped(self) -> torch.nn.Module:
        if self._lent is not None:
            return self._lent
        if self._layers is None:
            # they do not hold this one: the workers release a model once nobody has it, and no collection is waited for
            here = weakref.WeakMethod(self._patches_of)
            self.__dict__["_layers"] = layers.Layers(
                self.rpc.spec, self.dtype, self.rpc, lambda key: found(key) if (found := here()) else []
            )
        return self._layers.model

    def _patches_of(self, key: str) -> list[Any]:
        """The patches that a weight has in the MODEL that samples; there are none between runs."""
        owner = self._owner()
        patcher = owner.current_patcher if owner is not None else None
        return patches_of(patcher, key) if patcher is not None else []

    def refuse_strangers(self, patches: Collection[str]) -> None:
        """Refuse what nodes have put into the layers without a patch of it; it stays there, as in a plain model.

        Args:
            patches: names of object patches.
        """
        for name, value in self._layers.replaced() if self._layers else ():
            if not any(within(PREFIX + name, patch) for patch in patches):
                refusals.refuse_replacing(value, name)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """The mapped model's, or none where the walk began outside."""
        if memo is None:
            return self._mapped().named_modules(None, prefix, remove_duplicate)
        return super().named_modules(memo, prefix, remove_duplicate)

    def named_children(self) -> Any:
        return self._mapped().named_children()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """There is nothing to move or cast."""
        return self

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The meta model's: LoRA key maps and add_patches look keys up here. Values have no data."""
        return self._shown().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    @contextlib.contextmanager
    def answering_from(self, model: torch.nn.Module) -> Iterator[None]:
        """Have attributes, layers, and the values of state_dict come from another model meanwhile."""
        self.__dict__["_lent"] = model
        try:
            yield
        finally:
            self.__dict__["_lent"] = None


def remote_module(meta: torch.nn.Module, rpc: ModelRpc, base: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The diffusion model of `base`: of the meta model's class, its weights on the pool."""
    family: Any = type(meta)
    cut = "_forward" if hasattr(family, "_forward") else "forward"
    base_ref = weakref.ref(base)

    def remote(method: str) -> Callable[..., Any]:
        names = tuple(inspect.signature(getattr(family, method)).parameters)[1:]

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            owner = base_ref()
            return self.rpc.call(owner.current_patcher if owner else None, method, args, kwargs, names=names)

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
    # some nodes ask for the class itself
    looks = property(lambda self: family, lambda self, value: refusals.refuse_replacing(value, "__class__"))
    names = {"__module__": family.__module__, "__qualname__": family.__qualname__, "__class__": looks}
    module: Any = type(family.__name__, (_RemoteModule, family), {**methods, **names})
    instance: torch.nn.Module = module.__new__(module)
    torch.nn.Module.__init__(instance)
    state = {"_meta": meta, "_layers": None, "_lent": None, "_patching": False, "_owner": base_ref}
    instance.__dict__.update(state, rpc=rpc, dtype=dtype)
    return instance.eval()


def _handles_wrappers(family: Any) -> bool:
    return "DIFFUSION_MODEL" in inspect.getsource(family.forward)


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher over a weightless model: clones, patches, hooks and options are ComfyUI's own code.

    What differs is where weights are: sizes are the pool's share of this process's device, unloading goes to
    the workers, weight hooks are recorded here and applied there.
    """

    @property
    def rpc(self) -> ModelRpc:
        rpc: ModelRpc = self.model.diffusion_model.rpc
        return rpc

    def shape_of(self, key: str) -> torch.Size:
        """The unpatched shape of a weight by its key."""
        shape: torch.Size = comfy.utils.get_attr(self.model.diffusion_model.meta, key.removeprefix(PREFIX)).shape
        return shape

    def at(self, replica: int) -> RemotePatcher:
        """A clone of this MODEL on a replica of its pool: the same patches and options on a model of its own."""
        clone: RemotePatcher = self.clone()
        if replica != self.rpc.replica:
            twin = self.model.raylight_twins[replica - 1]
            clone.model, clone.parent = twin.model, twin
            for name in BACKUPS:
                if hasattr(twin, name):
                    setattr(clone, name, getattr(twin, name))
        return clone

    def model_size(self) -> int:
        """Bytes on this process's device once workers have the model there; never 0, "not computed yet" to ComfyUI.

        ComfyUI makes room for what of it is not loaded: its own models leave the device before workers need it.
        """
        return max(1, self.rpc.share(resident=False))

    def loaded_size(self) -> int:
        return self.rpc.share(resident=True)

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        """Nothing can be freed in part: ComfyUI then asks for all of it."""
        return 0

    def detach(self, unpatch_all: bool = True) -> Any:
        """ComfyUI wants the memory back. `unpatch_all=False` only means that a clone takes this one's place."""
        model = super().detach(unpatch_all)
        if unpatch_all:
            self.rpc.offload()
        return model

    def __deepcopy__(self, memo: Any) -> NoReturn:
        refusals.refuse_copying()

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> NoReturn:
        refusals.refuse_another_device()

    def patched(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, ComfyUI applies object patches to the stand-in."""
        patched: contextlib.AbstractContextManager[None] = self.model.diffusion_model.patched()
        return patched

    def patch_model(self, *args: Any, **kwargs: Any) -> Any:
        refusals.check_objects(self.object_patches)  # one of the whole model would take the stand-in's place
        with self.patched():
            return super().patch_model(*args, **kwargs)

    def unpatch_model(self, *args: Any, **kwargs: Any) -> Any:
        with self.patched():
            return super().unpatch_model(*args, **kwargs)

    def pre_run(self) -> None:
        """Sampling begins: refuse by name what cannot run on the workers."""
        if self.load_device != self.model.raylight_device:
            refusals.refuse_another_device()
        refusals.check(self)
        self.model.diffusion_model.refuse_strangers(self.object_patches)
        self.rpc.told.patched(self.patches_uuid)
        super().pre_run()

    def cleanup(self) -> None:
        """Sampling has ended."""
        super().cleanup()
        self.rpc.forget()

    def patch_hooks(self, hooks: Any) -> None:
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        self.current_hooks = None

    def partially_load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> Any:
        """Only what takes a model's patched weights away asks for `force_patch_weights`."""
        if force_patch_weights:
            refusals.refuse_saving()
        return super().partially_load(*args, **kwargs)

    def patch_weight_to_device(self, *args: Any, **kwargs: Any) -> NoReturn:
        refusals.refuse_saving()

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> NoReturn:
        refusals.refuse_saving()


def refer(value: object) -> tuple[Any, ...] | None:
    """Name a live object the workers have their own of; None for everything else.

    Raises:
        UnsupportedError: the object holds another model's weights.
    """
    if isinstance(value, torch.Tensor):
        source, file = getattr(value, "raylight_source", None), getattr(value, FILE_ATTRIBUTE, None)
        if (source is None and file is None) or layers.is_written(value):
            return None  # what the workers have is another one: it is sent
        return (FILE, file) if source is None else ("weight", *source)
    if isinstance(value, _RemoteModule):
        return ("diffusion", value.rpc.spec)
    place = layers.place_of(value)
    if place is not None:
        return ("module", *place)
    if isinstance(value, comfy.model_base.BaseModel) and isinstance(value.diffusion_model, _RemoteModule):
        return ("base", value.diffusion_model.rpc.spec)
    if isinstance(value, RemotePatcher):
        return ("patcher", value.rpc.spec)
    if isinstance(value, (comfy.model_base.BaseModel, comfy.model_patcher.ModelPatcher)):
        refusals.refuse_foreign_model(value)
    return None
