"""Carry out a row plan on a model: each rank runs the whole forward on its rows of the picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..cost import Work
from ..draws import same_draws
from ..errors import PlanError, RaylightError, UnsupportedError
from ..layout import Segment
from ..mesh import Mesh
from ..names import functions, name_of
from ..plan import RowPlan
from ..sequence.attention import SequenceAttention
from ..sequence.kernels import LocalKernel
from ..sequence.overrides import OVERRIDE
from ..sequence.replaced import REMEDY
from ..sequence.sites import Attend, Named, Sites
from ..sequence.slots import Slot, modules
from . import selftest
from .row_patches import SHAPE, WholePatches
from .row_rules import RowParallel
from .strips import ROWS, Rows, Strips

log = logging.getLogger(__name__)

INSIDE = ("patches", "patches_replace", OVERRIDE)
"""Entries of transformer_options that hold the user's functions."""


def ranks_for(rows: int, *, halvings: int, size: int) -> int:
    """How many of `size` ranks share a picture: as many as it has strips for, in groups that do the same."""
    most = Strips.most(rows, halvings=halvings)
    return max(count for count in range(1, size + 1) if size % count == 0 and count <= most)


class RowInstallation:
    """The hooks of one row plan on one model. `wrapper` runs a forward with them; `remove` takes them off.

    One forward at a time; every rank must run it with equal inputs.

    Attributes:
        works: the self-attentions of the last forward, in their order; convolutions are in none.
        advice: what the user should know of the last forward, "" for nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: RowPlan,
        mesh: Mesh,
        *,
        kernel: LocalKernel | None,
        opaque: Callable[[Attend], Attend] | None,
    ) -> None:
        self.works: dict[int, Work] = {}
        self.advice = ""
        self.mesh = mesh
        self.kernel = kernel
        self.sites = Sites(kernel, opaque)
        self.forward: _Forward | None = None
        self._plan = plan
        self._name = type(model).__name__
        self._tested: set[tuple[Any, ...]] = set()
        self._handles: list[RemovableHandle] = []
        split = mesh.sequence.size > 1
        if split and opaque is not None:
            raise UnsupportedError(
                "Compiled blocks cannot be used with a model that is divided by rows",
                "its convolutions and norms talk to other workers",
                "Choose cudagraphs in RayTorchCompileModel, or set ulysses_degree and ring_degree to 1",
            )
        function = getattr(model, "_forward", model.forward)
        self._x, self._control, self._context, self._options = (
            _need(function, name, self._name) for name in ("x", "control", "context", "transformer_options")
        )
        if not split and kernel is None:
            return
        for paths, hook in ((plan.attention, _AttentionHook), (plan.cross, _CrossHook)):
            for module in (found for path in paths for found in modules(model, path)):
                attends = hook(self, module)
                self._handles.append(module.register_forward_pre_hook(attends.before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(attends.after))

    def wrapper(self, executor: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward on all ranks: a DIFFUSION_MODEL wrapper, or called with `model._forward` as executor.

        Returns:
            What the model returns, with equal bytes on every rank.

        Raises:
            UnsupportedError: a patch, an input or a call of the model that cannot be cut by rows.
        """
        assert self.forward is None, "one forward at a time"
        x: torch.Tensor = self._x.read(args, kwargs)
        size = self.mesh.sequence.size
        ranks = ranks_for(x.shape[ROWS], halvings=self._plan.halvings, size=size)
        self.advice = ""
        if ranks < size:
            self.advice = (
                f"A picture of {x.shape[ROWS]} latent rows is divided over {ranks} of {size} workers; the others do "
                "the same (docs/scaling.md). Use fewer workers per picture: cfg_degree or data parallel"
            )
        if ranks == 1 and self.kernel is None:
            return executor(*args, **kwargs)
        try:
            mesh = self.mesh.part(ranks)
            if ranks == 1:
                self.forward = _Forward(mesh)
                return executor(*args, **kwargs)
            options = self._options.read(args, kwargs) or {}
            kind = (ranks, x.dtype, *sorted(map(name_of, functions(options))))
            if kind not in self._tested:
                with same_draws(x.device):
                    self._test(executor, mesh, list(args), dict(kwargs))
                self._tested.add(kind)
            return self._divided(executor, mesh, list(args), dict(kwargs))
        finally:
            self.forward = None
            self.sites.clear()

    def changed(self, objects: Mapping[str, Any]) -> None:
        """A user's patch has other attributes of the model replaced than before: what is known of it does not hold."""
        self._tested.clear()

    def _test(self, executor: Callable[..., torch.Tensor], mesh: Mesh, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Run a small random picture whole and by rows, with the call's other inputs and the user's patches.

        Raises:
            UnsupportedError: the results differ. All ranks raise it.
        """
        x, unit = self._x.read(args, kwargs), 2**self._plan.halvings
        shape = (*x.shape[:ROWS], unit * mesh.sequence.size + 1, unit + 1)
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(selftest.SEED)).to(x)
        options = self._options.read(args, kwargs) or {}
        self._control.write(args, kwargs, None)

        def run(function: Callable[..., torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
            torch.manual_seed(selftest.SEED)
            self._x.write(args, kwargs, sample.clone())
            self._options.write(args, kwargs, {**options})
            return function(*args, **kwargs)

        def by_rows(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self._divided(executor, mesh, list(args), kwargs)

        try:
            whole = run(executor, options)
        except RaylightError:
            raise
        except Exception:  # of a patch that wants another picture, on every rank
            log.info("self-test of %s by rows: without patches, which fail on a small picture", self._name)
            options = {key: value for key, value in options.items() if key not in INSIDE}
            whole = run(executor, options)
        found = run(by_rows, options)
        difference = (found.float() - whole.float()).abs().max() / whole.float().abs().max().clamp_min(1e-12)
        if not whole.isfinite().all():
            difference = torch.zeros_like(difference)  # 16 bits overflow on one rank as well
        # each has computed the whole for itself
        worst = mesh.sequence.all_reduce(difference, op="max").item()
        limit = selftest.limit(x.dtype)
        log.info("self-test of %s by rows on %d ranks: %.1e, may be %.0e", self._name, mesh.sequence.size, worst, limit)
        if not worst <= limit:
            raise UnsupportedError(
                f"{self._name} gives another result when it is divided by rows",
                f"a small picture differs by {worst:.1e} of its largest value: a layer or patch looks across rows",
                REMEDY,
            )

    def _divided(
        self, executor: Callable[..., torch.Tensor], mesh: Mesh, args: list[Any], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        x, comm = self._x.read(args, kwargs), mesh.sequence
        self.works.clear()
        strips = Strips.of(
            x.shape[ROWS], ranks=comm.size, rank=comm.rank, halvings=self._plan.halvings, speeds=mesh.speeds
        )
        rows = Rows(comm, strips, model=self._name, remedy=REMEDY)
        mode = RowParallel(rows)
        patches = WholePatches(
            self._options.read(args, kwargs) or {},
            self._plan,
            rows,
            mode,
            shape=x.shape,
            text=self._context.read(args, kwargs) is not None,
        )
        self.forward = _Forward(mesh, patches)
        control = self._control.read(args, kwargs)
        if control is not None:
            self._control.write(args, kwargs, _own(control, strips))
        self._options.write(args, kwargs, patches.options)
        self._x.write(args, kwargs, strips.own(x).contiguous())
        with mode:
            out = executor(*args, **kwargs)
        return rows.gather(out)

    def remove(self) -> None:
        """Leave the model exactly as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Forward:
    """What one forward has open.

    Args:
        mesh: the ranks that share it.
        patches: the user's, None where nothing is cut.
    """

    def __init__(self, mesh: Mesh, patches: WholePatches | None = None) -> None:
        self.mesh = mesh
        self.patches = patches


class _AttentionHook:
    """Makes one self-attention compute over the tokens of all rows."""

    def __init__(self, owner: RowInstallation, module: nn.Module) -> None:
        self._owner = owner
        self._named = Named(module)
        self._options = Slot.need(module, "transformer_options")
        self._context = Slot.need(module, "context")
        self._x = Slot.need(module, "x")
        self._entered = False

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = self._owner.forward
        self._entered = forward is not None and self._attends(args, kwargs)
        if forward is None or not self._entered:
            return None
        args, kwargs = list(args), dict(kwargs)
        patches = forward.patches
        if patches is None:
            self._owner.sites.enter(self._options, args, kwargs, None, named=self._named())
            return tuple(args), kwargs
        options = self._options.read(args, kwargs) or {}
        if SHAPE not in options:
            raise PlanError(f"{type(module).__name__} is not told which rows it attends to", f"{SHAPE} is not set")
        attention = self._attention(args, kwargs, patches, options)
        if attention is not None:
            attention = patches.apart(attention)
        shown = patches.shown(options)
        self._owner.sites.enter(self._options, args, kwargs, attention, named=self._named(), shown=shown)
        return tuple(args), kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered:
            self._owner.sites.leave()
            self._entered = False

    def _attends(self, args: Any, kwargs: dict[str, Any]) -> bool:
        return True

    def _attention(
        self, args: Any, kwargs: dict[str, Any], patches: WholePatches, options: dict[str, Any]
    ) -> Callable[..., torch.Tensor] | None:
        return None if patches.regrouped else self._sequence(args, kwargs, patches, options)

    def _sequence(
        self, args: Any, kwargs: dict[str, Any], patches: WholePatches, options: dict[str, Any]
    ) -> SequenceAttention:
        assert self._owner.forward is not None
        mesh, lengths = self._owner.forward.mesh, tuple(patches.lengths(options))
        segment = Segment("x", sum(lengths), shares=lengths)
        layout = mesh.laid([segment])
        x: torch.Tensor = self._x.read(args, kwargs)
        self._owner.works[len(self._owner.works)] = Work(
            tokens=segment.length,
            width=x.shape[-1],
            blocks=1,
            weights=0,
            batch=x.shape[0],
            itemsize=x.element_size(),
        )
        return SequenceAttention(mesh, layout=layout, order=("x",), kernel=self._owner.kernel)


class _CrossHook(_AttentionHook):
    """Leaves cross-attention alone, unless it has nothing else to attend to, or an override of the user's sees it."""

    def _attends(self, args: Any, kwargs: dict[str, Any]) -> bool:
        cut = self._owner.forward is not None and self._owner.forward.patches is not None
        overridden = cut and OVERRIDE in (self._options.read(args, kwargs) or {})
        return overridden or self._context.read(args, kwargs) is None

    def _attention(
        self, args: Any, kwargs: dict[str, Any], patches: WholePatches, options: dict[str, Any]
    ) -> Callable[..., torch.Tensor] | None:
        if self._context.read(args, kwargs) is None:
            return self._sequence(args, kwargs, patches, options)

        def whole(local: Callable[..., torch.Tensor], q: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            return patches.cut(local(patches.join(q, options), *rest, **more), options)

        return whole


def _need(function: Callable[..., Any], name: str, model: str) -> Slot:
    slot = Slot.find(function, name)
    if slot is None:
        raise PlanError(f"{model} has no argument {name}", "the plan is for another version of it")
    return slot


def _own(control: dict[str, Any], strips: Strips) -> dict[str, Any]:
    """A ControlNet's residuals, lists of whole maps by place, cut."""
    return {
        name: [None if x is None else strips.own(x).contiguous() for x in residuals]
        for name, residuals in control.items()
    }
