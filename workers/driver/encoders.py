"""Text encoders on the pool: ComfyUI's own CLIP here, with its tokenizers; weights and encoding are the workers'."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NoReturn

import comfy.utils
import torch
from comfy import model_management

from ...raylight.config import ModelSpec, WorkerSettings
from ...raylight.errors import UnsupportedError
from ..mapping import encoders
from ..wire import numerics, random_states
from ..wire.messages import Kind
from ..wire.said import Told
from . import layers, refusals
from .group import Call
from .model_rpc import ModelRpc, patches_in
from .place import Place
from .remote import RemotePatcher, refer

log = logging.getLogger(__name__)

HERE = frozenset({"memory_estimation_function"})
"""Methods of ComfyUI's encoders that look at tokens alone."""


def load_encoders(place: Place, spec: ModelSpec) -> Any:
    """A comfy.sd.CLIP whose weights are on the pool's workers.

    Args:
        spec: of one file for each encoder, and what goes with them, with the type of all (`spec.encoder`).

    Raises:
        LoadError: a file cannot be loaded, or has no text encoder.
        WorkerError: the pool did not start, or a worker failed while loading.
    """
    told = Told()
    with told.here(loading=True):
        clip = encoders.meta(spec)
    meta, built = clip.cond_stage_model, clip.patcher
    dtype = model_management.text_encoder_dtype(built.load_device)
    rpc = EncoderRpc(place, spec, dtype, refer, told)
    facts = rpc.load()[0]
    log.info("%s on %s: %s", ", ".join(map(os.path.basename, spec.paths)), facts.device, facts.weights)
    if facts.advice:
        log.warning("%s", facts.advice)
    layers.marked(meta, spec, rpc, prefix="")
    clip.cond_stage_model = _RemoteEncoders(meta, rpc, built.load_device)
    clip.patcher = EncoderPatcher(clip.cond_stage_model, built.load_device, built.offload_device)
    # what ComfyUI has set of the patcher that it built for the encoders
    for name in ("is_clip", "hook_mode", "force_cast_weights", "patches_uuid"):
        setattr(clip.patcher, name, getattr(built, name))
    clip.patcher.object_patches = dict(built.object_patches)
    return clip


class EncoderRpc(ModelRpc):
    """The way to text encoders on a pool."""

    KIND: ClassVar[Kind] = "encoder"

    def encode(
        self,
        patcher: Any,
        method: str,
        options: Sequence[dict[str, Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a method of the encoders on the pool; its output is where plain ComfyUI's would be.

        Args:
            options: what was set of the encoders since they were reset.
        """
        call = Call(
            spec=self.spec,
            method=method,
            args=(tuple(options), *args),
            kwargs=kwargs,
            functions=(),
            patches=patches_in(patcher, prefix=""),
            fresh=(),
            random=random_states.take() if method == "generate" else None,
            settings=WorkerSettings(),
            numerics=numerics.take(),
            device=model_management.intermediate_device(),
            told=self.told,
            sampling=False,
        )
        return self.answer({0: call}, several=False)[0]


class EncoderPatcher(RemotePatcher):
    """ComfyUI's patcher of text encoders on the pool: LoRAs and hooks are recorded here, and applied there."""

    @property
    def rpc(self) -> ModelRpc:
        rpc: ModelRpc = self.model.rpc
        return rpc

    def shape_of(self, key: str) -> torch.Size:
        """The unpatched shape of a weight by its key."""
        shape: torch.Size = comfy.utils.get_attr(self.model.meta, key).shape
        return shape

    def patched(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the stand-in takes what is set

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI does that before it encodes: of all clones, the last one's patches hold."""
        if self.load_device != self.model.raylight_device:
            refusals.refuse_another_device()
        self.model.__dict__["_patcher"] = weakref.ref(self)
        return super().partially_load(*args, **kwargs)

    def get_key_patches(self, *args: Any, **kwargs: Any) -> Any:
        """For merges, whose patches name weights that the workers have."""
        with self.model.shown():
            return super().get_key_patches(*args, **kwargs)

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> NoReturn:
        refusals.refuse_saving()


class _RemoteEncoders(torch.nn.Module):
    """Stands in for text encoders: nothing to load or move; keys and shapes come from the meta model."""

    def __init__(self, meta: torch.nn.Module, rpc: EncoderRpc, device: torch.device) -> None:
        super().__init__()
        self.__dict__.update(
            _meta=meta, rpc=rpc, raylight_device=device, _options=[], _patcher=lambda: None, _shown=False
        )

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._meta, name)
        part = isinstance(value, (torch.nn.Module, torch.Tensor)) or (callable(value) and name not in HERE)
        if part and not self._shown:
            _refuse_reaching(name)
        return value

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Parts of the encoders can be looked at meanwhile: they have names, shapes and no values."""
        self.__dict__["_shown"] = True
        try:
            yield
        finally:
            self.__dict__["_shown"] = False

    @property
    def meta(self) -> torch.nn.Module:
        """The encoders that have all names and shapes, and no values."""
        meta: torch.nn.Module = self._meta
        return meta

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The meta model's: LoRA key maps and add_patches look keys up here."""
        return self._meta.state_dict(*args, **kwargs)

    def reset_clip_options(self) -> None:
        self._options.clear()

    def set_clip_options(self, options: dict[str, Any]) -> None:
        self._options.append(dict(options))

    def encode_token_weights(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        return self._ask("encode_token_weights", tokens, *args, **kwargs)

    def generate(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        return self._ask("generate", tokens, *args, **kwargs)

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        patcher = self._patcher()
        if patcher is None:
            raise UnsupportedError(
                "A node uses text encoders of the pool that it has not loaded",
                f"it calls {method} without CLIP.load_model",
                "Use ComfyUI's Load CLIP for this node",
            )
        return self.rpc.encode(patcher, method, self._options, args, kwargs)


def _refuse_reaching(name: str) -> NoReturn:
    raise UnsupportedError(
        "A node reaches into text encoders that are on the workers",
        f"it asks for {name}, and has no weights to work with here",
        "Use ComfyUI's Load CLIP for this node",
    )
