"""The driver's side of what crosses: packs values, and remembers what the workers already hold."""

from __future__ import annotations

import functools
import io
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...raylight.errors import UnsupportedError
from .arena import Arena, pin
from .parcels import ALIGNMENT, CPU, FILE, Parcel, Reference, TensorRef, lay_out, place
from .pickling import Pickler, Unpickler

COMPARE_FROM = 64 << 10
"""Bytes from which a tensor is compared with what the workers hold: below, sending is cheaper than looking."""
HELD_LIMIT = 16
"""Tensors of earlier calls that the workers keep: a run repeats a handful of contexts."""
HELD_BYTES = 1 << 30
"""And how much memory they may take, here and in each worker."""


class Shelf:
    """Kept tensors on their way to several groups of workers: all use the copy that was made for the first.

    Args:
        readers: how many encoders share it.
    """

    def __init__(self, readers: int = 1) -> None:
        self._readers = readers
        self._waiting: list[_Shelved] = []

    def put(self, tensors: Sequence[torch.Tensor], refs: Sequence[TensorRef], size: int) -> Arena:
        """The arena that has these tensors at the offsets of their refs. Whoever sends it holds it until it is sent.

        It waits here for the others as long as the tensors live.
        """
        self._waiting = [known for known in self._waiting if all(ref() is not None for ref in known.tensors)]
        for known in self._waiting:
            if len(known.tensors) == len(tensors) and all(
                ref() is tensor for ref, tensor in zip(known.tensors, tensors, strict=True)
            ):
                known.readers -= 1
                if not known.readers:
                    self._waiting.remove(known)
                return known.arena
        arena = Arena(max(size, ALIGNMENT))
        for ref, tensor in zip(refs, tensors, strict=True):
            place(arena.bytes, ref).copy_(tensor.detach())
        if self._readers > 1:
            self._waiting.append(_Shelved([weakref.ref(tensor) for tensor in tensors], arena, self._readers - 1))
        return arena


@dataclass(eq=False)
class _Shelved:
    """An arena, what it was filled with, and how many are still to come for it."""

    tensors: list[weakref.ref[torch.Tensor]]
    arena: Arena
    readers: int


class Encoder:
    """The driver's side: packs values and remembers which tensors the workers already hold.

    Args:
        refer: maps a live object to a plain tuple that names it in the workers, None for all others.
        shared: whether every worker can open this process's arena.
        shelf: shared with the encoders of other groups of workers on the same pool.
    """

    def __init__(self, refer: Reference, *, shared: bool, shelf: Shelf | None = None) -> None:
        self._refer = refer if shared else functools.partial(_anywhere, refer)
        self._shared = shared
        self._shelf = shelf or Shelf()
        self._arena: Arena | None = None
        self._lasting: Arena | None = None
        self._next_key = 0
        self._held: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._kept: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._dropped: list[int] = []
        self._reply_bytes = 1 << 20
        self.bytes_sent = 0
        self.bytes_held = 0

    def expect_reply(self, size: int) -> None:
        """Leave room for an answer of `size` bytes from the next parcel on."""
        self._reply_bytes = max(self._reply_bytes, size + ALIGNMENT)

    def encode(self, value: object, *, fresh: Iterable[torch.Tensor] = (), keep: bool = False) -> Parcel:
        """Pack `value`.

        Tensors from COMPARE_FROM bytes on that equal one the workers hold are named, not sent; identity
        cannot decide this, since ComfyUI casts and concatenates conditioning anew at every step. `fresh`
        names tensors that change at each call and are never compared. With `keep` tensors are
        known by identity and stay in the workers as long as the caller's tensor lives (weight patches);
        all workers use one copy of them, which `arrived` leaves to them.

        Raises:
            UnsupportedError: something in `value` cannot be pickled.
        """
        tensors: list[torch.Tensor] = []
        keys: list[int | None] = []
        self._forget_dead()
        always = {id(tensor): tensor for tensor in fresh}
        used: set[int] = set()
        new: list[int] = []

        def take(tensor: torch.Tensor) -> tuple[str, Any]:
            key = None
            if keep:
                known = self._kept.get(id(tensor))
                if known and known[0]() is tensor:
                    self.bytes_held += tensor.nbytes
                    return ("held", known[1])
                key = self._new_key(new)
                self._kept[id(tensor)] = (weakref.ref(tensor), key)
            elif tensor.nbytes >= COMPARE_FROM and always.get(id(tensor)) is not tensor:
                found = self._find(tensor)
                if found is not None:
                    used.add(found)
                    self._held.move_to_end(found)
                    self.bytes_held += tensor.nbytes
                    return ("copy of held", found)
                key = self._new_key(new)
                self._held[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
                used.add(key)
            tensors.append(tensor)
            keys.append(key)
            return ("tensor" if key is None or keep else "copy of tensor", len(tensors) - 1)

        file = io.BytesIO()
        try:
            Pickler(file, take, self._refer).dump(value)
        except BaseException as error:
            # nothing was sent: the workers do not hold what was taken
            self._held = OrderedDict((key, value) for key, value in self._held.items() if key not in new)
            self._kept = {identity: entry for identity, entry in self._kept.items() if entry[1] not in new}
            if not isinstance(error, (pickle.PicklingError, TypeError, AttributeError)):
                raise
            raise UnsupportedError(
                "Something that has to run on the workers cannot be sent there",
                str(error),
                "Remove the node that put it into the model, or sample without the pool",
            ) from error
        self._evict(used)
        dropped, self._dropped = tuple(self._dropped), []
        if keep and self._shared and tensors:
            return self._lasting_parcel(file.getvalue(), tensors, keys, dropped)
        return self._parcel(file.getvalue(), tensors, keys, dropped)

    def arrived(self) -> None:
        """The workers have the last parcel with `keep`: from now on its memory is theirs."""
        self._lasting = None

    def decode_reply(self, value: Any, device: torch.device = CPU) -> Any:
        """The answer of a worker: `Parcel` values become their tensors, copied out of the arena to a device."""
        if not isinstance(value, Parcel):
            return value
        if value.inline is not None:
            storage = torch.frombuffer(bytearray(value.inline), dtype=torch.uint8) if value.inline else torch.empty(0)
        else:
            assert self._arena is not None
            storage = self._arena.bytes
        found = [place(storage, ref).to(device, copy=True) for ref in value.tensors]
        return Unpickler(io.BytesIO(value.blob), found, {}, None).load()

    def _lasting_parcel(
        self, blob: bytes, tensors: list[torch.Tensor], keys: list[int | None], dropped: tuple[int, ...]
    ) -> Parcel:
        refs, size = lay_out(tensors, keys)
        self.bytes_sent += len(blob) + size
        self._lasting = self._shelf.put(tensors, refs, size)
        return Parcel(blob, refs, self._lasting.ref, None, dropped, (0, 0), lasting=True)

    def _parcel(
        self, blob: bytes, tensors: list[torch.Tensor], keys: list[int | None], dropped: tuple[int, ...]
    ) -> Parcel:
        refs, size = lay_out(tensors, keys)
        self.bytes_sent += len(blob) + size
        if not self._shared:
            storage = torch.empty(size, dtype=torch.uint8)
            for ref, tensor in zip(refs, tensors, strict=True):
                place(storage, ref).copy_(tensor.detach())
            return Parcel(blob, refs, None, storage.numpy().tobytes(), dropped, (0, 0))
        if self._arena is None or self._arena.ref.size < size + self._reply_bytes:
            self._arena = Arena(2 * (size + self._reply_bytes))
            pin(self._arena.bytes, next((t.device for t in tensors if t.device.type != "cpu"), CPU))
        for ref, tensor in zip(refs, tensors, strict=True):
            place(self._arena.bytes, ref).copy_(tensor.detach())
        return Parcel(blob, refs, self._arena.ref, None, dropped, (size, self._arena.ref.size - size))

    def _find(self, tensor: torch.Tensor) -> int | None:
        for key, held in self._held.items():
            same_kind = held.shape == tensor.shape and held.dtype == tensor.dtype and held.device == tensor.device
            if same_kind and torch.equal(_words(held), _words(tensor)):
                return key
        return None

    def _evict(self, used: set[int]) -> None:
        """Drop the oldest held tensors over the limits; those of the parcel at hand stay."""
        size = sum(tensor.nbytes for tensor in self._held.values())
        for key in [key for key in self._held if key not in used]:
            if len(self._held) <= HELD_LIMIT and size <= HELD_BYTES:
                break
            size -= self._held.pop(key).nbytes
            self._dropped.append(key)

    def _new_key(self, new: list[int]) -> int:
        self._next_key += 1
        new.append(self._next_key)
        return self._next_key

    def _forget_dead(self) -> None:
        dead = [identity for identity, (ref, _) in self._kept.items() if ref() is None]
        self._dropped += [self._kept.pop(identity)[1] for identity in dead]


def _anywhere(refer: Reference, value: object) -> tuple[Any, ...] | None:
    """What `refer` names and a worker on another host has as well: no files of this one."""
    name = refer(value)
    return None if name is not None and name[0] == FILE else name


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers: equal means the same bits, and comparing eight at a time is twice as fast."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8 if flat.nbytes % 8 else torch.int64)
