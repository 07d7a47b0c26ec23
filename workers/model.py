"""A worker's copy of a model: ComfyUI's own patcher, with the family's plan installed on it."""

from __future__ import annotations

import uuid
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy import model_management

from ..patches.ffn import ChunkedFeedForward
from ..patches.registry import plan_for
from ..raylight import cost
from ..raylight.config import ModelSpec, WorkerSettings
from ..raylight.errors import LoadError
from ..raylight.hooks import install
from ..raylight.kernels import LocalKernel
from ..raylight.mesh import Mesh
from .comfy_host import device_uuid
from .loading import load_options
from .messages import ModelFacts

RATES = {
    "cuda": cost.Machine(linear=1.0e14, attention=8e13, link=6e9, latency=5e-5, call=4e-3),
    "cpu": cost.Machine(linear=5e10, attention=3e10, link=1.5e9, latency=3e-4, call=4e-3),
}
"""Rates by device type, to say where sharing does not pay: an RTX 4090 on PCIe 4 x8, and one CPU core
(docs/scaling.md)."""


class WorkerModel:
    """One loaded model of a worker.

    Raises:
        LoadError: the file changed since the driver looked at it, or ComfyUI does not know the model.
        UnsupportedError: no plan for the family, while the mesh divides sequences.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, kernel: LocalKernel | None) -> None:
        now = ModelSpec.of(spec.path, dtype=spec.dtype, options=spec.options)
        if now != spec:
            raise LoadError(
                f"{spec.path} changed while it was being loaded",
                f"size {spec.size} -> {now.size}, inode {spec.inode} -> {now.inode}",
                "Wait until the file is complete, then queue the prompt again",
            )
        arguments, keywords = load_options(spec)
        state, metadata = comfy.utils.load_torch_file(spec.path, return_metadata=True)
        patcher = comfy.sd.load_diffusion_model_state_dict(state, arguments, metadata=metadata, **keywords)
        if patcher is None:
            raise LoadError(
                f"ComfyUI does not recognise a diffusion model in {spec.path}", "", "Choose a diffusion model file"
            )
        self.patcher = patcher
        self.state = ""
        self._base = patcher
        self._settings = WorkerSettings()
        self._chunked: ChunkedFeedForward | None = None
        self._mesh = mesh
        self._installation = None
        if mesh.parallel.needs_plan:
            self._installation = install(self.diffusion, plan_for(self.diffusion), mesh, kernel=kernel)

    @property
    def diffusion(self) -> torch.nn.Module:
        return self._base.model.diffusion_model

    def facts(self) -> ModelFacts:
        """What the driver must know of this copy."""
        model = self._base.model
        device = model_management.get_torch_device()
        cast = model.manual_cast_dtype
        return ModelFacts(
            family=type(self.diffusion).__name__,
            dtype=str(model.get_dtype()).removeprefix("torch."),
            manual_cast="" if cast is None else str(cast).removeprefix("torch."),
            bytes=self._base.model_size(),
            device=str(device),
            uuid=device_uuid(device),
        )

    def patch(self, state: str, patches: dict[str, Any], objects: dict[str, Any], *, force_cast: bool) -> None:
        """Take over the driver's weight and object patches; ComfyUI applies them when the model becomes resident."""
        patcher = self._base.clone()
        patcher.patches = patches
        if state:
            patcher.patches_uuid = uuid.uuid5(uuid.NAMESPACE_OID, state)
        patcher.force_cast_weights = force_cast
        for name, value in objects.items():
            patcher.add_object_patch(name, value)
        self.patcher = patcher
        self.state = state

    def settle(self, settings: WorkerSettings) -> None:
        """Bring the model to these settings; does nothing where it is there already."""
        if settings == self._settings:
            return
        if self._chunked is not None:
            self._chunked.remove()
            self._chunked = None
        if settings.ffn_chunks > 1:
            self._chunked = ChunkedFeedForward(self.diffusion, settings.ffn_chunks)
        self._settings = settings

    def make_resident(self, args: tuple[Any, ...]) -> None:
        """Bring weights and patches onto the device, with room for a call of these arguments."""
        first = args[0] if args else None
        if isinstance(first, (list, tuple)):
            first = first[0]
        needed = self._base.memory_required(list(first.shape)) if isinstance(first, torch.Tensor) else 0
        model_management.load_models_gpu([self.patcher], memory_required=needed)

    def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the diffusion model, under its plan where it is the model's forward."""
        function = getattr(self.diffusion, method)
        if self._installation is not None and method in ("forward", "_forward"):
            return self._installation.wrapper(function, *args, **kwargs)
        return function(*args, **kwargs)

    def advice(self) -> str:
        """What the last call showed that the user should know: "" for nothing."""
        if self._installation is None:
            return ""
        degrees = self._mesh.parallel.degrees
        machine = RATES.get(model_management.get_torch_device().type)
        works = list(self._installation.works.values())
        if machine is None:
            return ""
        return cost.advice(works, machine, ulysses=degrees["ulysses"], ring=degrees["ring"])

    def weight(self, key: str) -> torch.Tensor:
        """An unpatched weight by its key in the model's state dict."""
        backup = self.patcher.backup.get(key)
        return comfy.utils.get_attr(self._base.model, key) if backup is None else backup.weight

    def close(self) -> None:
        """Take the hooks out and the weights off the device."""
        self.settle(WorkerSettings())
        if self._installation is not None:
            self._installation.remove()
        self.patcher.detach()
