"""Carry out a plan on a model: hooks that cut and join its tokens during a forward, and nothing at other times."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import kernels, overrides
from .attention import Ulysses
from .comm import Comm
from .errors import ConfigError, PlanError
from .layout import Layout, Segment, gather
from .mesh import Mesh
from .plan import Blocks, Entry, Head, Plan, Split

Granularity = Literal["trunk", "block"]


def install(model: nn.Module, plan: Plan, mesh: Mesh, *, granularity: Granularity | None = None) -> Installation:
    """Put a plan's hooks on a model.

    Args:
        model: the diffusion model itself; its weights are not touched.
        plan: where its tokens are.
        mesh: the ranks that share the sequence, and the attention kernel to use.
        granularity: cut once per region ("trunk") or around every block ("block"); None decides per forward.

    Raises:
        PlanError: the plan names a module or argument that the model does not have.
        ConfigError: the mesh asks for something that is not there: ring attention or a missing kernel.
    """
    return Installation(model, plan, mesh, granularity=granularity)


@dataclass(frozen=True)
class _Slot:
    """Where a call carries an argument: looked up by index, since binding a signature per call would be slow."""

    name: str
    index: int | None

    @classmethod
    def find(cls, function: Callable[..., Any], name: str) -> _Slot | None:
        for index, parameter in enumerate(inspect.signature(function).parameters.values()):
            if parameter.kind is parameter.VAR_KEYWORD:
                return cls(name, None)
            if parameter.name == name:
                return cls(name, None if parameter.kind is parameter.KEYWORD_ONLY else index)
        return None

    @classmethod
    def need(cls, module: nn.Module, name: str) -> _Slot:
        slot = cls.find(module.forward, name)
        if slot is None:
            raise PlanError(f"{type(module).__name__} has no argument {name}", "the plan is for another version of it")
        return slot

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.index is not None and self.index < len(args):
            return args[self.index]
        return kwargs.get(self.name)

    def write(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> None:
        if self.index is not None and self.index < len(args):
            args[self.index] = value
        else:
            kwargs[self.name] = value


def _modules(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules at a path of names, where "*" stands for all children; "" is the root."""
    found = [root]
    for name in path.split(".") if path else ():
        if name == "*":
            found = [child for module in found for child in module.children()]
        elif not all(isinstance(getattr(module, name, None), nn.Module) for module in found):
            raise PlanError(f"{type(root).__name__} has no module {path}", "the plan is for another version of it")
        else:
            found = [getattr(module, name) for module in found]
    return found


class _Forward:
    """What one forward has open: a layout per region that is inside its blocks, and the arguments cut so far."""

    def __init__(self, regions: int, *, per_block: bool) -> None:
        self.per_block = per_block
        self.layouts: list[Layout | None] = [None] * regions
        self._cuts: dict[tuple[object, str], tuple[Any, Layout, Any]] = {}

    def cut(self, owner: object, name: str, entry: Entry, value: Any, layout: Layout) -> Any:
        """entry(value, layout), done once for all blocks that are given the same object."""
        known = self._cuts.get((owner, name))
        if known is None or known[0] is not value or known[1] != layout:
            known = (value, layout, entry(value, layout))
            self._cuts[owner, name] = known
        return known[2]


class Installation:
    """The hooks of one plan on one model. `wrapper` runs a forward with them; `remove` takes them off.

    One forward at a time; every rank must run it with equal inputs.
    """

    def __init__(self, model: nn.Module, plan: Plan, mesh: Mesh, *, granularity: Granularity | None) -> None:
        if mesh.parallel.degrees["ring"] > 1:
            raise ConfigError(
                "Ring attention is not part of this version",
                f"ring_degree={mesh.parallel.ring}",
                "Set ring_degree to 1 and raise ulysses_degree instead",
            )
        self.comm = mesh.axis("ulysses")
        self.parallel = mesh.parallel
        self.kernel = kernels.resolve(mesh.parallel.attention)
        self.forward: _Forward | None = None
        self._plan = plan
        self._granularity = granularity
        self._handles: list[RemovableHandle] = []
        function = getattr(model, "_forward", model.forward)
        self._options = _Slot.find(function, "transformer_options")
        self._control = _Slot.find(function, "control")
        if self.comm.size == 1 and self.kernel is None:
            return
        try:
            for index, region in enumerate(plan.regions):
                self._install(model, index, region.blocks, region.exit)
        except BaseException:
            self.remove()
            raise

    def _install(self, model: nn.Module, index: int, blocks: Blocks, head: Head | None) -> None:
        modules = _modules(model, blocks.at)
        single = {split.over[0] for split in blocks.streams.values() if len(split.over) == 1}
        if single != set(blocks.order):
            raise PlanError(
                f"The streams of {blocks.at} do not define its segments", f"{single} and {set(blocks.order)}"
            )
        for at, module in enumerate(modules):
            if self.comm.size > 1:
                leaves = head is None and at == len(modules) - 1
                block = _BlockHook(self, index, blocks, module, first=at == 0, last=leaves)
                self._handles.append(module.register_forward_pre_hook(block.before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(block.after))
            # after the block's own hook, since a block can be its own site
            for path in blocks.attention:
                for site in _modules(module, path):
                    hook = _SiteHook(self, index, blocks.order, site)
                    self._handles.append(site.register_forward_pre_hook(hook.before, with_kwargs=True))
        if head is not None and self.comm.size > 1:
            (module,) = _modules(model, head.at)
            leave = _HeadHook(self, index, head, module)
            self._handles.append(module.register_forward_pre_hook(leave.before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave.after))

    def wrapper(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one forward on all ranks: a DIFFUSION_MODEL wrapper, or called with `model._forward` as executor.

        Returns:
            What the model returns, with equal bytes on every rank.

        Raises:
            UnsupportedError: a patch does something that a cut sequence cannot give.
            PlanError: the model did not run as the plan says.
        """
        assert self.forward is None, "one forward at a time"
        self.forward = _Forward(len(self._plan.regions), per_block=self._per_block(args, kwargs))
        try:
            out = executor(*args, **kwargs)
            for region, layout in zip(self._plan.regions, self.forward.layouts, strict=True):
                if layout is not None:
                    raise PlanError(
                        f"The blocks {region.blocks.at} were entered and not left", "the last one did not run"
                    )
            return out
        finally:
            self.forward = None

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
            blocks = self._plan.regions[index].blocks.at
            raise PlanError(f"The blocks {blocks} were not entered at their first one", "it did not run")
        return layout

    def _per_block(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if self._granularity is not None:
            return self._granularity == "block"
        options = (self._options and self._options.read(args, kwargs)) or {}
        control = self._control and self._control.read(args, kwargs)
        patches = options.get("patches", {})
        return (
            control is not None
            or bool(options.get("patches_replace", {}).get("dit"))
            or any(patches.get(name) for name in self._plan.block_patches)
        )


class _Shared:
    """The arguments of one module that come whole and are needed in their local form."""

    def __init__(
        self, owner: object, module: nn.Module, shared: Mapping[str, Entry], optional: tuple[str, ...]
    ) -> None:
        self._owner = owner
        self._entries: list[tuple[_Slot, Entry]] = []
        for name, entry in shared.items():
            slot = _Slot.find(module.forward, name) if name in optional else _Slot.need(module, name)
            if slot is not None:
                self._entries.append((slot, entry))

    def cut(self, forward: _Forward, layout: Layout, args: list[Any], kwargs: dict[str, Any]) -> None:
        for slot, entry in self._entries:
            value = slot.read(args, kwargs)
            if value is not None:
                slot.write(args, kwargs, forward.cut(self._owner, slot.name, entry, value, layout))


class _BlockHook:
    """Cuts what goes into one block, and joins what comes out where the tokens leave."""

    def __init__(
        self, owner: Installation, index: int, blocks: Blocks, module: nn.Module, *, first: bool, last: bool
    ) -> None:
        self._owner = owner
        self._index = index
        self._blocks = blocks
        self._first = first
        self._last = last
        self._streams = [(_Slot.need(module, name), split) for name, split in blocks.streams.items()]
        self._shared = _Shared(blocks.at, module, blocks.shared, blocks.optional)
        self._options = _Slot.need(module, "transformer_options") if blocks.patches else None

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = self._owner.forward
        if forward is None:
            return None
        args, kwargs = list(args), dict(kwargs)
        if forward.per_block or self._first:
            self._enter(forward, args, kwargs)
        layout = self._owner.layout(self._index)
        self._shared.cut(forward, layout, args, kwargs)
        if self._options is not None:
            options = self._options.read(args, kwargs) or {}
            patches = options.get("patches", {})
            wrapped = {
                name: [_whole(patch, options, layout, self._owner.comm, self._blocks.order) for patch in patches[name]]
                for name in self._blocks.patches
                if patches.get(name)
            }
            if wrapped:
                self._options.write(args, kwargs, {**options, "patches": {**patches, **wrapped}})
        return tuple(args), kwargs

    def _enter(self, forward: _Forward, args: list[Any], kwargs: dict[str, Any]) -> None:
        if forward.layouts[self._index] is not None:
            raise PlanError(f"The blocks {self._blocks.at} were entered twice", "the model runs them more than once")
        values = [slot.read(args, kwargs) for slot, _ in self._streams]
        lengths = {
            split.over[0]: value.shape[split.dim]
            for value, (_, split) in zip(values, self._streams, strict=True)
            if len(split.over) == 1
        }
        comm = self._owner.comm
        segments = tuple(Segment(name, lengths[name]) for name in self._blocks.order)
        layout = Layout(segments=segments, rank=comm.rank, size=comm.size)
        forward.layouts[self._index] = layout
        for value, (slot, split) in zip(values, self._streams, strict=True):
            slot.write(args, kwargs, split(value, layout))

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._owner.forward
        if forward is None or not (forward.per_block or self._last):
            return None
        layout = self._owner.layout(self._index)
        outputs = output if isinstance(output, tuple) else (output,)
        joined = tuple(
            _join(value, split, layout, self._owner.comm)
            for value, split in zip(outputs, self._blocks.outputs, strict=True)
        )
        forward.layouts[self._index] = None
        return joined if isinstance(output, tuple) else joined[0]


class _HeadHook:
    """Joins the output of the module after the last block; does nothing where blocks join their own."""

    def __init__(self, owner: Installation, index: int, head: Head, module: nn.Module) -> None:
        self._owner = owner
        self._index = index
        self._head = head
        self._shared = _Shared(head.at, module, head.shared, head.optional)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = self._owner.forward
        if forward is None or forward.per_block:
            return None
        args, kwargs = list(args), dict(kwargs)
        self._shared.cut(forward, self._owner.layout(self._index), args, kwargs)
        return tuple(args), kwargs

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        forward = self._owner.forward
        if forward is None or forward.per_block:
            return None
        layout = self._owner.layout(self._index)
        forward.layouts[self._index] = None
        return _join(output, self._head.output, layout, self._owner.comm)


class _SiteHook:
    """Makes one attention module compute over all tokens, by ComfyUI's own per-call attention override."""

    def __init__(self, owner: Installation, index: int, order: tuple[str, ...], module: nn.Module) -> None:
        self._owner = owner
        self._index = index
        self._order = order
        self._options = _Slot.need(module, "transformer_options")

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._owner.forward is None:
            return None
        args, kwargs = list(args), dict(kwargs)
        whole = self._options.read(args, kwargs) or {}
        local = dict(whole)
        ulysses = None
        if self._owner.comm.size > 1:
            layout, parallel = self._owner.layout(self._index), self._owner.parallel
            ulysses = Ulysses(
                self._owner.comm,
                layout=layout,
                order=self._order,
                pack=parallel.pack_qkv,
                sync=parallel.sync_ulysses,
            )
            if "img_slice" in whole:
                local["img_slice"] = [layout.boundary(at, over=self._order) for at in whole["img_slice"]]
        local["optimized_attention_override"] = overrides.compose(ulysses, self._owner.kernel, whole)
        self._options.write(args, kwargs, local)
        return tuple(args), kwargs


def _whole(
    patch: Callable[[dict[str, Any]], torch.Tensor],
    options: Mapping[str, Any],
    layout: Layout,
    comm: Comm,
    order: tuple[str, ...],
) -> Callable[[dict[str, Any]], torch.Tensor]:
    """A patch that is shown every token; the options it reads and leaves notes in are the model's own."""

    def whole(data: dict[str, Any]) -> torch.Tensor:
        joined = {
            name: gather(value, dim=1, over=order, layout=layout, comm=comm)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in data.items()
        }
        return layout.split(patch({**joined, "transformer_options": options}), dim=1, over=order)

    return whole


def _join(value: torch.Tensor, split: Split, layout: Layout, comm: Comm) -> torch.Tensor:
    return gather(value, dim=split.dim, over=split.over, layout=layout, comm=comm)
