"""Tensors and Python values between the driver and its workers: shared memory on one host, bytes otherwise."""

from __future__ import annotations

import functools
import io
import logging
import pickle
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cloudpickle
import torch

from ...raylight.errors import UnsupportedError
from . import path_modules
from .arena import Arena, ArenaRef, open_arena, pin

log = logging.getLogger(__name__)

T = TypeVar("T")

COMPARE_FROM = 64 << 10
"""Bytes from which a tensor is compared with what the workers hold: below, sending is cheaper than looking."""
HELD_LIMIT = 16
"""Tensors of earlier calls that the workers keep: a run repeats a handful of contexts."""
HELD_BYTES = 1 << 30
"""And how much memory they may take, here and in each worker."""
ALIGNMENT = 64
CPU = torch.device("cpu")


class Weight(torch.nn.Parameter):
    """A parameter that counts what is written into it through `data`, which torch does not."""

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        same = value.shape == self.shape and value.dtype == self.dtype
        if not same or not torch.equal(value.to(self.device), self):  # a layer that is moved has the values it had
            self.raylight_version = -1  # no count of torch's
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


PLAIN = (torch.Tensor, torch.nn.Parameter, Weight)

FILE = "file"
"""First part of a name that a `Reference` gives to a tensor of a file; the second is its FileRef."""
Reference = Callable[[object], tuple[Any, ...] | None]


@dataclass(frozen=True)
class TensorRef:
    """One tensor in a parcel's bytes. `key` is the number workers keep it under, None for this call only."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_device: bool
    key: int | None


@dataclass(frozen=True)
class Parcel:
    """A pickled value whose tensors travel beside it, in the arena or `inline`.

    `reply` is the (offset, length) of the arena that the answer may use; (0, 0) where none is shared.
    A `lasting` arena holds nothing else and is not written again: its tensors are used where they are.
    """

    blob: bytes
    tensors: tuple[TensorRef, ...]
    arena: ArenaRef | None
    inline: bytes | None
    dropped: tuple[int, ...]
    reply: tuple[int, int]
    lasting: bool = False


def nbytes(tensor: TensorRef) -> int:
    """Size of the tensor a ref names, in bytes."""
    return tensor.dtype.itemsize * torch.Size(tensor.shape).numel()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers: equal means the same bits, and comparing eight at a time is twice as fast."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8 if flat.nbytes % 8 else torch.int64)


def place(storage: torch.Tensor, ref: TensorRef) -> torch.Tensor:
    """The view of `storage` (uint8, 1-D) that holds the tensor `ref` names."""
    count = nbytes(ref)
    if not count:
        return torch.empty(ref.shape, dtype=ref.dtype)
    return storage[ref.offset : ref.offset + count].view(ref.dtype).view(ref.shape)


def lay_out(tensors: Iterable[torch.Tensor], keys: Iterable[int | None]) -> tuple[tuple[TensorRef, ...], int]:
    """Give each tensor an aligned offset. Returns the refs and the bytes needed."""
    refs, end = [], 0
    for tensor, key in zip(tensors, keys, strict=True):
        refs.append(TensorRef(end, tuple(tensor.shape), tensor.dtype, tensor.device.type != "cpu", key))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(refs), end


class _Cell:
    """Contents of a closure cell, pickled apart from the cell so that functions can share it."""

    def __init__(self, cell: types.CellType) -> None:
        self.value: tuple[Any, ...]
        try:
            self.value = (cell.cell_contents,)
        except ValueError:  # not filled yet
            self.value = ()

    @property
    def cell_contents(self) -> Any:
        if not self.value:
            raise ValueError("empty cell")
        return self.value[0]


class _Pickler(cloudpickle.Pickler):
    """By-value pickling whose tensors are handed to `take` and whose live objects to `refer`.

    cloudpickle gives every function its own copies of its cells; two patches that share a `nonlocal`
    would come apart in the worker. Cells are therefore pickled empty, once, and filled by each function.
    """

    def __init__(self, file: io.BytesIO, take: Callable[[torch.Tensor], tuple[str, Any]], refer: Reference) -> None:
        super().__init__(file, protocol=5)
        self._take = take
        self._refer = refer

    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        referred = self._refer(obj)
        if referred is not None:
            return ("live", referred)
        # subclasses, such as quantised tensors, know themselves how to be pickled
        if isinstance(obj, torch.Tensor) and type(obj) in PLAIN and obj.layout == torch.strided:
            if obj.is_meta:
                raise UnsupportedError(
                    "A weight that only the workers hold was about to be sent to them", f"shape {tuple(obj.shape)}"
                )
            return self._take(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is types.CellType:
            return types.CellType, ()
        named = path_modules.reference(obj)
        if named is not None:
            return named
        reduced = super().reducer_override(obj)
        if isinstance(obj, types.FunctionType) and obj.__closure__ and isinstance(reduced, tuple):
            make, new_args, (attributes, slots), *rest = reduced
            slots = {**slots, "__closure__": tuple(_Cell(cell) for cell in obj.__closure__)}
            reduced = (make, (*new_args[:4], obj.__closure__), (attributes, slots), *rest)
        return reduced


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
            _Pickler(file, take, self._refer).dump(value)
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
        return _Unpickler(io.BytesIO(value.blob), found, {}, None).load()

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


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        tensors: list[torch.Tensor],
        held: dict[int, torch.Tensor],
        resolve: Callable[[tuple[Any, ...]], Any] | None,
    ) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._held = held
        self._resolve = resolve

    def persistent_load(self, pid: tuple[str, Any]) -> Any:
        kind, value = pid
        if kind == "tensor":
            return self._tensors[value]
        if kind == "held":
            return self._held[value]
        # models may write into what they are given, as HunyuanDiT does, and others are given the same
        if kind == "copy of tensor":
            return self._tensors[value].clone()
        if kind == "copy of held":
            return self._held[value].clone()
        assert self._resolve is not None
        return self._resolve(value)


def copied(value: T, is_shared: Callable[[object], bool]) -> T:
    """A copy of a value with all that it holds, also inside of functions, but for what `is_shared`.

    Raises:
        UnsupportedError: something in it cannot be copied.
    """
    shared: list[object] = []
    memo: dict[int, int] = {}

    def refer(found: object) -> tuple[Any, ...] | None:
        if not is_shared(found):
            return None
        if id(found) not in memo:
            memo[id(found)] = len(shared)
            shared.append(found)
        return (memo[id(found)],)

    file = io.BytesIO()
    try:
        _Pickler(file, lambda _: ("", None), refer).dump(value)
        copy: T = _Unpickler(io.BytesIO(file.getvalue()), [], {}, lambda name: shared[name[0]]).load()
    except Exception as error:  # what objects of other packs raise is open
        raise UnsupportedError("Something in the model or conditioning cannot be copied", str(error)) from error
    return copy


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
        return _Unpickler(io.BytesIO(parcel.blob), tensors, self._held, self._resolve).load()

    def answer(self, value: Any, request: Parcel) -> Parcel:
        """Pack tensors into the room the request left; what does not fit travels inline."""
        tensors: list[torch.Tensor] = []

        def take(tensor: torch.Tensor) -> tuple[str, Any]:
            tensors.append(tensor.detach())
            return ("tensor", len(tensors) - 1)

        file = io.BytesIO()
        _Pickler(file, take, lambda _: None).dump(value)
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
