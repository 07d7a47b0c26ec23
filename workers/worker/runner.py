"""A worker's work, without Ray: a plain class of verbs that runs in an actor or in any process."""

from __future__ import annotations

import datetime
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy import model_management
from torch import distributed

from ...loaders.content import content_key
from ...loaders.prefetch import prefetch
from ...loaders.source import OpenFiles
from ...raylight import cfg, cost
from ...raylight.config import ModelSpec
from ...raylight.errors import LoadError, WorkerError
from ...raylight.mesh import Mesh
from ...raylight.sequence import kernels
from ..mapping.loading import normal_tensors
from ..wire import link_test, numerics, random_states, rates
from ..wire.arena import ArenaRef, is_open
from ..wire.comfy_host import device_uuid
from ..wire.decoder import Decoder
from ..wire.deferred import Computed, Evaluation, Result, outline
from ..wire.messages import (
    Forward,
    ForwardReply,
    FunctionRef,
    JoinRequest,
    LoadRequest,
    ModelFacts,
    PatchRequest,
    Room,
    Standing,
    WorkerReport,
)
from ..wire.parcels import FILE, Parcel
from ..wire.rates import Rates
from ..wire.said import Heard, Said
from ..wire.vae_messages import DecodeRequest, EncodeRequest, PartReply, TileSizes, VAEFacts, VAEPlan
from . import filled, memory
from .control_loading import WorkerControl
from .conversation import Line, Silence
from .encoder import WorkerEncoder
from .link_watch import LinkWatch
from .model import WorkerModel
from .room import Ready, least_recent
from .vae.vaes import WorkerVAEs


class Runner:
    """Holds the models of one worker and runs calls on them.

    Order of verbs: `open_store` (rank 0, for several machines), `join`, then any; `close` last. All ranks of a replica
    receive the same requests in the same order, so the collectives inside them match.
    """

    def __init__(self) -> None:
        self._store: Any = None
        self._listener: socket.socket | None = None
        self._mesh: Mesh | None = None
        self._link_watch: LinkWatch | None = None
        self._readers = (0, 1)
        self._kernel: kernels.LocalKernel | None = None
        self._machine: cost.Machine | None = None  # rates that predictions go by
        self._models: OrderedDict[ModelSpec, WorkerModel] = OrderedDict()  # the least recently used first
        self._ready: dict[ModelSpec, Ready] = {}
        self._functions: dict[int, Callable[..., Any]] = {}
        self._last: ModelSpec | None = None  # the model of the last forward
        self._patching: WorkerModel | None = None  # whose patches are applied in the request at hand
        self.heard = Heard()
        """What ComfyUI's code says during the request at hand."""
        self._files = OpenFiles()
        self._decoder = Decoder(self._resolve, model_management.get_torch_device())
        self._here: dict[ModelSpec, ModelSpec] = {}  # the driver's files, as this machine has them
        self._vaes = WorkerVAEs(self._on_this_machine)
        self.wire: Line = Silence()
        """The way to the driver during the request at hand."""

    @property
    def collectives(self) -> int:
        """Collectives entered since the pool started."""
        return self._mesh.collectives if self._mesh else 0

    @property
    def mesh(self) -> Mesh:
        if self._mesh is None:
            raise WorkerError("The worker has not joined a pool yet")
        return self._mesh

    @property
    def _speaks(self) -> bool:
        """Whether this rank answers for those it shares a sequence with: the first of them does."""
        return self.mesh.rank % self.mesh.parallel.sequence == 0

    def standing(self) -> Standing:
        """Where this rank is; asked by other threads while it works."""
        mesh, watch = self._mesh, self._link_watch
        return Standing(waits=mesh.waits if mesh else 0.0, links=watch.dead if watch else ())

    def said(self) -> tuple[Said, ...]:
        """What ComfyUI's code has said since the last answer, without what is known of the model's patches."""
        lines, model = self.heard.take(), self._patching
        self._patching = None
        return tuple(lines) if model is None else model.new(lines)

    def open_store(self, host: str, port: int, timeout: float) -> int:
        """Start the rendezvous store of several machines on `host`; returns its port.

        `port` 0, or a port in use, means any free one.
        """
        try:
            self._listener = socket.create_server((host, port))
        except OSError:
            self._listener = socket.create_server((host, 0))
        chosen = self._listener.getsockname()[1]
        # a listening socket of ours: TCPStore itself would listen on every interface
        self._store = distributed.TCPStore(
            host,
            chosen,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout),
            master_listen_fd=self._listener.detach(),
        )
        return chosen

    def join(self, request: JoinRequest) -> None:
        """Make the process groups together with all other ranks.

        Raises:
            ConfigError: the attention kernel that was asked for cannot run here.
        """
        device, parallel = model_management.get_torch_device(), request.parallel
        # before anything is loaded, so that RayInitializer says it
        self._kernel = kernels.chosen(parallel, device=device)
        self._readers = request.readers
        self._machine = request.machine or cost.RATES.get(device.type)
        if model_management.is_device_cpu(device):
            torch.set_num_threads(request.threads)
        meet = request.rendezvous
        if request.apart:
            self._link_watch = LinkWatch()
            self._link_watch.start()
        timeout = datetime.timedelta(seconds=meet.timeout)
        if meet.file:
            self._store = distributed.FileStore(meet.file, parallel.world)
            self._store.set_timeout(timeout)
        elif self._store is None:
            self._store = distributed.TCPStore(
                meet.host, meet.port, is_master=False, wait_for_workers=False, timeout=timeout
            )
        backend = distributed.get_default_backend_for_device(device)
        self._mesh = Mesh.create(
            request.parallel,
            rank=request.rank,
            store=self._store,
            backend=backend,
            timeout=timeout,
        )

    def share(self, ref: ArenaRef) -> bool:
        """Whether the driver's shared memory can be opened here."""
        return is_open(ref)

    def recognise(self, spec: ModelSpec, content: str) -> str:
        """Find this machine's copy of a file of the driver's; what is wrong with it, "" for nothing."""
        try:
            found = spec.now()
            if content_key(found.paths) != content:
                return f"the file there is another one, of {found.size} bytes where it has {spec.size}"
        except LoadError as error:
            return str(error)
        self._here[spec] = found
        return ""

    def check_links(self) -> dict[str, link_test.Link]:
        """Time collectives on every axis; what is predicted of later calls goes by them.

        Raises:
            WorkerError: a result is wrong, so a link does not carry what it is given.
        """
        device = model_management.get_torch_device()
        found = link_test.measure(self.mesh, device)
        self._machine = link_test.machine(found, device.type)
        return found

    def rates(self) -> Rates:
        """Time this device, and collectives on every axis.

        Raises:
            WorkerError: a result is wrong, so a link does not carry what it is given.
        """
        device = model_management.get_torch_device()
        with torch.inference_mode():
            return rates.measure(device, link_test.measure(self.mesh, device))

    def speed(self) -> Rates:
        """Time this device; before it has joined others."""
        with torch.inference_mode():
            return rates.measure(model_management.get_torch_device(), {})

    def room(self) -> Room:
        """What there is of the device's memory; 0 on a CPU, where weights take none."""
        device = model_management.get_torch_device()
        if model_management.is_device_cpu(device):
            return Room(free=0, ours=0, uuid="")
        return Room(
            free=int(model_management.get_free_memory(device)),
            ours=sum(model.resident_bytes for model in self._models.values()),
            uuid=device_uuid(device),
        )

    def load(self, request: LoadRequest) -> ModelFacts:
        """Load a model, or say what is known of it where it is already here."""
        spec = request.spec
        said: tuple[Said, ...] = ()
        if spec not in self._models:
            with normal_tensors():
                found = self._on_this_machine(spec)
                kind = {"diffusion": WorkerModel, "control": WorkerControl, "encoder": WorkerEncoder}[request.kind]
                model = kind(found, getattr(torch, request.dtype), self.mesh, self._kernel)
            self._models[spec] = model
            said = model.new(self.heard.take(), loading=True)
            if spec.reader == "map":
                for file in model.source.files:
                    prefetch(
                        file.fd,
                        file.header.size,
                        index=self._readers[0],
                        count=self._readers[1],
                        cancelled=self.wire.cancelled,
                    )
        return replace(self._models[spec].facts(), said=said)

    def patch(self, request: PatchRequest) -> None:
        """Replace the weight and object patches of a model."""
        with normal_tensors():
            patches, objects = self._decoder.decode(request.patches)
            self._models[request.spec].patch(request.state, patches, objects, force_cast=request.force_cast)

    def define(self, functions: Parcel) -> None:
        """Learn callables by number."""
        with torch.inference_mode():
            self._functions.update(self._decoder.decode(functions))

    def forget(self) -> None:
        """Drop the callables of the run that ended: their state must not reach the next one."""
        self._functions.clear()

    def forward(self, request: Forward) -> ForwardReply:
        """Run one method of the diffusion model."""
        model = self._patching = self._models[request.spec]
        with torch.inference_mode():
            computed = Computed(self._evaluate, model_management.get_torch_device())
            *given, wrapped = self._decoder.decode(request.call)
            args, kwargs = self._restore(given, computed)
            if wrapped is not None:
                wrapped = replace(wrapped, function=self._restore(wrapped.function, computed))
            if model.settle(request.settings):
                self._ready.pop(request.spec, None)
            with model.agreed():
                self._make_ready(request.spec, args)
                model.source.check()
            self._last = request.spec
            if request.random is not None:
                random_states.put(request.random)
            numerics.put(request.numerics)
            started, waited = time.perf_counter(), self.mesh.seconds
            held = filled.state(args, kwargs)
            output = model.run(request.method, args, kwargs, self.wire.cancelled, wrapped)
            queued = time.perf_counter() - started
            # what is queued is not done: a rank that only says so could fail, or be killed, unnoticed
            link_test.finish(model_management.get_torch_device())
            took, waited = time.perf_counter() - started, self.mesh.seconds - waited
            model.note(queued, took, (args, kwargs, wrapped))
            filled.check(held)
            parcel = self._decoder.answer(output, request.call) if self._speaks else None
        said = (*self.said(), *model.found())
        return ForwardReply(
            output=parcel,
            random=random_states.take() if request.random is not None and self._speaks else None,
            seconds=took + computed.seconds,
            waiting=waited,
            advice=model.advice(self._machine) if self._speaks else "",
            waits=model.waits,
            said=said if self._speaks else (),
        )

    def outline(self, spec: ModelSpec, arguments: Parcel) -> Any:
        """Run a ControlNet to see what it returns; see deferred.outline."""
        with torch.inference_mode():
            return outline(self._evaluate(Evaluation(spec, self._decoder.decode(arguments))))

    def plan_vae(self, request: VAEPlan) -> VAEFacts | None:
        """Load a VAE and find out what this rank can do with it; see WorkerVAEs."""
        self._rest()  # a model may have to make room
        with torch.inference_mode():
            return self._vaes.plan(request, self.mesh)

    def tiled_shape(self, spec: ModelSpec, shape: tuple[int, ...], tiles: TileSizes) -> tuple[int, ...]:
        """Shape of what a tiled decode of a latent of this shape makes."""
        with torch.inference_mode():
            return self._vaes.tiled_shape(spec, shape, tiles)

    def decode(self, request: DecodeRequest) -> PartReply:
        """Decode this rank's part of a latent."""
        self._rest()
        with torch.inference_mode():
            if request.random is not None:
                random_states.put(request.random)
            return self._vaes.decode(request, self.mesh, self.wire)

    def encode(self, request: EncodeRequest) -> PartReply:
        """Encode this rank's part of a picture."""
        self._rest()
        with torch.inference_mode():
            if request.random is not None:
                random_states.put(request.random)
            return self._vaes.encode(request, self.mesh, self.wire)

    def release_vae(self, spec: ModelSpec) -> None:
        """Forget a VAE."""
        self._vaes.release(spec)

    def report(self) -> WorkerReport:
        """What this worker holds, and how it fared in the last call."""
        last = self._models.get(self._last) if self._last else None
        device = model_management.get_torch_device()
        return WorkerReport(
            rank=self.mesh.rank,
            device=model_management.get_torch_device_name(device),
            host_bytes=memory.private_bytes(),
            device_bytes=memory.device_bytes(device),
            models=tuple(model.report() for model in self._models.values()),
            timed=device.type == "cpu",
            predicted=last.predicted(self._machine) if last else 0.0,
        )

    def offload(self, spec: ModelSpec) -> None:
        """Take a model off the device; the next call brings it back."""
        self._rest()
        with normal_tensors():
            self._models[spec].offload()
        memory.give_back()

    def release(self, spec: ModelSpec) -> None:
        """Forget a model."""
        self._rest()
        model = self._models.pop(spec, None)
        if model is not None:
            with normal_tensors():
                model.close()
            del model
            model_management.cleanup_models_gc()
            memory.give_back()

    def close(self) -> None:
        """Leave the process groups and forget everything. Every rank must be on its way here, or be killed."""
        for spec in list(self._models):
            self.release(spec)  # before the groups: NCCL waits for graphs that have collectives in them
        self._vaes.close()
        if self._link_watch is not None:
            self._link_watch.stop()
            self._link_watch = None
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None

    def _rest(self) -> None:
        """No model is ready any more: something else needs the device."""
        self._ready.clear()
        self._forget_recordings()

    def _forget_recordings(self) -> None:
        for model in self._models.values():
            model.forget_recordings()

    def _make_ready(self, spec: ModelSpec, args: tuple[Any, ...]) -> None:
        """Have a model with its patches on the device, for a call of these arguments; others may have to leave."""
        model = self._models[spec]
        room = model.activations(args)
        ready = self._ready.get(spec)
        if ready is not None and ready.state == model.state and room <= ready.room:
            return
        self._forget_recordings()
        with normal_tensors():
            self._make_room(spec, room)
            model.make_resident(room=room)
        self._models.move_to_end(spec)
        self._ready[spec] = Ready(model.state, model.resident_bytes, room)
        self._ready = {
            known: ready for known, ready in self._ready.items() if self._models[known].resident_bytes == ready.weights
        }

    def _make_room(self, spec: ModelSpec, room: int) -> None:
        """Take models off the device that were used least recently, until this one and its call fit beside the rest."""
        device = model_management.get_torch_device()
        if model_management.is_device_cpu(device):
            return  # weights stay where they are mapped
        model = self._models[spec]
        needed = model.size - model.resident_bytes + max(room, model_management.minimum_inference_memory())
        idle = {known: other.resident_bytes for known, other in self._models.items() if known != spec}
        for known in least_recent(idle, needed - model_management.get_free_memory(device)):
            self._models[known].offload()

    def _on_this_machine(self, spec: ModelSpec) -> ModelSpec:
        return self._here.get(spec, spec)

    def _resolve(self, name: tuple[Any, ...]) -> Any:
        kind, spec, *rest = name  # in place of a spec, files have a FileRef
        if kind == FILE:
            return self._files.tensor(spec)
        model = self._models[spec]
        if kind == "weight":
            return model.weight(rest[0])
        if kind == "module":
            return model.layer(rest[0])
        return {"base": model.patcher.model, "patcher": model.patcher, "diffusion": model.diffusion}[kind]

    def _evaluate(self, evaluation: Evaluation) -> Any:
        """Call a ControlNet."""
        model = self._models[evaluation.spec]
        self._make_ready(evaluation.spec, ())
        model.source.check()
        return model.run("forward", (), dict(evaluation.arguments), self.wire.cancelled)

    def _restore(self, value: Any, computed: Computed) -> Any:
        def found(item: Any) -> Any:
            if isinstance(item, FunctionRef):
                return self._functions[item.number]
            return computed.tensor(item) if isinstance(item, Result) else item

        return cfg.mapped(value, found)
