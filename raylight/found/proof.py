"""Proves a plan in one process: the engine itself on several ranks, against the model alone."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..install import install
from ..mesh import Mesh
from ..plan import Plan, Region
from ..sequence.slots import modules
from .simulated import on_ranks
from .values import Inputs, Refused, apart, close, copied, narrow, never, tensors

SIZES = (2, 3, 5)
"""Numbers of ranks."""


@dataclass(frozen=True)
class Proof:
    """A plan that is right for some inputs.

    Attributes:
        error: the largest difference of an output to the model's own, root mean square to root mean square.
        share: how much of a forward's multiplications the plan divides.
        notes: which plan failed before, and how.
    """

    plan: Plan
    error: float
    share: float
    notes: tuple[str, ...]


def prove(
    model: nn.Module,
    name: str,
    plan: Plan,
    every: Sequence[Inputs],
    sizes: Sequence[int] = SIZES,
    *,
    tick: Callable[[], None] = never,
) -> Proof:
    """The plan, or the same with tokens cut around every block, whichever is right for all inputs on all ranks.

    Args:
        model: one that computes in fp32: rounding of 16 bits hides what is small.
        name: the method that runs it.
        every: the first are run on all of `sizes`, each other on one of them.
        tick: called before each forward; what it raises ends the proof.

    Raises:
        Refused: neither is.
    """
    coarser = Plan(*(Region(*r.blocks, whole=r.whole, per_block=True) for r in plan.regions))
    notes: list[str] = []
    for candidate in (plan, coarser) if coarser != plan else (plan,):
        why, error = _compared(model, name, candidate, every, sizes=sizes, tick=tick)
        if not why:
            return Proof(candidate, error, divided_share(model, name, candidate, every[0]), tuple(notes))
        notes.append(why)
    raise Refused("; around every block: ".join(notes))


class _Watch:
    """Keeps what blocks give where it is whole: the model's output may hide it, with a last layer of zeros."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.seen: list[torch.Tensor] = []
        for region in plan.regions:
            if region.exit is None and len(region.blocks) == 1:
                found = modules(model, region.blocks[0].at)
                for module in found if region.per_block else found[-1:]:
                    module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, out: Any) -> None:
        self.seen += map(torch.clone, tensors(out))


def _compared(
    model: nn.Module,
    name: str,
    plan: Plan,
    every: Sequence[Inputs],
    *,
    sizes: Sequence[int],
    tick: Callable[[], None],
) -> tuple[str, float]:
    """What is wrong with a plan, "" for nothing, and the largest difference."""
    largest = 0.0
    for number, inputs in enumerate(every):
        alone = sharing(model)
        watch = _Watch(alone, plan)
        tick()
        with torch.no_grad():
            args, kwargs = copied(inputs)
            wanted = [*tensors(getattr(alone, name)(*args, **kwargs)), *watch.seen]
        if any(map(narrow, wanted)):
            return "the model computes in 16 bits what it is given in 32", largest
        if not all(bool(t.isfinite().all()) for t in wanted):
            return "the model itself gives no finite values for the inputs of the proof", largest
        # blocks were replayed for all of them on all numbers of ranks; here they are run one after the other
        for size in sizes if number == 0 else (sizes[number % len(sizes)],):
            tick()
            try:
                outs = divided(model, name, plan, inputs, size)
            except Exception as error:
                # whatever it raises: the plan does not fit
                return f"on {size} ranks: {type(error).__name__}: {str(error)[:200]}", largest
            for out in outs:
                if len(out) != len(wanted):
                    return f"{size} ranks return {len(out)} tensors, the model {len(wanted)}", largest
                error_here = max((apart(a, b) for a, b in zip(out, wanted, strict=True)), default=0.0)
                largest = max(largest, error_here)
                if not all(map(close, out, wanted)):
                    return f"the output of {size} ranks differs by {error_here:.0e} from the model's own", largest
                if not all(map(torch.equal, out, outs[0])):
                    return f"{size} ranks do not return the same bytes", largest
    return "", largest


def divided(model: nn.Module, name: str, plan: Plan, inputs: Inputs, size: int) -> list[list[torch.Tensor]]:
    """The tensors that each of `size` ranks returns, with a copy of the model's structure on the same weights.

    After the model's own come those that its blocks give where tokens are whole again.
    """
    copies = [sharing(model) for _ in range(size)]

    def job(mesh: Mesh) -> list[torch.Tensor]:
        mine = copies[mesh.rank]
        installation = install(mine, plan, mesh)
        # after the engine's hooks, so that it sees what these join
        watch = _Watch(mine, plan)
        args, kwargs = copied(inputs)
        return [*tensors(installation.wrapper(getattr(mine, name), *args, **kwargs)), *watch.seen]

    return on_ranks(size, job)


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model's structure, with its state, on the same weights and without hooks."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") or "_hooks_" in name:
                memo[id(value)] = OrderedDict()
            elif isinstance(value, list) and value and all(map(callable, value)) and not _modules_in(value):
                # what changes weights as they are used, and may hold as much as they
                memo[id(value)] = value
    return copy.deepcopy(model, memo)


def _modules_in(values: list[Any]) -> bool:
    return any(isinstance(value, nn.Module) for value in values)


def divided_share(model: nn.Module, name: str, plan: Plan, inputs: Inputs) -> float:
    """How much of a forward's multiplications a plan divides; what is `Whole` does not count."""
    mine = sharing(model)
    counter = FlopCounterMode(display=False)
    spent = 0

    def counted(sign: int) -> Callable[..., None]:
        def note(*_: Any) -> None:
            nonlocal spent
            spent += sign * counter.get_total_flops()

        return note

    for region in plan.regions:
        paths = [(blocks.at, 1) for blocks in region.blocks] + [(whole.at, -1) for whole in region.whole]
        for path, sign in paths:
            for module in modules(mine, path):
                module.register_forward_pre_hook(counted(-sign))
                module.register_forward_hook(counted(sign))
    with torch.no_grad(), counter:
        args, kwargs = copied(inputs)
        getattr(mine, name)(*args, **kwargs)
    return spent / max(1, counter.get_total_flops())
