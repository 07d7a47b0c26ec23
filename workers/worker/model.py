"""A worker's copy of a model: ComfyUI's own patcher, with the family's plan installed on it."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from comfy import model_management

from ...loaders.source import Source
from ...patches.ffn import ChunkedFeedForward
from ...patches.registry import check, has_plan, plan_for
from ...raylight import cost
from ...raylight.config import ModelSpec, WorkerSettings
from ...raylight.errors import ConfigError
from ...raylight.mesh import Mesh
from ...raylight.packing import Footprint
from ...raylight.plan import Plan, RowPlan
from ...raylight.rows.row_hooks import RowInstallation
from ...raylight.sequence.kernels import LocalKernel
from ...raylight.watch import Watch
from ..mapping.adopt import Adopted, adopt, private_bytes
from ..mapping.mapped_patcher import ATTACHMENT, MappedPatcher, Weights, device_bytes, patch_dtype
from ..wire import numerics
from ..wire.comfy_host import device_uuid
from ..wire.messages import PREFIX, ModelFacts, ModelReport, Wrapped
from ..wire.said import Said
from . import compiled
from .boundaries import Boundaries
from .fsdp import fitting
from .fsdp.block_patcher import BLOCKS, BlockPatcher, Divided
from .fsdp.block_weights import BlockWeights, divide
from .recorded import Recordings, Waits, by_itself, recordable
from .sharing import Forward, Sharing

log = logging.getLogger(__name__)

T = TypeVar("T")

FORGETS = "clear_kv_cache"
"""A method of a model that keeps keys and values for its next call, and knows whose they are by the identity of a
tensor (HiDream O1): here a tensor is another one at every call, or has taken the place of one that is gone."""
EVERYTHING = 1e30
"""What ComfyUI's own unload_all_models asks free_memory for."""


class WorkerModel:
    """One loaded model of a worker: its weights are the file's memory. Use it outside of inference mode.

    Args:
        dtype: what plain ComfyUI keeps the weights in.

    Raises:
        LoadError: the file changed since the driver looked at it, or ComfyUI does not know the model.
        UnsupportedError: no plan for the family, and none can be looked for, while the mesh divides sequences.
    """

    FINDS: ClassVar[bool] = True
    """Whether a plan is looked for where none is written."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, mesh: Mesh, kernel: LocalKernel | None) -> None:
        self.source = Source.of(spec)
        adopted = self._adopted(spec, dtype)
        self._mesh = mesh
        self._homes = adopted.homes
        self._blocks = self._divided(adopted)
        inside = self._blocks.inside if self._blocks is not None else ()
        outside = {key: home for key, home in adopted.homes.items() if key not in inside}
        self._weights = Weights(self.source, outside, patch_dtype(spec))
        found = adopted.patcher
        kind = MappedPatcher if self._blocks is None else BlockPatcher
        self._base = kind(found.model, found.load_device, found.offload_device)
        self._base.set_attachments(ATTACHMENT, self._weights)
        if self._blocks is not None:
            self._base.set_attachments(BLOCKS, Divided(self._blocks, adopted.homes))
        self.patcher = self._base
        self.state = ""
        self._said: dict[bool, set[Said]] = {True: set(), False: set()}  # whether while loading
        self._lacking = ""
        self._settings = WorkerSettings()
        self._objects: dict[str, Any] = {}
        self._replaced: dict[str, Any] = {}  # those of the diffusion model
        self._compiled: dict[str, Any] = {}
        self._recordings: Recordings | None = None
        self._waits = Waits()
        self._recordable = False  # whether the last call could have been recorded, and was not
        self._chunked: ChunkedFeedForward | None = None
        pixels = getattr(getattr(found.model, "latent_format", None), "spacial_downscale_ratio", 8) == 1
        self._sharing = Sharing(
            self.diffusion,
            mesh,
            kernel,
            plan=self._planned() if mesh.parallel.needs_plan else None,
            finds=self.FINDS and mesh.parallel.needs_plan,
            paths=[file.path for file in self.source.files],
            grain=16 if pixels else 2,
        )
        log.debug(
            "%s: %d bytes of the weights are not the file's", spec.path, private_bytes(adopted.homes, self.source)
        )
        self._layers = dict(self.diffusion.named_modules())  # before patches replace some
        self._boundaries = Boundaries(self.diffusion)
        self._sharing.install("", {})

    @property
    def diffusion(self) -> torch.nn.Module:
        """What runs."""
        return self._base.model.diffusion_model

    def _adopted(self, spec: ModelSpec, dtype: torch.dtype) -> Adopted:
        return adopt(self.source, spec, dtype)

    def _divided(self, adopted: Adopted) -> BlockWeights | None:
        """The blocks whose weights are divided over the ranks; None where they are resident."""
        if self._mesh.parallel.residency == "resident":
            return None
        device = model_management.get_torch_device()
        return divide(adopted.patcher.model.diffusion_model, adopted.homes, self.source, self._mesh, device=device)

    def _planned(self) -> Plan | RowPlan | None:
        """How the ranks of a sequence share the model, as it is written; None where it is not."""
        check(self.diffusion, self._mesh.parallel)
        return plan_for(self.diffusion) if has_plan(self.diffusion) else None

    def facts(self) -> ModelFacts:
        """What the driver must know of this copy."""
        device = model_management.get_torch_device()
        return ModelFacts(
            family=type(self.diffusion).__name__,
            bytes=self._base.model_size(),
            device=str(device),
            uuid=device_uuid(device),
            weights=self.described(),
            advice=self._fit(int(model_management.minimum_inference_memory())),
        )

    def described(self) -> str:
        """Where the weights are, and what they take."""
        outside = sum(map(device_bytes, self._weights.homes.values()))
        if self._blocks is None:
            return f"resident weights, {Footprint(outside=outside)}"
        ahead = "ahead of use" if self._blocks.prefetch else "when they are used"
        return (
            f"{self._blocks.residency} weights, {self._blocks.footprint(outside)}; "
            f"{self._blocks.count} blocks are gathered {ahead}"
        )

    def _fit(self, activations: int) -> str:
        if self._blocks is not None:
            return ""
        return fitting.advised(
            self.diffusion, self._homes, self.source, self._mesh.sequence, size=self.size, activations=activations
        )

    def patch(self, state: str, patches: dict[str, Any], objects: dict[str, Any], *, force_cast: bool) -> None:
        """Take over the driver's weight and object patches; ComfyUI applies them when the model becomes resident."""
        patcher = self._base.clone()
        patcher.patches = patches
        if state:
            patcher.patches_uuid = uuid.uuid5(uuid.NAMESPACE_OID, state)
        patcher.force_cast_weights = force_cast
        replaced = _of_diffusion(objects)
        if replaced or self._replaced:
            self._sharing.changed(replaced)
        self._objects, self._replaced = objects, replaced
        self.patcher = patcher
        self.state = state
        self._said[False].clear()
        self._patch_objects()

    def settle(self, settings: WorkerSettings) -> bool:
        """Bring the model to these settings; does nothing where it is there already.

        Returns:
            Whether the model has to be made resident again.

        Raises:
            UnsupportedError: it cannot be compiled; it is as before.
        """
        if settings == self._settings:
            return False
        if settings.compile == "cudagraphs" and self._blocks is not None:
            raise ConfigError(
                "The compiler cudagraphs needs weights that stay where they are",
                f"they are {self._blocks.residency}",
                "Choose another backend, or switch FSDP and FSDP_CPU_OFFLOAD off",
            )
        if settings.compile:
            self._sharing.check_compiler()
        records, compiler = settings.compile == "cudagraphs", self._settings.compile
        if settings.compile != compiler:
            # may refuse, so before anything is changed
            recordings = self._recorder() if records else None
            backend = "" if records else settings.compile
            self._sharing.install(backend, self._replaced)
            self._compiled = compiled.compiled_blocks(self.diffusion, backend) if backend else {}
            self._recordings = recordings
            self.patcher = self.patcher.clone()
            self._patch_objects()
        self._settings = settings
        if self._chunked is not None:
            self._chunked.remove()
            self._chunked = None
        if settings.ffn_chunks > 1:
            self._chunked = ChunkedFeedForward(self.diffusion, settings.ffn_chunks)
        return settings.compile != compiler

    def _recorder(self) -> Recordings:
        sequence = self._mesh.sequence
        return Recordings(model_management.get_torch_device(), sequence, self._mesh.control_of(sequence))

    def forget_recordings(self) -> None:
        """Give back the memory of recorded calls: something else needs the device."""
        if self._recordings is not None:
            self._recordings.clear()

    def _patch_objects(self) -> None:
        self.patcher.object_patches = {}
        for name, value in {**self._compiled, **self._objects}.items():
            self.patcher.add_object_patch(name, value)

    def activations(self, args: tuple[Any, ...]) -> int:
        """Bytes that a call of these arguments takes beside the weights, as ComfyUI estimates it; 0 where unknown."""
        first = args[0] if args else None
        if isinstance(first, (list, tuple)):
            first = first[0]
        return int(self._base.memory_required(list(first.shape))) if isinstance(first, torch.Tensor) else 0

    def make_resident(self, *, room: int) -> None:
        """Bring weights and patches onto the device, with room for `room` bytes of activations.

        Raises:
            LoadError: the file changed.
        """
        self.source.check()
        self._lacking = self._fit(room)
        model_management.load_models_gpu([self.patcher], memory_required=room)

    def agreed(self) -> contextlib.AbstractContextManager[None]:
        """See fitting.failing_together."""
        if self._blocks is None:
            return contextlib.nullcontext()
        return fitting.failing_together(self._mesh, self._blocks.sharing)

    def offload(self) -> None:
        """Take the weights off the device: from now on parameters are the map again."""
        self.forget_recordings()
        others = [
            loaded
            for loaded in model_management.current_loaded_models
            if loaded.model is None or not loaded.model.is_clone(self.patcher)
        ]
        model_management.free_memory(EVERYTHING, model_management.get_torch_device(), others)
        self.patcher.detach()

    @property
    def resident_bytes(self) -> int:
        """What the weights occupy on the device now."""
        return int(self._base.loaded_size())

    @property
    def size(self) -> int:
        """What the weights occupy on the device when all of them are there."""
        return int(self._base.model_size())

    def run(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cancelled: Callable[[], bool] = lambda: False,
        wrapped: Wrapped | None = None,
    ) -> Any:
        """Call a method of the diffusion model, under its plan where it is the model's forward.

        Args:
            cancelled: whether this rank has been told to stop.
            wrapped: a node's function that is to make the call, one of the model's forward.

        Raises:
            Cancelled: a rank that shares the sequence has; all of them leave before the same block.
        """
        forward = method in ("forward", "_forward")
        if forward and hasattr(self.diffusion, FORGETS):
            getattr(self.diffusion, FORGETS)()

        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            watch = Watch(self._mesh.control_of(self._mesh.sequence), wanted=cancelled)
            with self._gathering(method), self._boundaries.watched(watch):
                return function(*args, **kwargs)

        function = getattr(self.diffusion, method)
        if forward:
            asked = Forward(
                method=method,
                call=call,
                args=args,
                kwargs=kwargs,
                state=(self.state, self._settings),
                replaced=self._replaced,
                patched=bool(self._settings.compile or self._objects),
                cancelled=cancelled,
                wrapped=wrapped,
            )
            # what code of nodes decides is not recorded, nor what is in doubt
            if self._sharing.watches(asked):
                return self._sharing.run(asked)
            function = self._sharing.function(method)
        if self._recordings is None or not forward:
            return call(function, *args, **kwargs)
        return self._recordings.run(
            partial(call, function),
            function,
            args,
            kwargs,
            state=(self._weights.moves, self._settings, numerics.take()),
        )

    def _gathering(self, method: str) -> contextlib.AbstractContextManager[None]:
        if self._blocks is None:
            return contextlib.nullcontext()
        # a mode that looks at every function would have compiled code run as Python
        return self._blocks.rotation.call(method, check=not self._settings.compile)

    def report(self) -> ModelReport:
        """What is here of the model."""
        return ModelReport(
            path=self.source.path,
            family=type(self.diffusion).__name__,
            size=self.size,
            resident=self.resident_bytes,
            patches=len(self.patcher.patches) + len(self._objects),
            settings=self._settings,
            weights=self.described(),
            recorded=self._recordings.count if self._recordings is not None else 0,
            plan=self._sharing.found.summary if self._sharing.found is not None else "",
            warnings=sum(map(len, self._said.values())),
        )

    def new(self, lines: Iterable[Said], *, loading: bool = False) -> tuple[Said, ...]:
        """Those lines of ComfyUI's code that are new: weights that are patched when they are used say them each time.

        Args:
            loading: they are of the file, and not of patches.
        """
        found = dict.fromkeys(line for line in lines if not any(line in known for known in self._said.values()))
        self._said[loading].update(found)
        return tuple(found)

    def found(self) -> tuple[Said, ...]:
        """What is to be said of plans that were found for it, since the last time."""
        return self._sharing.lines()

    def predicted(self, machine: cost.Machine | None) -> float:
        """Predicted speed-up of the last call over one worker; 0 where nothing is known of it.

        Args:
            machine: rates of the device and its links; None where they are not known.
        """
        return self._by_cost(cost.speedup, machine) or 0.0

    def advice(self, machine: cost.Machine | None) -> str:
        """What the last call showed that the user should know: "" for nothing."""
        return self._lacking or self._advice_on_cost(machine)

    @property
    def waits(self) -> bool:
        """Whether the device waits for Python, and the calls would not if they were recorded."""
        return self._recordable and self._waits.seen

    def note(self, queued: float, took: float, args: Any) -> None:
        """How long the last call took, see Waits.note."""
        device = model_management.get_torch_device()
        self._recordable = (
            by_itself(device)
            and not self._mesh.parallel.sync_ulysses
            and self._blocks is None
            and not self._settings.compile
            and not self._replaced
            and self._sharing.found is None
            and recordable(args, device)
        )
        if self._recordable:
            self._waits.note(queued, took)

    def _advice_on_cost(self, machine: cost.Machine | None) -> str:
        installation = self._sharing.installation
        if isinstance(installation, RowInstallation):
            return installation.advice
        if self._recordings is not None or (self._recordable and self._waits.open):
            return ""  # a device that waits for Python is a faster one than the rates are of
        return self._by_cost(cost.advice, machine) or ""

    def _by_cost(self, ask: Callable[..., T], machine: cost.Machine | None) -> T | None:
        """What raylight.cost says of the last call; None where nothing is known of it or of the device."""
        installation = self._sharing.installation
        works = list(installation.works.values()) if installation is not None else []
        if machine is None or not works:
            return None
        machine = machine.repeating() if self._recordings is not None or self._recordable else machine
        degrees = self._mesh.parallel.degrees
        return ask(works, machine, ulysses=degrees["ulysses"], ring=degrees["ring"])

    def layer(self, name: str) -> torch.nn.Module:
        """A module of the diffusion model by its name there: its own, whatever patches put in its place."""
        return self._layers[name]

    def weight(self, key: str) -> torch.Tensor:
        """An unpatched weight by its key in the model's state dict, as plain ComfyUI would hold it on the host.

        Raises:
            LoadError: the file changed.
        """
        self.source.check()
        home = self._homes.get(key)
        if home is None:  # a buffer, which merges take for one
            return self._base.model.get_buffer(key).detach()
        if getattr(home.module, "quant", "") and home.name == "weight":
            whole: torch.Tensor = home.module.whole(torch.device("cpu"), torch.float32)  # type: ignore[operator]
            return whole
        # float32 holds every value of the types a file has: only a narrower one makes a difference
        return home.tensor if home.dtype in (None, torch.float32) else home.tensor.to(home.dtype)

    def close(self) -> None:
        """Take the hooks out and the weights off the device."""
        self.settle(WorkerSettings())
        self._sharing.remove()
        self._boundaries.remove()
        self.offload()


def _of_diffusion(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The object patches of the diffusion model, by their names in it."""
    return {name.removeprefix(PREFIX): value for name, value in objects.items() if name.startswith(PREFIX)}
