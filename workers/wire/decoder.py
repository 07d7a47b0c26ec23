"""A worker's side of what crosses: unpacks parcels onto its device, and packs its answers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

from .arena import ArenaRef, open_arena, pin
from .parcels import Parcel, TensorRef, lay_out, place
from .pickling import Pickler, Unpickler


class Decoder:
    """A worker's side: unpacks parcels onto its device and packs its answers.

    Args:
        resolve: turns the tuple that names a live object into the worker's own.
        device: where tensors go that were on the driver's accelerator.
    """

    def __init__(self, resolve: Callable[[tuple[Any, ...]], Any], device: torch.device) -> None:
        self._resolve = resolve
        self._device = device
        self._arena: tuple[ArenaRef, torch.Tensor] | None = None
        self._held: dict[int, torch.Tensor] = {}

    def decode(self, parcel: Parcel) -> Any:
        """Unpack. Tensors are copies of this process's own, unless the arena is theirs for good."""
        for key in parcel.dropped:
            self._held.pop(key, None)
        if parcel.arena is not None:
            storage = open_arena(parcel.arena, private=True) if parcel.lasting else self._open(parcel.arena)
        else:
            inline = parcel.inline or b""
            storage = torch.frombuffer(bytearray(inline), dtype=torch.uint8) if inline else torch.empty(0)
        tensors = []
        for ref in parcel.tensors:
            target = self._device if ref.on_device else torch.device("cpu")
            tensor = place(storage, ref).to(target, copy=not parcel.lasting)
            tensors.append(tensor)
            if ref.key is not None:
                self._held[ref.key] = tensor
        return Unpickler(io.BytesIO(parcel.blob), tensors, self._held, self._resolve).load()

    def answer(self, value: Any, request: Parcel) -> Parcel:
        """Pack tensors into the room the request left; what does not fit travels inline."""
        tensors: list[torch.Tensor] = []

        def take(tensor: torch.Tensor) -> tuple[str, Any]:
            tensors.append(tensor.detach())
            return ("tensor", len(tensors) - 1)

        file = io.BytesIO()
        Pickler(file, take, lambda _: None).dump(value)
        refs, size = lay_out(tensors, [None] * len(tensors))
        start, room = request.reply
        arena = request.arena if size <= room and size else None
        if arena is not None:
            refs = tuple(TensorRef(start + r.offset, r.shape, r.dtype, r.on_device, None) for r in refs)
            for ref, tensor in zip(refs, tensors, strict=True):
                place(self._open(arena), ref).copy_(tensor)
            return Parcel(file.getvalue(), refs, arena, None, (), (0, 0))
        storage = torch.empty(size, dtype=torch.uint8)
        for ref, tensor in zip(refs, tensors, strict=True):
            place(storage, ref).copy_(tensor)
        return Parcel(file.getvalue(), refs, None, storage.numpy().tobytes(), (), (0, 0))

    def _open(self, ref: ArenaRef) -> torch.Tensor:
        if self._arena is None or self._arena[0] != ref:
            self._arena = (ref, open_arena(ref))
            pin(self._arena[1], self._device)
        return self._arena[1]
