"""A ControlNet on the pool: ComfyUI's own object here, its weights and what it computes on the workers."""

from __future__ import annotations

import contextlib
import os
from typing import Any, ClassVar

import comfy.controlnet
import torch
from comfy import model_management

from ...raylight.config import ModelSpec
from ...raylight.errors import LoadError, UnsupportedError
from ..mapping import meta_model
from ..wire import deferred, standing
from ..wire.deferred import Evaluation
from ..wire.messages import Kind
from ..wire.said import Told
from .lending import borrows
from .model_rpc import ModelRpc, interruptible
from .place import Place
from .remote import RemotePatcher, refer

STOCK = "Use ComfyUI's Load ControlNet Model: it runs in ComfyUI's process and works with models on the pool"


def load_control(place: Place, spec: ModelSpec) -> Any:
    """A comfy.controlnet.ControlNet whose weights are on the pool's workers.

    Raises:
        LoadError: the file cannot be loaded, or is no ControlNet.
        UnsupportedError: a kind of ControlNet that needs the weights of the model it controls.
        WorkerError: the pool did not start, or a worker failed while loading.
    """
    told = Told()
    with told.here(loading=True):
        control = _built(spec)
    meta = control.control_model
    rpc = ControlRpc(place, spec, meta.dtype, refer, told)
    rpc.load()
    control.control_model = _RemoteControl(meta, rpc)
    control.control_model_wrapped = ControlPatcher(
        control.control_model, control.load_device, model_management.unet_offload_device()
    )
    return control


class ControlRpc(ModelRpc):
    """The way to a ControlNet on a pool. What its calls return is computed by the model call that uses it."""

    KIND: ClassVar[Kind] = "control"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outlines: dict[tuple[Any, ...], Any] = {}

    def evaluate(self, arguments: dict[str, Any]) -> Any:
        """Deferred tensors for what the ControlNet returns; the workers are asked once for each set of shapes.

        Args:
            arguments: of its forward, by name; x [B, C, ...] and all others as ComfyUI passes them.
        """
        key = tuple((name, _kind(value)) for name, value in sorted(arguments.items()))
        if key not in self._outlines:
            groups = self._loaded()
            with self._lock, interruptible(), standing.explaining(), self._explained():
                self._outlines[key] = groups.parts[0].outline(self.spec, arguments)
        return deferred.filled(self._outlines[key], Evaluation(self.spec, arguments), self, arguments["x"].device)


class ControlPatcher(RemotePatcher):
    """ComfyUI's patcher of a ControlNet on the pool: it makes room for the workers' copies, and frees them."""

    @property
    def rpc(self) -> ModelRpc:
        rpc: ModelRpc = self.model.rpc
        return rpc

    def patched(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # nodes do not patch ControlNets


class _RemoteControl(torch.nn.Module):
    """Stands in for a ControlNet's model: nothing to load or move. Attributes come from the meta model."""

    def __init__(self, meta: torch.nn.Module, rpc: ControlRpc) -> None:
        super().__init__()
        self.__dict__.update(_meta=meta, rpc=rpc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._meta, name)

    def forward(self, **arguments: Any) -> Any:
        return self.rpc.evaluate(arguments)


def _built(spec: ModelSpec) -> Any:
    """ComfyUI's ControlNet of a file, on meta tensors."""
    name = os.path.basename(spec.path)
    state, _ = meta_model.header(spec)
    if "difference" in state:
        _refuse(name, "it holds differences to the weights of the model it controls")
    options: dict[str, Any] = {}
    # ComfyUI's own rule (comfy/controlnet.py, load_controlnet)
    if os.path.splitext(spec.path)[0].endswith(("_shuffle", "_shuffle_fp16")):
        options["global_average_pooling"] = True
    with meta_model.all_on_meta():
        try:
            control = comfy.controlnet.load_controlnet_state_dict(dict(state), model_options=options)
        except Exception as error:  # detection trusts a file's shapes; which errors it meets is open
            raise LoadError(
                f"ComfyUI cannot build a ControlNet from {name}",
                f"{type(error).__name__}: {error}",
                "The file is damaged or of another kind: choose another one",
            ) from error
    if control is None:
        raise LoadError(
            f"ComfyUI does not recognise a ControlNet in {name}",
            "its tensor names fit none",
            "Choose a ControlNet file (models that patch the model's blocks have loaders of their own)",
        )
    if borrows(control):
        _refuse(name, "it takes over weights of the model it controls, which are on the workers")
    if not isinstance(control, comfy.controlnet.ControlNet):
        _refuse(name, f"a {type(control).__name__} runs once per picture, not at every step")
    return control


def _refuse(name: str, why: str) -> None:
    raise UnsupportedError(f"{name} cannot be loaded on the workers", why, STOCK)


def _kind(value: Any) -> Any:
    """What of an argument decides the shapes that a ControlNet returns."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    return type(value).__name__ if isinstance(value, torch.nn.Module) else repr(value)
