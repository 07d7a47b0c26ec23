"""Runs a block again on one rank's part of what it was given, against what was recorded of it.

At each attention site this rank's q, k and v must be its part of those that were recorded, and it gets its part of the
recorded result; its outputs must be its part of the recorded ones. So nothing is communicated, an error at one site
does not hide behind that of another, and one in q or k is seen as such and not as what softmax leaves of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layout import Layout
from ..plan import Blocks, Site, Whole
from ..sequence.overrides import OVERRIDE
from ..sequence.replaced import within
from ..sequence.slots import Slot
from .trace import Attention, Call, Trace, settings
from .values import OPTIONS, apart, close, copied, tensors


@dataclass
class Verdict:
    """How far replays came.

    Attributes:
        held: checks that held.
        call: the call that was replayed last.
        failed: the first check that did not hold, "" for none.
        module: where one was looked for, the module that gives something else for a part of the tokens.
    """

    held: int = 0
    call: Call | None = None
    failed: str = ""
    module: str = ""


class _Stop(Exception):
    """A check did not hold."""


class Replay:
    """One recorded block call, to be run on any rank.

    Args:
        locate: look for the module that a failure comes from.
    """

    def __init__(
        self, model: nn.Module, call: Call, blocks: Blocks, wholes: tuple[Whole, ...], *, locate: bool = False
    ) -> None:
        self.call, self.blocks, self.locate = call, blocks, locate
        self.modules = dict(model.named_modules())
        self.wholes = {f"{call.name}.{whole.at.split('*.', 1)[1]}": whole for whole in wholes}
        self.sites = {f"{call.name}.{site.at}" if site.at else call.name: site for site in blocks.sites}
        # an override is that of the innermost site
        self.records: dict[str, list[Attention]] = {name: [] for name in self.sites}
        for record in call.attention:
            around = [name for name in self.sites if within(record.path, name)]
            if around and not any(within(record.path, name) for name in self.wholes):
                self.records[max(around, key=len)].append(record)
        self.inner: dict[str, list[Call]] = {}
        for other in call.trace.calls:
            if other is not call and other.within(call):
                self.inner.setdefault(other.name, []).append(other)

    def run(self, rank: int, size: int, verdict: Verdict) -> None:
        """Add what holds to the verdict; stop at what does not."""
        _Rank(self, verdict).run(rank, size)


class _Rank:
    """One rank's run of a replay."""

    _layout: Layout

    def __init__(self, replay: Replay, verdict: Verdict) -> None:
        self._replay = replay
        self._verdict = verdict
        self._counts: dict[str, int] = {}
        self._at: list[str] = []

    def run(self, rank: int, size: int) -> None:
        replay, verdict = self._replay, self._verdict
        module = replay.modules[replay.call.name]
        handles: list[Any] = []
        try:
            args, kwargs = self._cut(module, rank, size)
            handles = self._hooks()
            with torch.no_grad():
                self._outputs(module(*args, **kwargs))
        except _Stop:
            # the verdict says why
            return
        except Exception as error:
            if not verdict.failed:
                verdict.failed = f"{replay.call.name}: {type(error).__name__}: {str(error)[:160]}"
        finally:
            for handle in handles:
                handle.remove()

    def _cut(self, module: nn.Module, rank: int, size: int) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of this rank."""
        blocks = self._replay.blocks
        given, named = copied(self._replay.call.given)
        args, kwargs = list(given), dict(named)
        slots = [(Slot.need(module, name), stream) for name, stream in blocks.streams.items()]
        values = [(slot, stream, slot.read(args, kwargs)) for slot, stream in slots]
        found = tuple(dict.fromkeys(stream.segment(value) for _, stream, value in values if value is not None))
        if len({segment.name for segment in found}) < len(found):
            self._fail("streams of one segment have different lengths")
        self._layout = Layout(segments=found, rank=rank, size=size)
        for slot, stream, value in values:
            if value is not None:
                slot.write(args, kwargs, stream(value, self._layout))
        for name, entry in blocks.shared.items():
            slot = Slot.need(module, name)
            value = slot.read(args, kwargs)
            if value is not None:
                slot.write(args, kwargs, entry(value, self._layout))
        return args, kwargs

    def _hooks(self) -> list[Any]:
        """Hooks on sites, on modules that need all tokens, and where a failure is looked for on all others."""
        replay, handles = self._replay, []
        for name, site in replay.sites.items():
            handles.append(replay.modules[name].register_forward_pre_hook(self._site(site, name), with_kwargs=True))
        for name, whole in replay.wholes.items():
            target = replay.modules[name]
            handles.append(target.register_forward_pre_hook(self._joined(whole, name, target), with_kwargs=True))
            handles.append(
                target.register_forward_hook(lambda _, args, out, whole=whole: whole.stream(out, self._layout))
            )
        for name in replay.inner if replay.locate else ():
            target = replay.modules[name]
            handles.append(target.register_forward_pre_hook(self._enters(name), with_kwargs=True))
            handles.append(target.register_forward_hook(self._leaves(name)))
        return handles

    def _next(self, name: str, records: list[Any]) -> Any:
        """The next record of something; fails where it happens more often than was recorded."""
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        if number >= len(records):
            self._fail(f"{name} runs more often on a part of the tokens")
        return records[number]

    def _check(self, part: torch.Tensor, whole: torch.Tensor, dim: int, over: tuple[str, ...], what: str) -> None:
        if whole.shape[dim] != self._layout.total(over):
            self._fail(f"{what} has {whole.shape[dim]} tokens, not those of {over}")
        wanted = self._layout.split(whole, dim=dim, over=over)
        if not close(part, wanted):
            self._fail(f"{what} differs by {apart(part, wanted):.0e} from its part of all tokens'")
        self._verdict.held += 1

    def _fail(self, why: str) -> None:
        if not self._verdict.failed:
            self._verdict.failed = f"{self._replay.call.name}: {why}"
        raise _Stop

    # --- attention

    def _site(self, site: Site, name: str) -> Callable[..., Any]:
        records = self._replay.records[name]

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            slot = Slot.find(module.forward, OPTIONS)
            if slot is None:
                self._fail(f"{name} takes no {OPTIONS}")
            assert slot is not None
            args, kwargs = list(args), dict(kwargs)
            options = slot.read(args, kwargs) or {}
            slot.write(args, kwargs, {**options, OVERRIDE: self._attention(site, name, records)})
            return tuple(args), kwargs

        return hook

    def _attention(self, site: Site, name: str, records: list[Attention]) -> Callable[..., torch.Tensor]:
        """Attention that checks this rank's q, k and v and gives its part of what was recorded."""

        def attend(func: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> torch.Tensor:
            record: Attention = self._next(f"attention of {name}", records)
            said = settings(kwargs)
            if said != record.more:
                self._fail(f"attention of {name} is called with {said}, on all tokens with {record.more}")
            dim, order = 2 if record.heads_first else 1, site.order or ("x",)
            if site.also and record.lengths[0] == self._layout.total(site.also):
                order = site.also
            if not site.replicated_query:
                self._check(q, record.q, dim, order, f"q of {name}")
            elif not close(q, record.q):
                self._fail(f"q of {name} is not whole")
            self._check(k, record.k, dim, order, f"k of {name}")
            self._check(v, record.v, dim, order, f"v of {name}")
            self._mask(kwargs.get("mask", args[0] if args else None), record.mask, order)
            if site.replicated_query:
                return record.out.clone()
            return self._layout.split(record.out, dim=2 if record.out_heads_first else 1, over=order)

        return attend

    def _mask(self, mask: torch.Tensor | None, whole: torch.Tensor | None, order: tuple[str, ...]) -> None:
        if mask is None and whole is None:
            return
        if mask is None or whole is None:
            self._fail("its mask is there on all tokens or on a part only")
        assert mask is not None and whole is not None
        if mask.shape == whole.shape and torch.equal(mask, whole):
            return
        if mask.ndim > 1 and mask.shape[-2] != 1:
            self._fail(f"its mask {list(mask.shape)} is neither whole nor one row")
        self._check(mask, whole, whole.ndim - 1, order, "its mask")

    # --- outputs

    def _outputs(self, out: Any) -> None:
        several = out if isinstance(out, tuple) else (out,)
        for number, (value, whole, stream) in enumerate(
            zip(several, self._replay.call.outs, self._replay.blocks.outputs, strict=True)
        ):
            if value is None and whole is None:
                continue
            if not isinstance(value, torch.Tensor) or not isinstance(whole, torch.Tensor):
                self._fail(f"output {number} is no tensor")
            part = stream(whole, self._layout)
            if not close(value, part):
                self._fail(f"output {number} differs by {apart(value, part):.0e} from its part of all tokens'")
            self._verdict.held += 1
        every = {name: len(self._replay.inner[name]) for name in self._replay.wholes}
        every |= {f"attention of {name}": len(records) for name, records in self._replay.records.items()}
        skipped = [name for name, count in every.items() if self._counts.get(name, 0) != count]
        if skipped:
            self._fail(f"{skipped[0]} runs less often on a part of the tokens")

    def _joined(self, whole: Whole, name: str, module: nn.Module) -> Callable[..., Any]:
        """What `Whole` does before its module: the stream is the recorded one."""
        slot = Slot.need(module, whole.arg)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            args, kwargs = list(args), dict(kwargs)
            recorded = slot.read(*copied(self._next(name, self._replay.inner[name]).given))
            part = slot.read(args, kwargs)
            self._check(part, recorded, whole.stream.dim, whole.stream.over, f"{whole.arg} of {name}")
            slot.write(args, kwargs, recorded)
            return tuple(args), kwargs

        return before

    def _cut_again(self, whole: Whole) -> Callable[..., torch.Tensor]:
        return lambda module, args, out: whole.stream(out, self._layout)

    # --- which module needs all tokens

    def _enters(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            record = self._next(f"into {name}", self._replay.inner[name])
            part, whole = tensors([list(args), kwargs])[:1], tensors(record.given)[:1]
            if part and whole and not self._fits(part[0], whole[0]):
                # the code around it, not the module, made that
                around = self._at[-1] if self._at else self._replay.call.name
                self._verdict.module = around
                self._fail(f"what {around} makes of a part of the tokens for {name} is no part of what it makes of all")
            self._at.append(name)
            self._verdict.module = name

        return hook

    def _leaves(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self._at.pop()
            record = self._next(f"out of {name}", self._replay.inner[name])
            part, whole = tensors(out)[:1], tensors(record.out)[:1]
            if not part or not whole or self._fits(part[0], whole[0]):
                self._verdict.module = self._at[-1] if self._at else ""
                return
            self._verdict.module = name
            self._fail(f"{name} gives for a part of the tokens another result than for all")

        return hook

    def _fits(self, part: torch.Tensor, whole: torch.Tensor) -> bool:
        """Whether one is a rank's part of the other, along any dim and any order of segments."""
        if part.shape == whole.shape:
            return close(part, whole)
        names = [segment.name for segment in self._layout.segments]
        orders = [order for count in range(1, len(names) + 1) for order in itertools.permutations(names, count)]
        return any(
            part.ndim == whole.ndim
            and whole.shape[dim] == self._layout.total(order)
            and part.shape[dim] == self._layout.local(order)
            and close(part, self._layout.split(whole, dim=dim, over=order))
            for dim in range(whole.ndim)
            for order in orders
        )


def random_call(model: nn.Module, call: Call) -> Call | None:
    """The same block alone, with random values: those of a real call that happen to be equal hide a wrong cut.

    None where the block does not take random values, or gives no finite ones for them.
    """
    generator = torch.Generator().manual_seed(1)

    def random(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            size = value.abs().nan_to_num(posinf=1, neginf=1).clamp_max(10)
            scale = (float(size.mean()) if value.numel() else 0.0) or 1.0
            wide = value.dtype if value.is_complex() else torch.float32
            made = torch.randn(value.shape, generator=generator, dtype=wide) * scale
            return made.to(device=value.device, dtype=value.dtype)
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
            return (torch.rand(value.shape, generator=generator) < 0.7).to(value.device)
        if type(value) in (tuple, list):
            return type(value)(map(random, value))
        if type(value) is dict:
            return {key: item if key == OPTIONS else random(item) for key, item in value.items()}
        return value

    trace, (args, kwargs) = Trace(model), call.given
    try:
        out = trace.run(model.get_submodule(call.name), (random(args), random(kwargs)))
    except Exception:
        # a block may ask more of its arguments than their shape
        return None
    return trace.calls[0] if all(bool(t.isfinite().all()) for t in tensors(out)) else None
