"""Records one forward of a model: what each module was given and gave, its attention, and who looked at its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..sequence.overrides import OVERRIDE
from ..sequence.slots import Slot
from .values import OPTIONS, Inputs, Refused, by_name, copied, tensors

WITH_INSIDES = 2
"""Blocks of one class in a list of which everything inside is kept; of others what they are given and give."""
MOST_BYTES = 2 << 30
"""What one trace may keep."""
HARMLESS = ("dtype", "device", "is_cuda", "layout", "requires_grad", "ndim", "is_meta")
"""Attributes of a tensor that are the same for a part of its tokens."""


@dataclass(frozen=True)
class Attention:
    """One call of attention that an override saw.

    Attributes:
        path: the innermost module that was running.
        heads_first, out_heads_first: whether tokens are dim 2 of q, k and v, and of the result; else dim 1.
        more: what the call says by plain values.
    """

    path: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    heads_first: bool
    out_heads_first: bool
    out: torch.Tensor
    more: dict[str, Any]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the queries and of the keys."""
        dim = 2 if self.heads_first else 1
        return self.q.shape[dim], self.k.shape[dim]


@dataclass
class Call:
    """One call of a module.

    Attributes:
        nth: which call of this module it was.
        begin, end: on the trace's clock.
        given: what it was called with, as copies; `args` the same by name.
        live, out_live: ids of the tensors themselves.
        attention: all calls in it.
        slim: what is inside of it is known by its sizes only.
    """

    name: str
    nth: int
    parent: Call | None
    trace: Trace
    begin: int
    given: Inputs
    args: dict[str | int, Any]
    live: set[int]
    end: int = 0
    out: Any = None
    out_live: list[int] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    slim: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """Which call it is in every trace of the model."""
        return self.name, self.nth

    @property
    def outs(self) -> tuple[Any, ...]:
        """Its outputs, also where it is one."""
        return self.out if isinstance(self.out, tuple) else (self.out,)

    def within(self, other: Call) -> bool:
        """Whether it is that call or happened in it."""
        call: Call | None = self
        while call is not None and call is not other:
            call = call.parent
        return call is other


@dataclass(frozen=True)
class Use:
    """A function of torch that was given a module's output, outside of attention.

    Attributes:
        inside: the module call that made it; None is the model's own code.
        used: ids of those outputs.
    """

    name: str
    clock: int
    inside: Call | None
    used: set[int]


class Trace(TorchFunctionMode):
    """Everything that happens in one forward.

    Args:
        watch: whether to note which functions of torch look at modules' outputs.

    Attributes:
        calls: in the order in which they began.
        uses: see `Use`.
    """

    def __init__(self, model: nn.Module, *, watch: bool = False) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self.uses: list[Use] = []
        self._watch = watch
        self._open: list[Call] = []
        self._seen: dict[str, int] = {}
        self._outputs: set[int] = set()
        # ids are told apart by keeping what has them
        self._kept: list[Any] = []
        self._clock = 0
        # the block whose insides are not kept, while it runs
        self._slim = ""
        self._insides: dict[Any, set[str]] = {}
        self._bytes = 0
        # one object, so that options that have it already are not made anew
        self._attend = self._override

    def run(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """The forward of copies of the inputs; what it returns, as copies."""
        handles = []
        for name, module in self.model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._before(name, module), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        args, kwargs = copied(inputs)
        if not isinstance(function, nn.Module):
            args, kwargs = with_override(function, args, kwargs, self._attend)
        try:
            with torch.no_grad():
                if not self._watch:
                    return copied(function(*args, **kwargs))
                with self:
                    return copied(function(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, module: nn.Module) -> Callable[..., Any]:
        # also where the model's own code hands no options on, as the engine does at a site
        takes = OPTIONS in inspect.signature(module.forward).parameters
        at = name.rpartition(".")[0]
        in_list = bool(at) and isinstance(self.model.get_submodule(at), (nn.ModuleList, nn.ModuleDict))

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            self._clock += 1
            if takes or OPTIONS in kwargs:
                args, kwargs = with_override(module.forward, args, kwargs, self._attend)
            nth = self._seen[name] = self._seen.get(name, -1) + 1
            live = set(map(id, tensors([args, kwargs])))
            if self._watch:
                self._kept.append((args, kwargs))
            if not self._slim and in_list and self._is_another(name, module):
                self._slim = name
                given = quietly(self._copy, (tuple(args), dict(kwargs)))
            else:
                given = quietly(self._outline if self._slim else self._copy, (tuple(args), dict(kwargs)))
            call = Call(
                name=name,
                nth=nth,
                parent=self._open[-1] if self._open else None,
                trace=self,
                begin=self._clock,
                given=given,
                args=by_name(module.forward, *given),
                live=live,
                slim=self._slim == name,
            )
            self.calls.append(call)
            self._open.append(call)
            return args, kwargs

        return hook

    def _after(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self._clock += 1
        call = self._open.pop()
        if self._slim == call.name:
            self._slim = ""
        call.end, call.out = self._clock, quietly(self._outline if self._slim else self._copy, out)
        if self._watch:
            self._kept.append(out)
            call.out_live = list(map(id, tensors(out)))
            self._outputs.update(call.out_live)

    def _is_another(self, name: str, module: nn.Module) -> bool:
        """Whether enough is known of such blocks."""
        blocks = self._insides.setdefault((name.rpartition(".")[0], type(module)), set())
        if len(blocks) < WITH_INSIDES:
            blocks.add(name)
        return name not in blocks

    def _copy(self, value: Any) -> Any:
        self._bytes += sum(t.nbytes for t in tensors(value))
        if self._bytes > MOST_BYTES:
            raise Refused(f"its inputs are too large to try a plan with: {MOST_BYTES >> 30} GiB for what blocks give")
        return copied(value)

    def _outline(self, value: Any) -> Any:
        """The same without values."""
        return copied(value, lambda t: t.new_empty(t.shape, device="meta"))

    def _override(self, func: Callable[..., Any], q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            kept = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
            out = func(q, k, v, heads, *args, **kwargs)
            # as ComfyUI's attention takes them: mask, attn_precision, skip_reshape, skip_output_reshape
            said = dict(zip(("mask", "", "skip_reshape", "skip_output_reshape"), args, strict=False)) | kwargs
            mask = said.get("mask")
            record = Attention(
                path=self._open[-1].name if self._open else "",
                **kept,
                mask=None if mask is None else mask.clone(),
                heads_first=bool(said.get("skip_reshape")),
                out_heads_first=bool(said.get("skip_output_reshape")),
                out=out.clone(),
                more=settings(kwargs),
            )
            for call in self._open:
                call.attention.append(record)
            return out

        return quietly(run)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = self._outputs.intersection(map(id, tensors([list(args), kwargs or {}]))) if self._outputs else set()
        if used:
            # an attribute comes as the __get__ of its descriptor
            owner = getattr(getattr(func, "__self__", None), "__name__", "")
            if owner not in HARMLESS:
                name = owner or getattr(func, "__name__", str(func))
                self.uses.append(Use(name, self._clock, self._open[-1] if self._open else None, used))
        return func(*args, **(kwargs or {}))


def settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call of attention says by plain values."""
    return {name: value for name, value in kwargs.items() if isinstance(value, (bool, int, float, str))}


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Call it without functions being watched."""
    with torch._C.DisableTorchFunction():
        return function(*args)


def with_override(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], override: Any) -> Inputs:
    """The arguments with an attention override among transformer_options, where the function takes them."""
    slot = Slot.find(function, OPTIONS)
    if slot is None:
        return tuple(args), dict(kwargs)
    args, kwargs = list(args), dict(kwargs)
    options = slot.read(args, kwargs) or {}
    if options.get(OVERRIDE) is not override:
        slot.write(args, kwargs, {**options, OVERRIDE: override})
    return tuple(args), kwargs
