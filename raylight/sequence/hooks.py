"""Carry out a plan on a model: hooks that cut and join its tokens during a forward, and nothing at other times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..cost import Work
from ..cuts import Entry
from ..draws import same_draws
from ..errors import PlanError, RaylightError
from ..layout import Layout, Segment
from ..mesh import Mesh
from ..plan import Blocks, Plan, Site
from .alike import Alike, Written
from .attention import ByLength, SequenceAttention
from .kernels import LocalKernel
from .module_hooks import Functions, HeadHook, PartHook, Shared, WholeHook, several
from .replaced import Comparison, Replaced
from .sites import Attend, Named, Sites
from .slots import Slot, modules
from .whole_patches import show_whole

Granularity = Literal["trunk", "block"]


class Forward:
    """What one forward has open: a layout per region that is inside its blocks, and what it has made so far.

    Args:
        comparison: the blocks to compare.
        alone: this rank computes all of it: attention has the chosen kernel, and nothing is exchanged.
        alike: what has a node's code between blocks go one way on all ranks; None where there is none.
    """

    def __init__(
        self,
        regions: int,
        *,
        per_block: bool = False,
        comparison: Comparison | None = None,
        alone: bool = False,
        alike: Alike | None = None,
    ) -> None:
        self.per_block = per_block
        self.alike = alike
        self.written: dict[object, Written] = {}
        self.comparison = comparison or Comparison(frozenset())
        self.alone = alone
        self.layouts: list[Layout | None] = [None] * regions
        self._cuts: dict[tuple[object, str], tuple[Any, Layout, Any]] = {}
        self._attentions: dict[tuple[Layout, tuple[str, ...], bool], SequenceAttention] = {}

    def cut(self, owner: object, name: str, entry: Entry, value: Any, layout: Layout) -> Any:
        """entry(value, layout), done once for all blocks that are given the same object."""
        known = self._cuts.get((owner, name))
        if known is None or known[0] is not value or known[1] != layout:
            known = (value, layout, entry(value, layout))
            self._cuts[owner, name] = known
        return known[2]

    def attention(self, owner: Installation, layout: Layout, order: tuple[str, ...], whole: bool) -> SequenceAttention:
        """Attention over an order of segments, made once for all blocks."""
        key = layout, order, whole
        if key not in self._attentions:
            self._attentions[key] = SequenceAttention(
                owner.mesh, layout=layout, order=order, kernel=owner.kernel, replicated_query=whole
            )
        return self._attentions[key]


class Installation:
    """The hooks of one plan on one model. `wrapper` runs a forward with them; `remove` takes them off.

    One forward at a time; every rank must run it with equal inputs.

    Attributes:
        works: what each region of the last forward had to do, by its index.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        mesh: Mesh,
        *,
        kernel: LocalKernel | None,
        granularity: Granularity | None,
        opaque: Callable[[Attend], Attend] | None,
        replaced: Replaced,
    ) -> None:
        self.mesh = mesh
        self.kernel = kernel
        self.sites = Sites(kernel, opaque)
        self.forward: Forward | None = None
        self.regions = plan.regions
        self.works: dict[int, Work] = {}
        self._plan = plan
        self._granularity = granularity
        self._handles: list[RemovableHandle] = []
        self._names = {module: name for name, module in model.named_modules()}
        function = getattr(model, "_forward", model.forward)
        self._options = Slot.find(function, "transformer_options")
        self._control = Slot.find(function, "control")
        self._replaced = replaced
        self._alike: Alike | None = None
        if not self.split and self.kernel is None:
            return
        try:
            for index in range(len(plan.regions)):
                self._install(model, index)
        except BaseException:
            self.remove()
            raise

    @property
    def split(self) -> bool:
        """Whether there is more than one rank to share the tokens."""
        return self.mesh.sequence.size > 1

    def _install(self, model: nn.Module, index: int) -> None:
        region = self.regions[index]
        segments = {stream.over[0] for b in region.blocks for stream in b.streams.values() if len(stream.over) == 1}
        for number, blocks in enumerate(region.blocks):
            if not set(blocks.order) <= segments:
                raise PlanError(f"The streams of {blocks.at} do not define its segments", f"{segments}, {blocks.order}")
            found = modules(model, blocks.at)
            for at, module in enumerate(found):
                if self.split:
                    name = self._names[module]
                    self._replaced.blocks.append(name)
                    block = _BlockHook(self, index, number, module, name, at=at, count=len(found))
                    self._hook(module, block.before, block.after)
                # after the block's own hook, since a block can be its own site
                for site in blocks.sites:
                    for target in modules(module, site.at):
                        attends = _SiteHook(self, index, site, target)
                        self._hook(target, attends.before, attends.after)
        if not self.split:
            return
        for whole in region.whole:
            for module in modules(model, whole.at):
                joins = WholeHook(self, index, whole, module)
                self._hook(module, joins.before, joins.after)
        for part in region.parts:
            for module in modules(model, part.at):
                self._hook(module, PartHook(self, index, part, module).before)
        if region.exit is not None:
            (module,) = modules(model, region.exit.at)
            leave = HeadHook(self, index, region.exit, module)
            self._hook(module, leave.before, leave.after)

    def changed(self, objects: Mapping[str, Any]) -> None:
        """A user's patch has these attributes of the model replaced, by their dotted names, and no others.

        Raises:
            UnsupportedError: one of them is a module with hooks.
        """
        self._replaced.changed(objects)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the modules in which tokens are a rank's part."""
        return tuple(self._replaced.blocks)

    @property
    def between(self) -> bool:
        """Whether replaced code may look at the tokens between two blocks."""
        return self._replaced.between

    @contextlib.contextmanager
    def around(self, alike: Alike) -> Iterator[None]:
        """Forwards meanwhile have a node's code around their blocks, which sees all tokens and leaves blocks out."""
        self._alike = alike
        try:
            yield
        finally:
            self._alike = None

    def _hook(self, module: nn.Module, before: Any, after: Any = None) -> None:
        if self.split:
            self._replaced.hooked.add(self._names[module])
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            self._handles.append(module.register_forward_hook(after))

    def wrapper(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one forward on all ranks: a DIFFUSION_MODEL wrapper, or called with `model._forward` as executor.

        Returns:
            What the model returns, with equal bytes on every rank.

        Raises:
            UnsupportedError: a patch does something that a cut sequence cannot give.
            PlanError: the model did not run as the plan says.
        """
        assert self.forward is None, "one forward at a time"
        comparison = self._replaced.comparison()
        per_block = self._per_block(args, kwargs)
        self.forward = Forward(len(self.regions), per_block=per_block, comparison=comparison, alike=self._alike)
        try:
            with comparison.watching():
                out = executor(*args, **kwargs)
            self._replaced.judge(comparison, self.mesh.sequence)
            for region, layout in zip(self.regions, self.forward.layouts, strict=True):
                if layout is not None:
                    raise PlanError(
                        f"The blocks {region.blocks[0].at} were entered and not left", "the last one did not run"
                    )
            return out
        except Exception as error:
            if comparison.open and not isinstance(error, (RaylightError, torch.OutOfMemoryError)):
                self._replaced.refuse(f"its code wants all tokens: {type(error).__name__}: {error}", error)
            raise
        finally:
            self.forward = None
            self.sites.clear()

    def remove(self) -> None:
        """Leave the model exactly as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def layout(self, index: int) -> Layout:
        """The open layout of a region, inside its blocks."""
        assert self.forward is not None
        layout = self.forward.layouts[index]
        if layout is None:
            blocks = self.regions[index].blocks[0].at
            raise PlanError(f"The blocks {blocks} were not entered at their first one", "it did not run")
        return layout

    def inside(self, index: int) -> Layout | None:
        """The layout of a region where a forward is inside its blocks, else None."""
        return None if self.forward is None else self.forward.layouts[index]

    def per_block(self, index: int) -> bool:
        """Whether this forward cuts the region's tokens around every block."""
        assert self.forward is not None
        return self.forward.per_block or self.regions[index].per_block

    def _per_block(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if self._granularity is not None:
            return self._granularity == "block"
        options = (self._options and self._options.read(args, kwargs)) or {}
        control = self._control and self._control.read(args, kwargs)
        patches = options.get("patches", {})
        return (
            self._alike is not None
            or self._replaced.between
            or control is not None
            or bool(options.get("patches_replace", {}).get("dit"))
            or any(patches.get(name) for name in self._plan.block_patches)
        )


class _BlockHook:
    """Cuts what goes into one block, and joins what comes out where the tokens leave.

    The first blocks of the region open its layout; those of another list only bring their own stream into it.
    """

    def __init__(
        self, owner: Installation, index: int, number: int, module: nn.Module, name: str, *, at: int, count: int
    ) -> None:
        self._owner = owner
        self._name = name
        self._count = count
        self._weights = sum(p.numel() for p in module.parameters() if p.ndim == 2)
        self._index = index
        self._blocks: Blocks = owner.regions[index].blocks[number]
        self._opens = number == 0
        self._first = at == 0
        self._last = number == 0 and owner.regions[index].exit is None and at == count - 1
        self._slots = {name: Slot.need(module, name) for name in self._blocks.streams}
        self._streams = [(self._slots[name], stream) for name, stream in self._blocks.streams.items()]
        self._shared = Shared(self._blocks.at, module, self._blocks.shared, self._blocks.optional)
        self._functions = Functions(module, self._blocks.called)
        self._options = Slot.need(module, "transformer_options") if self._blocks.patches else None

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = self._owner.forward
        if forward is None:
            return None
        args, kwargs = list(args), dict(kwargs)
        enters = self._owner.per_block(self._index) or self._first
        forward.comparison.given(self._name, module, self._slots, args, kwargs, enters)
        if enters:
            self._open(forward, args, kwargs)
        layout = self._owner.layout(self._index)
        if self._name in forward.comparison:
            forward.comparison.expect(self._name, self._on_all(module, args, kwargs, layout, cut=not enters))
        if enters:
            written = Written()
            for slot, stream in self._streams:
                whole = slot.read(args, kwargs)
                local = stream(whole, layout)
                slot.write(args, kwargs, local)
                written.note(stream, whole, local)
            if forward.per_block:
                forward.written[self] = written
        self._functions.widen(layout, self._owner.mesh.sequence, args, kwargs)
        self._shared.cut(forward, layout, args, kwargs)
        if self._options is not None:
            options = self._options.read(args, kwargs) or {}
            shown = show_whole(
                options,
                self._blocks.patches,
                order=self._blocks.order,
                mask=self._blocks.patch_mask,
                layout=layout,
                comm=self._owner.mesh.sequence,
            )
            if shown is not options:
                self._options.write(args, kwargs, shown)
        return tuple(args), kwargs

    def _on_all(
        self, module: nn.Module, args: list[Any], kwargs: dict[str, Any], layout: Layout, *, cut: bool
    ) -> tuple[torch.Tensor | None, ...]:
        """This rank's part of what the block gives for all tokens, where nothing is cut.

        Args:
            cut: whether the tokens among the arguments are this rank's.
        """
        owner, args, kwargs = self._owner, list(args), dict(kwargs)
        for slot, stream in self._streams:
            value = slot.read(args, kwargs)
            slot.write(args, kwargs, stream.join(value, layout, owner.mesh.sequence) if cut else value.clone())
        alone = None if owner.kernel is None else Forward(len(owner.regions), alone=True)
        open_forward, owner.forward = owner.forward, alone
        try:
            with same_draws(value.device):
                output = module.forward(*args, **kwargs)
        finally:
            owner.forward = open_forward
        return tuple(
            None if value is None else stream(value, layout)
            for value, stream in zip(several(output), self._blocks.outputs, strict=True)
        )

    def _open(self, forward: Forward, args: list[Any], kwargs: dict[str, Any]) -> None:
        opened = forward.layouts[self._index]
        if opened is not None and self._opens:
            raise PlanError(f"The blocks {self._blocks.at} were entered twice", "the model runs them more than once")
        streams = [(slot, stream) for slot, stream in self._streams if len(stream.over) == 1]
        # two streams may be cut alike
        found = list(dict.fromkeys(stream.segment(slot.read(args, kwargs)) for slot, stream in streams))
        if opened is None:
            forward.layouts[self._index] = self._owner.mesh.laid(found)
            self._owner.works[self._index] = self._work(self._streams[0][0].read(args, kwargs), found)
        elif any(segment != opened.segment(segment.name) for segment in found):
            raise PlanError(f"The tokens of {self._blocks.at} are not those of its region", f"{found}")

    def _work(self, first: torch.Tensor, segments: Sequence[Segment]) -> Work:
        width = first.shape[-1]
        return Work(
            tokens=sum(segment.length for segment in segments),
            width=width,
            blocks=self._count,
            weights=self._weights,
            batch=first.numel() // (segments[0].length * width),
            itemsize=first.element_size(),
        )

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._owner.forward
        if forward is None:
            return None
        stays = not (self._owner.per_block(self._index) or self._last)
        forward.comparison.note(self._name, several(output), stays=stays)
        if stays:
            return None
        layout, comm = self._owner.layout(self._index), self._owner.mesh.sequence
        written = forward.written.pop(self, None) or Written()
        joined = tuple(
            None if value is None else written.joined(value, stream, layout, comm)
            for value, stream in zip(several(output), self._blocks.outputs, strict=True)
        )
        if forward.alike is not None:
            written.rest(layout, comm, forward.alike)
        forward.layouts[self._index] = None
        return joined if isinstance(output, tuple) else joined[0]


class _SiteHook:
    """Makes one attention module compute over all tokens, by ComfyUI's own per-call attention override."""

    def __init__(self, owner: Installation, index: int, site: Site, module: nn.Module) -> None:
        self._owner = owner
        self._index = index
        self._site = site
        self._named = Named(module)
        self._options = Slot.need(module, "transformer_options")

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = self._owner.forward
        if forward is None:
            return None
        args, kwargs = list(args), dict(kwargs)
        attention: SequenceAttention | ByLength | None = None
        if self._owner.split and not forward.alone:
            layout, site = self._owner.layout(self._index), self._site
            orders = [order for order in (site.order, site.also) if order]
            made = [forward.attention(self._owner, layout, order, site.replicated_query) for order in orders]
            attention = made[0] if len(made) == 1 else ByLength(made, [layout.local(order) for order in orders])
        self._owner.sites.enter(self._options, args, kwargs, attention, named=self._named())
        return tuple(args), kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._owner.forward is not None:
            self._owner.sites.leave()
