"""Model calls that are recorded and repeated: a device gets a call's kernels at once, with no Python between them."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ...raylight.cfg import mapped
from ...raylight.comm import Comm
from ...raylight.errors import ConfigError
from ..wire.link_test import finish

log = logging.getLogger(__name__)

LONG_S = 1.0
"""A call from which on Python is not what it waits for; it is not recorded, and can be left before the next block."""
TRIES = 3
"""Calls of which one has to be shorter than that: the first one also loads kernels."""
KEPT = 4
"""Recordings at most, each with the memory of a call's activations."""
WORTH = 3
"""Repeats that a recording has to serve: one that makes room for others before that took longer than it saved."""
SEEN = 64
"""Kinds of calls at most of which something is known."""
SMALL = 4096
"""Values at most of a tensor on the host that counts as one of a call's constants."""
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)

Call = Callable[..., Any]


class Tape(Protocol):
    """One recorded call. What it reads and returns stays where it was while it was recorded.

    Attributes:
        pool: memory that the next tape may share; None for none.
    """

    output: Any
    pool: Any

    def play(self) -> None:
        """Fill the output anew; on an accelerator, for work that is queued after it."""


class Graph:
    """A tape that is a graph of a device's kernels.

    Args:
        device: its module has CUDAGraph and graph.
        call: what to record; nothing is computed.
        pool: memory that tapes share, of which one plays at a time; None for new memory.
    """

    def __init__(self, device: torch.device, call: Callable[[], Any], pool: Any) -> None:
        module: Any = torch.get_device_module(device)
        self._graph = module.CUDAGraph()
        self._constants = _Constants(device)
        # relaxed: page-locked memory may be made meanwhile. What would wait for the device is an error all the same
        with module.graph(self._graph, pool=pool, capture_error_mode="relaxed"), self._constants:
            self.output = call()
        self.pool = self._graph.pool()

    def play(self) -> None:
        self._graph.replay()


class _Constants(torch.overrides.TorchFunctionMode):
    """Has what a model brings from the host to the device come from page-locked memory, which is kept.

    A recording reads it again each time. The values are the same ones: they follow from arguments that are alike.
    """

    MADE = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._kept: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.MADE:
            like = args[0] if func is torch.Tensor.new_tensor else None
            device = torch.device(kwargs.get("device") or (like.device if like is not None else "cpu"))
            if device.type == self._device.type:
                made = func(*args, **{**kwargs, "device": "cpu"})
                return self._page_locked(made).to(device, non_blocking=True)
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            return func(self._page_locked(args[0]), *args[1:], **{**kwargs, "non_blocking": True})
        if func is torch.Tensor.copy_ and args[1].device.type == "cpu" != args[0].device.type:
            return func(args[0], self._page_locked(args[1]), non_blocking=True)
        return func(*args, **kwargs)

    def _page_locked(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor.pin_memory())
        return self._kept[-1]


class Again:
    """The tape of a device that has none: it calls again."""

    pool: Any = None

    def __init__(self, device: torch.device, call: Callable[[], Any], pool: Any) -> None:
        self._call = call
        self.output: Any = None

    def play(self) -> None:
        self.output = self._call()


def tape_for(device: torch.device) -> type[Graph] | type[Again]:
    """How to record calls on a device.

    Raises:
        ConfigError: it cannot.
    """
    if device.type == "cpu":
        return Again
    if not _has_graphs(device):
        raise ConfigError(
            "The compiler cudagraphs needs an NVIDIA GPU", f"the workers' device is {device}", "Choose another backend"
        )
    return Graph


def by_itself(device: torch.device) -> bool:
    """Whether calls are recorded there without being asked for where Python is what they wait for.

    Not on AMD's devices, where graphs with collectives in them have never been tried.
    """
    return device.type != "cpu" and _has_graphs(device) and torch.version.hip is None


def _has_graphs(device: torch.device) -> bool:
    return hasattr(torch.get_device_module(device), "CUDAGraph")


@dataclass
class _Known:
    """What is known of calls that are alike.

    Attributes:
        calls: that ran as they are.
        short: whether the last one took less than LONG_S here.
        tape, inputs: the recording and the tensors that it reads; None where there is none.
        repeats: of that recording.
        counted, sent: what the recorded call did with other ranks.
        refused: it cannot be recorded, or not with profit.
    """

    calls: int = 0
    short: bool = False
    tape: Tape | None = None
    inputs: tuple[torch.Tensor, ...] = ()
    repeats: int = 0
    counted: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    refused: bool = False


class Recordings:
    """The recorded calls of one model. Every rank that shares the model's calls makes equal ones.

    Calls are alike where their tensors on the device have equal shapes and dtypes and all else is equal. The first
    runs as it is, the second is recorded. A call with functions in it, such as patches, is never recorded: what they
    would do anew each time would be done once.

    Args:
        device: where it runs.
        comm: the ranks that share a call, whose collectives are in it.
        control: the same ones, on connections of the host.

    Raises:
        ConfigError: the device cannot record.
    """

    def __init__(self, device: torch.device, comm: Comm, control: Comm) -> None:
        self._tape = tape_for(device)
        self._device = device
        self._comm = comm
        self._control = control
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._state: Hashable = None

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(known.tape is not None for known in self._known.values())

    def clear(self) -> None:
        """Forget all, and give back their memory."""
        self._known.clear()

    def run(self, call: Call, bare: Call, args: tuple[Any, ...], kwargs: dict[str, Any], *, state: Hashable) -> Any:
        """call(*args, **kwargs), or its recording.

        Args:
            bare: the same without what asks other ranks whether to go on, to be recorded.
            state: of the model, besides its arguments; recordings of another one are forgotten.
        """
        if state != self._state:
            self.clear()
            self._state = state
        inputs: list[torch.Tensor] = []
        try:
            key = described((args, kwargs), inputs, self._device)
        except Unrecordable as reason:
            log.debug("a call is not recorded: %s", reason)
            return call(*args, **kwargs)
        known = self._known.setdefault(key, _Known())
        self._known.move_to_end(key)
        while len(self._known) > SEEN:
            self._known.popitem(last=False)
        # a rank whose weights were moved has lost its recordings: ranks repeat a call together, or none does
        mine = known.tape is None, known.refused or not known.short
        lacks, refuses = self._control.all_reduce(torch.tensor(mine, dtype=torch.int64), op="max").tolist()
        if lacks and not refuses:
            self._record(known, bare, args, kwargs, inputs)
            lacks = known.tape is None
        if lacks or known.tape is None:
            return self._as_it_is(known, call, args, kwargs)
        for kept, given in zip(known.inputs, inputs, strict=True):
            kept.copy_(given)
        known.tape.play()
        known.repeats += 1
        self._comm.meter.repeat(known.counted, known.sent)
        return mapped(known.tape.output, lambda item: item.clone() if isinstance(item, torch.Tensor) else item)

    def _as_it_is(self, known: _Known, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        began = time.perf_counter()
        output = call(*args, **kwargs)
        finish(self._device)
        known.short = time.perf_counter() - began < LONG_S
        known.calls += 1
        if not known.short and known.calls == TRIES:
            known.refused = True
            log.info("calls of this size take longer than %g s: they are not recorded", LONG_S)
        return output

    def _record(
        self, known: _Known, bare: Call, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[torch.Tensor]
    ) -> None:
        """Try to; all ranks have a recording afterwards, or none."""
        known.tape, known.repeats = None, 0
        kept = [entry for entry in self._known.values() if entry.tape is not None]
        while len(kept) >= KEPT:
            oldest = kept.pop(0)
            oldest.tape, oldest.inputs, oldest.refused = None, (), oldest.repeats < WORTH
        # the memory of tapes that are gone is no pool any more
        pool = kept[0].tape.pool if kept and kept[0].tape else None
        meter = self._comm.meter
        count, sent = meter.count, meter.bytes_sent.copy()
        began, problem = time.perf_counter(), ""
        try:
            known.inputs = tuple(tensor.clone() for tensor in inputs)
            places = dict(zip(map(id, inputs), known.inputs, strict=True))
            args, kwargs = mapped((args, kwargs), lambda item: places.get(id(item), item))
            known.tape = self._tape(self._device, lambda: bare(*args, **kwargs), pool)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        failed = self._control.all_reduce(torch.tensor(int(bool(problem))), op="max").item()
        known.counted, known.sent = meter.count - count, meter.bytes_sent - sent
        meter.count, meter.bytes_sent = count, sent
        if failed:
            known.tape, known.inputs, known.refused = None, (), True
            log.warning("calls of this model cannot be recorded and run as they are: %s", problem or "another worker")
            return
        log.debug("recorded a call of %d collectives in %.2f s", known.counted, time.perf_counter() - began)


class Waits:
    """Whether a device waits for the Python that starts its kernels, from how long calls take.

    Attributes:
        seen: whether it does.
        open: whether that may yet be seen.
    """

    CALLS = 3
    """That are alike in it; the first one also loads kernels."""
    SHARE = 0.9

    def __init__(self) -> None:
        self.seen = False
        self.open = True
        self._first = True
        self._calls = 0

    def note(self, queued: float, took: float) -> None:
        """A call that was not recorded.

        Args:
            queued: seconds until all its kernels were started.
            took: seconds until they were done.
        """
        waits = queued > self.SHARE * took and took < LONG_S
        self._calls = self._calls + 1 if waits else 0
        self.seen = self._calls >= self.CALLS
        self.open = waits or self._first
        self._first = False


def recordable(args: Any, device: torch.device) -> bool:
    """Whether a call with these arguments can be recorded."""
    try:
        described(args, [], device)
    except Unrecordable:
        return False
    return True


class Unrecordable(Exception):
    """A call has something in it that a recording would do once and not again."""


def described(value: Any, inputs: list[torch.Tensor], device: torch.device) -> Hashable:
    """What a recording of a call with these arguments depends on.

    Args:
        inputs: gets the tensors on the device, each once: their values may differ from call to call.

    Raises:
        Unrecordable: there is something that is neither a tensor nor a plain value.
    """
    if isinstance(value, torch.Tensor):
        if value.device.type == device.type:  # as torch.device("cuda") has no index, and tensors have
            found = [number for number, tensor in enumerate(inputs) if tensor is value]
            if not found:
                inputs.append(value)
            return "tensor", found[0] if found else len(inputs) - 1, value.shape, value.dtype
        if value.numel() > SMALL:
            raise Unrecordable(f"a tensor of {value.numel()} values on {value.device}")
        return "values", value.shape, value.dtype, tuple(value.flatten().tolist())
    if isinstance(value, dict):
        return "dict", tuple((key, described(item, inputs, device)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value).__name__, tuple(described(item, inputs, device) for item in value)
    if isinstance(value, uuid.UUID):  # names a condition, for code around the model
        return "uuid"
    if isinstance(value, CONSTANTS):
        return type(value).__name__, value
    raise Unrecordable(f"a {type(value).__name__} among the arguments")
