"""Put a plan on a model: by tokens or by rows, whichever the plan is for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .mesh import Mesh
from .plan import Plan, RowPlan
from .rows.row_hooks import RowInstallation
from .sequence.hooks import Granularity, Installation
from .sequence.kernels import LocalKernel
from .sequence.replaced import Replaced
from .sequence.sites import Attend


def install(
    model: nn.Module,
    plan: Plan | RowPlan,
    mesh: Mesh,
    *,
    kernel: LocalKernel | None = None,
    granularity: Granularity | None = None,
    opaque: Callable[[Attend], Attend] | None = None,
    replaced: Replaced | None = None,
) -> Installation | RowInstallation:
    """Put a plan's hooks on a model.

    Args:
        model: the diffusion model itself; its weights are not touched.
        plan: where its tokens are.
        mesh: the ranks that share the sequence.
        kernel: computes attention locally (`kernels.chosen`); None is what the model calls. A ring needs one.
        granularity: cut once per region ("trunk") or around every block ("block"); None decides per forward.
        opaque: makes a function one that compilers leave alone; None where nothing is compiled.
        replaced: which blocks are compared with themselves on all tokens; None for those with code of a user's patch.

    Raises:
        PlanError: the plan names a module or argument that the model does not have.
        UnsupportedError: a model that is cut by rows is to be compiled.
    """
    if isinstance(plan, RowPlan):
        return RowInstallation(model, plan, mesh, kernel=kernel, opaque=opaque)
    return Installation(
        model, plan, mesh, kernel=kernel, granularity=granularity, opaque=opaque, replaced=replaced or Replaced()
    )
