"""How the ranks of a sequence share one model: by the plan that is written for its class, or by one that is found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ...raylight.errors import PlanError, UnsupportedError
from ...raylight.install import install
from ...raylight.mesh import Mesh
from ...raylight.names import functions, name_of
from ...raylight.plan import Plan, RowPlan
from ...raylight.rows.row_hooks import RowInstallation
from ...raylight.sequence.hooks import Installation
from ...raylight.sequence.kernels import LocalKernel
from ..wire import standing
from ..wire.messages import Wrapped
from ..wire.said import Said
from . import compiled, unplanned
from .kept_plans import KeptPlans
from .unplanned import Unplanned
from .wrapped import Outer


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One call of a model's forward.

    Attributes:
        method: its name.
        call: calls a function with arguments, as a model call of this worker.
        state: of the model beside its inputs.
        replaced: code of the model that is a node's, by name.
        patched: whether something of the model is another one than ComfyUI's, compiled blocks included.
        cancelled: whether this rank has been told to stop.
        wrapped: a node's function that is to make the call.
    """

    method: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Hashable
    replaced: Mapping[str, Any]
    patched: bool
    cancelled: Callable[[], bool]
    wrapped: Wrapped | None

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function in the forward's place."""
        return self.call(function, *args, **kwargs)


class Sharing:
    """The plan of one model, and its hooks.

    Args:
        plan: that is written for it, None for none.
        finds: whether one is looked for where none is written, or it does not fit; else each rank then runs all of it.
        paths: of the model's files.
        grain: pixels of the picture along each axis that surely make one token.

    Attributes:
        installation: the hooks of the last call; None where each rank runs all of it.
        found: what finds a plan by the model's calls; None where one is written, or none is needed.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        kernel: LocalKernel | None,
        *,
        plan: Plan | RowPlan | None,
        finds: bool,
        paths: list[str],
        grain: int,
    ) -> None:
        self._model = model
        self._mesh = mesh
        self._kernel = kernel
        self._paths = paths
        self._grain = grain
        self._plan = plan
        self._finds = finds
        self._lines: list[Said] = []
        self.installation: Installation | RowInstallation | None = None
        self.found = self._to_be_found() if finds and plan is None else None
        # a written plan is tried once where nobody has tried this ComfyUI; one for rows tries itself
        self._untried = isinstance(self._plan, Plan) and mesh.sequence.size > 1 and bool(standing.note())

    def install(self, compiler: str, replaced: dict[str, Any]) -> None:
        """Put the hooks of a written plan on the model, anew where they are there.

        Raises:
            UnsupportedError: they cannot be put on a model that is compiled; those before stay.
        """
        if self._plan is None:
            return
        opaque = compiled.opaque if compiler else None
        made = install(self._model, self._plan, self._mesh, kernel=self._kernel, opaque=opaque)
        if self.installation is not None:
            self.installation.remove()
        self.installation = made
        made.changed(replaced)

    def changed(self, replaced: dict[str, Any]) -> None:
        """Code of the model is another one now."""
        if self._plan is not None and self.installation is not None:
            self.installation.changed(replaced)

    def check_compiler(self) -> None:
        """Refuse to compile a model whose plan is found.

        Raises:
            UnsupportedError: it is.
        """
        if self.found is not None:
            raise UnsupportedError(
                f"{type(self._model).__name__} cannot be compiled while its tokens are divided over workers",
                "it has no plan of its own, and one that was found is checked while it is used",
                "Remove Torch Compile Model (Ray), or set ulysses_degree and ring_degree to 1",
            )

    def function(self, method: str) -> Callable[..., Any]:
        """A method of the forward, shared."""
        bare = getattr(self._model, method)
        return bare if self.installation is None else partial(self.installation.wrapper, bare)

    def watches(self, forward: Forward) -> bool:
        """Whether something looks at what this call does, so that it is to be made by `run`."""
        return forward.wrapped is not None or bool(forward.replaced) or self.found is not None or self._tries(forward)

    def run(self, forward: Forward) -> Any:
        """Make such a call.

        Raises:
            UnsupportedError: a node's code goes another way on another worker, or cannot be where it is.
            PlanError: a written plan does not fit this ComfyUI, and no other can be looked for.
        """
        if self.found is not None:
            return self._by_found(self.found, forward)
        if not (forward.wrapped is not None or forward.replaced):
            return self._tried(forward)
        outer = Outer(self._model, self._mesh, self.installation)
        if forward.wrapped is not None:
            return outer.run(forward.wrapped, forward.method, forward.call, forward.args, forward.kwargs)
        names = ", ".join(map(name_of, forward.replaced.values()))
        return outer.forward(forward.method, forward.call, forward.args, forward.kwargs, names=names)

    def lines(self) -> tuple[Said, ...]:
        """What is to be said of plans, since the last time."""
        told, self._lines = tuple(self._lines), []
        return (*told, *self.found.lines()) if self.found is not None else told

    def remove(self) -> None:
        """Take all hooks off."""
        if self.found is not None:
            self.found.close()
        elif self.installation is not None:
            self.installation.remove()

    def _to_be_found(self, lacks: str = "of its own") -> Unplanned:
        return Unplanned(
            self._model,
            self._mesh,
            self._kernel,
            grain=self._grain,
            kept=lambda: KeptPlans(self._paths, self._model),
            lacks=lacks,
        )

    def _by_found(self, found: Unplanned, forward: Forward) -> Any:
        if forward.wrapped is not None:
            found.refuse_wrapped(name_of(forward.wrapped.function))
        try:
            return found.run(
                forward.method,
                forward.run,
                (forward.args, forward.kwargs),
                state=forward.state,
                changed=", ".join(forward.replaced),
                cancelled=forward.cancelled,
            )
        finally:
            self.installation = found.used

    def _tries(self, forward: Forward) -> bool:
        patched = forward.patched or any(functions([list(forward.args), forward.kwargs]))
        return self._untried and self.installation is not None and not patched

    def _tried(self, forward: Forward) -> Any:
        """The first call on a ComfyUI that nobody has tried: whole on each rank, and with the plan, which must agree.

        Where it does not, a plan is found in its place, for all calls but this one.
        """
        assert self.installation is not None
        control, name = self._mesh.control_of(self._mesh.sequence), type(self._model).__name__
        bare, shared = getattr(self._model, forward.method), self.function(forward.method)
        whole, why = unplanned.tried(forward.run, bare, shared, (forward.args, forward.kwargs), control)
        self._untried = False
        if not why:
            return whole
        if self._finds and not unplanned.possible(self._mesh.parallel):
            raise PlanError(f"The plan that Raylight has for {name} does not fit", why)
        self.installation.remove()
        self._plan = self.installation = None
        self.found = self._to_be_found("that fits") if self._finds else None
        then = "one is looked for in its place, by running the model" if self._finds else "every worker computes it"
        text = f"The plan that Raylight has for {name} does not fit: {why}. {standing.note()}. Now {then}"
        self._lines.append((logging.WARNING, text))
        return whole
