"""ComfyUI's patcher over mapped weights: what leaves the device goes home to the map, and nothing is copied back."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import torch

from ...loaders.source import Source
from ...loaders.staging import Engine, Piece, engine_for, upload
from ...raylight.config import ModelSpec
from .adopt import Home, address, parts
from .gguf_ops import BlockPatch
from .loading import normal_tensors

ATTACHMENT = "raylight_weights"

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])
"""The two fields ComfyUI reads of a backup."""


@dataclass
class Weights:
    """The weights of one model, shared by all clones of its patcher.

    Attributes:
        source: the file.
        homes: where every parameter that ComfyUI moves lives on the host, by key.
        patch_dtype: what patches of quantised blocks are computed in; None is their result's.
        applied: patches that are in the parameters now, by key.
        engine: makes what brings bytes to a device.
        size: bytes of all of it on the device, once they were counted.
        force_cast: whether layers were told to cast whatever they have.
        engines: those that were made, with their buffers.
        moves: how often weights may have been moved or changed.
    """

    source: Source
    homes: Mapping[str, Home]
    patch_dtype: torch.dtype | None = torch.float32
    applied: dict[str, list[Any]] = field(default_factory=dict)
    engine: Callable[[torch.device], Engine] = engine_for
    size: int | None = None
    force_cast: bool = False
    engines: dict[torch.device, Engine] = field(default_factory=dict)
    moves: int = 0

    def on_model_patcher_clone(self) -> Weights:
        return self

    def upload(self, homes: Iterable[Home], device: Any) -> Iterator[torch.Tensor]:
        """Copies of weights on a device, as ComfyUI would hold them there, in the order given."""
        device = torch.device(device)
        if device not in self.engines:
            self.engines[device] = self.engine(device)
        pieces = [
            Piece(home.tensor, self.source.offset(home.tensor), home.dtype or home.tensor.dtype) for home in homes
        ]
        return upload(self.source, pieces, self.engines[device])

    @functools.cached_property
    def in_file_order(self) -> Sequence[tuple[str, Home]]:
        """Every home, as its bytes come in the file; what is not of the file last."""

        def order(item: tuple[str, Home]) -> float:
            offset = self.source.offset(parts(item[1].tensor)[0])
            return float("inf") if offset is None else offset

        return sorted(self.homes.items(), key=order)


def outside_inference(method: Callable[..., Any]) -> Callable[..., Any]:
    """Has a method of a patcher run outside of inference mode, wherever ComfyUI calls it from."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with normal_tensors():
            return method(*args, **kwargs)

    return call


def moving(method: Callable[..., Any]) -> Callable[..., Any]:
    """Notes that a method of a patcher may move or change weights, which it does outside of inference mode."""

    @functools.wraps(method)
    def call(self: MappedPatcher, *args: Any, **kwargs: Any) -> Any:
        if ATTACHMENT in self.attachments:
            self.weights.moves += 1
        return method(self, *args, **kwargs)

    return outside_inference(call)


class MappedPatcher(comfy.model_patcher.ModelPatcher):
    """Loads, patches and unloads as ComfyUI does, but weights come from the map and go back to it."""

    @property
    def weights(self) -> Weights:
        found: Weights = self.attachments[ATTACHMENT]
        return found

    def model_size(self) -> int:
        """Bytes on the device, where weights have ComfyUI's dtype and not always the file's."""
        if ATTACHMENT not in self.attachments:
            return int(super().model_size())
        if self.weights.size is None:
            self.weights.size = sum(map(device_bytes, self.weights.homes.values()))
        return self.weights.size

    @moving
    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's, with the copies to the device made from the file."""
        self.weights.force_cast = self.force_cast_weights
        if self._is_home(device_to):
            return super().load(device_to, *args, **kwargs)
        if kwargs.get("full_load"):
            self._upload(device_to)
        with _Uploading(self.weights, device_to):
            result = super().load(device_to, *args, **kwargs)
        self._patch_blocks()
        self._round_what_stayed()
        return result

    @moving
    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        """ComfyUI's; weights are home before it would copy them back."""
        if unpatch_weights and ATTACHMENT in self.attachments:
            for key, home in self.weights.homes.items():
                if not home.at_home and key not in self.backup:
                    home.put(home.tensor)
            for key in self.weights.applied:
                _unhook(self.weights.homes[key])
            self.weights.applied.clear()
        return super().unpatch_model(device_to, unpatch_weights)

    @moving
    def partially_unload(self, device_to: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's; what it moves off the device goes home."""
        before = {key: address(home.parameter) for key, home in self.weights.homes.items()}
        with _Returning(self.weights, device_to):
            freed = super().partially_unload(device_to, *args, **kwargs)
        for key, home in self.weights.homes.items():
            if key in self.weights.applied and key not in self.backup and not is_blocks(home):
                del self.weights.applied[key]
            # a quantised one is moved piece by piece
            if not home.at_home and address(home.parameter) != before[key]:
                home.put(home.tensor)
        self._patch_blocks()
        self._round_what_stayed()
        return freed

    @moving
    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> Any:
        """ComfyUI's; where only patches differ, it finds them changed already, weight by weight."""
        model = self.model
        loaded = model.model_loaded_weight_memory > 0 and not model.model_lowvram
        loaded = loaded and self.weights.force_cast == self.force_cast_weights
        if loaded and not force_patch_weights and model.current_weight_patches_uuid not in (None, self.patches_uuid):
            self._switch(device_to)
            model.current_weight_patches_uuid = self.patches_uuid
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def patch_weight_to_device(self, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's, always computed from the unpatched weight; blocks keep their patches beside them."""
        home = self.weights.homes.get(key)
        if home is None or key not in self.patches:
            return super().patch_weight_to_device(key, device_to, *args, **kwargs)
        if is_blocks(home):
            self._patch_blocks(key)
            return None
        if home.at_home or key in self.weights.applied:
            home.put(self._native(home, device_to))
        self.weights.applied[key] = list(self.patches[key])
        # a reference to the map, where ComfyUI would copy the weight off the device
        self.backup[key] = Backup(home.tensor, False)
        return super().patch_weight_to_device(key, device_to, *args, **kwargs)

    def pin_weight_to_device(self, key: str) -> None:
        """Pages of the file are not page-locked; uploads have buffers of their own."""

    def _is_home(self, device: Any) -> bool:
        return device is None or torch.device(device) == self.offload_device

    def _upload(self, device: Any) -> None:
        """Bring every weight to the device in file order; ComfyUI then patches what is to be patched there."""
        pending = [home for _, home in self.weights.in_file_order if _uploads(home)]
        for home, tensor in zip(pending, self.weights.upload(pending, device), strict=True):
            home.put(tensor)

    def _switch(self, device: Any) -> None:
        """Recompute the weights whose patches differ from those that are in them, and only those."""
        applied = self.weights.applied
        # ComfyUI leaves parameters of modules that have others inside as they are
        reached = {f"{name}.{parameter}" for *_, name, _, names in self._load_list() for parameter in names}
        changed = [
            (key, home)
            for key, home in self.weights.in_file_order
            if key in reached and not same_patches(applied.get(key, []), self.patches.get(key, []))
        ]
        for key, home in changed:
            applied.pop(key, None)
            self.backup.pop(key, None)
            if is_blocks(home):
                _unhook(home)
            else:
                home.put(home.tensor)
        # patched as they come, while others are read
        for key, home, tensor in self._natives(changed, device):
            if tensor is not None:
                home.put(tensor)
            if key in self.patches:
                self.patch_weight_to_device(key, device_to=device)

    def _natives(
        self, changed: Sequence[tuple[str, Home]], device: Any
    ) -> Iterator[tuple[str, Home, torch.Tensor | None]]:
        """Unpatched weights as ComfyUI would hold them on a device; None for what is not to be replaced there."""
        away = not self._is_home(device)
        read = [(key, home) for key, home in changed if away and _uploads(home) and not is_blocks(home)]
        if read:
            uploaded = self.weights.upload([home for _, home in read], device)
            yield from ((key, home, tensor) for (key, home), tensor in zip(read, uploaded, strict=True))
        done = {key for key, _ in read}
        for key, home in changed:
            if key not in done:
                moves = away and home.at_home and not is_blocks(home) and key not in self.patches
                yield key, home, self._native(home, device) if moves else None

    def _native(self, home: Home, device: Any) -> torch.Tensor:
        """An unpatched weight as ComfyUI would hold it on a device: on the host, the map where that is the same."""
        if self._is_home(device) or len(parts(home.tensor)) > 1:
            return home.tensor.to(device=device, dtype=home.dtype)
        (tensor,) = self.weights.upload([home], device)
        return tensor

    def _patch_blocks(self, *keys: str) -> None:
        """Give patched blocks (these, or all) their own patch in place of what ComfyUI put there for a part of them."""
        for key in keys or self.patches:
            home = self.weights.homes.get(key)
            if home is not None and is_blocks(home):
                self.weights.applied[key] = list(self.patches[key])
                functions_of(home)[:] = [BlockPatch(key, self.patches[key], self.weights.patch_dtype)]

    def _round_what_stayed(self) -> None:
        """Weights that stay on the host are cast when they are used: by way of the dtype ComfyUI keeps them in."""
        for home in self.weights.homes.values():
            if home.at_home and home.dtype not in (None, home.tensor.dtype) and home.name in ("weight", "bias"):
                functions = functions_of(home)
                if not any(isinstance(function, _Round) for function in functions):
                    functions.insert(0, _Round(home.dtype))


class _Round:
    """A weight function: the value that the weight would have in ComfyUI's dtype."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._dtype).to(weight.dtype)


class _Moving(torch.overrides.TorchFunctionMode):
    """Answers `tensor.to(device)` for parameters of a model, in this thread and scope only.

    Parameters are held while it lasts, so that an identity is never another one's.
    """

    def __init__(self, weights: Weights, device: Any) -> None:
        super().__init__()
        self._device = torch.device(device)
        self._weights = weights
        self._known = {
            id(home.parameter): (home.parameter, home)
            for home in weights.homes.values()
            if len(parts(home.tensor)) == 1 and self._moves(home)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.Tensor.to
            and len(args) > 1
            and _device_of(args[1]) == self._device
            and id(args[0]) in self._known
        ):
            return self._moved(self._known[id(args[0])][1])
        return func(*args, **(kwargs or {}))

    def _moves(self, home: Home) -> bool:
        raise NotImplementedError

    def _moved(self, home: Home) -> torch.Tensor:
        raise NotImplementedError


class _Uploading(_Moving):
    """To the device: read from the file."""

    def _moves(self, home: Home) -> bool:
        return home.at_home

    def _moved(self, home: Home) -> torch.Tensor:
        (moved,) = self._weights.upload([home], self._device)
        return moved


class _Returning(_Moving):
    """To the host: the memory it came from."""

    def _moves(self, home: Home) -> bool:
        return not home.at_home

    def _moved(self, home: Home) -> torch.Tensor:
        return home.tensor


def same_patches(left: Any, right: Any) -> bool:
    """Whether two patch lists of a weight compute the same: tensors are compared by the memory they are in."""
    if left is right:
        return True
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return (
            isinstance(left, torch.Tensor)
            and isinstance(right, torch.Tensor)
            and left.data_ptr() == right.data_ptr()
            and (left.shape, left.stride(), left.dtype) == (right.shape, right.stride(), right.dtype)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_patches, left, right))
    if hasattr(left, "calculate_weight"):  # one of ComfyUI's adapters
        return same_patches(left.weights, right.weights)
    return bool(left == right) if isinstance(left, (str, int, float, type(None))) else False


def device_bytes(home: Home) -> int:
    """What a parameter takes where ComfyUI holds it."""
    found = parts(home.tensor)
    if len(found) == 1 and home.dtype is not None:
        return found[0].numel() * home.dtype.itemsize
    return sum(tensor.nbytes for tensor in found)


def _uploads(home: Home) -> bool:
    """Whether it is to be read from the file: it is at home, and one tensor."""
    return home.at_home and len(parts(home.tensor)) == 1


def patch_dtype(spec: ModelSpec) -> torch.dtype | None:
    """What patches of quantised blocks are computed in; None is the dtype that a weight computes in, for `target`."""
    if not spec.patch_dtype:
        return torch.float32
    return None if spec.patch_dtype == "target" else getattr(torch, spec.patch_dtype)


def is_blocks(home: Home) -> bool:
    """Whether it is quantised blocks of a GGUF file."""
    return bool(getattr(home.module, "quant", "")) and home.name == "weight"


def functions_of(home: Home) -> list[Any]:
    """The functions ComfyUI's layer applies to a parameter when it casts it; a list of the module's own."""
    name = f"{home.name}_function"
    if name not in home.module.__dict__:
        setattr(home.module, name, list(getattr(home.module, name, ())))
    found: list[Any] = getattr(home.module, name)
    return found


def _unhook(home: Home) -> None:
    if is_blocks(home):
        functions_of(home).clear()


def _device_of(value: Any) -> torch.device | None:
    return torch.device(value) if isinstance(value, (torch.device, str)) else None
