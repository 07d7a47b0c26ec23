"""A model whose class has no written plan: one is found and proved before its first use, for each kind of call."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch import nn

from ...patches.registry import refuse
from ...raylight import draws
from ...raylight.comm import Comm
from ...raylight.config import ParallelConfig
from ...raylight.errors import Cancelled, RaylightError, UnsupportedError
from ...raylight.found import find as found
from ...raylight.found import proof
from ...raylight.found.doubt import Doubt, Unproved
from ...raylight.found.kinds import Form, kind_of, normal, sizes_of
from ...raylight.found.small import small
from ...raylight.found.values import Inputs, Refused, apart, copied, tensors
from ...raylight.install import install
from ...raylight.mesh import Mesh
from ...raylight.names import functions, name_of
from ...raylight.plan import Plan
from ...raylight.sequence.hooks import Installation
from ...raylight.sequence.kernels import LocalKernel
from ...raylight.sequence.replaced import limit
from ...raylight.sequence.slots import modules
from ..wire.failures import TRANSPORT_SIGNS
from ..wire.said import Said
from .kept_plans import KeptPlans
from .wide import wide, widened

log = logging.getLogger(__name__)

FIND_S = 300.0
"""Seconds after which a plan that was not found yet is not looked for any more."""
OUTPUT = 30
"""How much more the whole model's output may differ than a block's: rounding goes on from block to block."""
HALF = 0.5
Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Calls a function with these arguments, as a model call of the worker."""


def possible(parallel: ParallelConfig) -> bool:
    """Whether plans are looked for on such a pool."""
    return parallel.sequence > 1 and parallel.attention == "TORCH" and parallel.residency == "resident"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the first rank of a sequence has found out about a kind of call; plain data.

    Attributes:
        plan: None where none is proved; `why` then says what was tried.
        forms: what its blocks may be given.
        share: how much of a step it divides.
        blocks, dims: how many there are, and where their tokens are.
        earlier: it was kept from an earlier start.
    """

    plan: Plan | None = None
    forms: dict[str, frozenset[Form]] = field(default_factory=dict)
    share: float = 0.0
    seconds: float = 0.0
    blocks: int = 0
    dims: tuple[int, ...] = ()
    why: str = ""
    cancelled: bool = False
    earlier: bool = False


@dataclass
class _Kind:
    """A kind of call: its plan at work, or None where every worker computes it whole, for the reason `why`."""

    key: Hashable
    verdict: Verdict
    doubt: Doubt | None = None
    installation: Installation | None = None
    why: str = ""


class Unplanned:
    """The plans that were found for one model, by the kind of call.

    All ranks of a sequence are given the same calls and decide alike: what is proved is found out by the first of them
    alone, and differences are added up over all.

    Args:
        model: what runs.
        grain: pixels of the picture along each axis that surely make one token.
        kept: gives the plans of earlier starts, None for none; called once, where the first is needed.
        lacks: what plan it has none of.

    Attributes:
        used: of the last call; None where it was computed whole.
        summary: what the report says, "" for nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        kernel: LocalKernel | None,
        *,
        grain: int,
        kept: Callable[[], KeptPlans | None] = lambda: None,
        lacks: str = "of its own",
    ) -> None:
        self._model, self._mesh, self._kernel, self._grain = model, mesh, kernel, grain
        self._name = type(model).__name__
        self._control: Comm = mesh.control_of(mesh.sequence)
        self._kinds: dict[Hashable, _Kind] = {}
        self._lines: list[Said] = []
        self._told: set[str] = set()
        self._kept = cache(kept)
        self._lacks = lacks
        self.used: Installation | None = None
        self.summary = ""

    def run(
        self,
        method: str,
        run: Run,
        inputs: Inputs,
        *,
        state: Hashable,
        changed: str = "",
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Call the model, shared by a plan that is proved for calls of this kind, or whole on every rank.

        Args:
            run: see `Run`.
            state: of the model beside its inputs: after it changed, all blocks are compared anew.
            changed: names of the code of the model that is replaced.

        Raises:
            UnsupportedError: no plan is found for the first kind of call, or a block fails with its part of the tokens.
            Cancelled: all ranks were told to stop.
        """
        bare, (args, kwargs) = getattr(self._model, method), inputs
        self.used = None
        patches = ", ".join(dict.fromkeys(map(name_of, functions([list(args), kwargs]))))
        if changed or patches:
            named = ", ".join(filter(None, (changed, patches)))
            self._say(
                f"Every worker computes calls of {self._name} whole where a node changes the model inside ({named}): "
                f"it has no plan {self._lacks}, and patches are not tried out"
            )
            return run(bare, args, kwargs)
        key = method, kind_of(inputs)
        if key not in self._kinds:
            self._kinds[key] = self._learn(key, inputs, cancelled)
        kind = self._kinds[key]
        if kind.doubt is None or kind.installation is None:
            if not any(other.verdict.plan for other in self._kinds.values()):
                refuse(self._name, f"it has no plan {self._lacks}, and none was found: {kind.why}")
            if kind.verdict.plan is None:  # of one that was dropped, that is known
                self._say(
                    f"Every worker computes some calls of {self._name} whole: they are of another kind than those that "
                    f"a plan was found for, and none was found for these: {kind.why}"
                )
            return run(bare, args, kwargs)
        return self._shared(kind, bare, run, inputs, state)

    def refuse_wrapped(self, name: str) -> NoReturn:
        """Raises UnsupportedError for a node's function that is to make a call."""
        raise UnsupportedError(
            f"{name} cannot be used with a model whose tokens are divided over workers by a plan that was found",
            f"{self._name} has no plan of its own, and code of nodes around the model is not tried out with one",
            "Set ulysses_degree and ring_degree to 1, or take ComfyUI's EasyCache, which decides outside of the model",
        )

    def lines(self) -> tuple[Said, ...]:
        """What is to be said of it since the last time; what all sequences find alike, by the first worker alone."""
        found, self._lines = self._lines, []
        return tuple(line for line in found if self._mesh.rank == 0 or line[0] > logging.INFO)

    def close(self) -> None:
        """Take all hooks off."""
        for kind in self._kinds.values():
            if kind.installation is not None:
                kind.installation.remove()
        self._kinds.clear()

    # ---- a call that is shared -----------------------------------------------------------------

    def _shared(self, kind: _Kind, bare: Callable[..., Any], run: Run, inputs: Inputs, state: Hashable) -> Any:
        doubt, installation = kind.doubt, kind.installation
        assert doubt is not None and installation is not None
        sizes = state, sizes_of(inputs)
        thorough, device = doubt.prepare(sizes), _device(inputs)
        spare = copied(inputs)
        before = draws.states(device)
        # the answer to a call that is not trusted yet
        whole = run(bare, *copied(inputs)) if thorough else None
        drawn = draws.states(device)
        _draw(device, before)
        self.used = installation
        try:
            out = run(partial(installation.wrapper, bare), *inputs)
        except Unproved as error:
            # on all ranks, at the same point
            self._drop(kind, str(error))
            _draw(device, drawn if thorough else before)
            return whole if thorough else run(bare, *spare)
        except (Cancelled, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # perhaps on this rank alone, while others wait: nothing can be agreed on, and the call fails
            if not isinstance(error, RaylightError) and any(sign in str(error) for sign in TRANSPORT_SIGNS):
                raise
            self._drop(kind, f"{type(error).__name__}: {error}")
            raise UnsupportedError(
                f"The plan that was found for {self._name} does not fit this call",
                f"{type(error).__name__}: {error}",
                "Queue the prompt again: such calls are then computed whole by every worker. Or set ulysses_degree and "
                "ring_degree to 1",
            ) from error
        if not thorough:
            return out
        _draw(device, drawn)
        why = differs(whole, out, self._control)
        if why:
            self._drop(kind, why)
        else:
            doubt.passed(sizes)
        return whole

    def _drop(self, kind: _Kind, why: str) -> None:
        if kind.installation is not None:
            kind.installation.remove()
        kind.doubt, kind.installation, kind.why, self.used = None, None, why, None
        # made when the plan was found: the file is not read again
        kept = self._kept() if self._control.rank == 0 else None
        if kept is not None:
            kept.drop((kind.key, self._mesh.sequence.size))
        self._say(
            f"The plan that was found for {self._name} is dropped for calls of one kind, which every worker computes "
            f"whole from now on: {why}",
        )
        self._summarise()

    # ---- a kind that is new --------------------------------------------------------------------

    def _learn(self, key: tuple[str, Hashable], inputs: Inputs, cancelled: Callable[[], bool]) -> _Kind:
        """Find out about a kind of call: the first rank does, the others wait for what it says."""
        verdict = Verdict()
        if self._control.rank == 0:
            try:
                verdict = self._remembered(key) or self._examined(key[0], inputs, cancelled)
                if verdict.plan is not None and not verdict.earlier:
                    self._keep(key, verdict)
            except Exception as error:
                # the others wait for what is said here, whatever it is
                log.exception("no plan is found for %s", self._name)
                verdict = Verdict(why=f"{type(error).__name__}: {error}")
        verdict = _from_first(self._control, verdict)
        if verdict.cancelled:
            raise Cancelled("Cancelled")
        if verdict.plan is None:
            return _Kind(key, verdict, why=verdict.why)
        doubt = Doubt(verdict.forms)
        installed = install(self._model, verdict.plan, self._mesh, kernel=self._kernel, replaced=doubt)
        assert isinstance(installed, Installation)
        new, little = not any(kind.verdict.plan for kind in self._kinds.values()), verdict.share < HALF
        how = f"was found and checked in {verdict.seconds:.1f} s"
        self._say(
            f"{self._name} has no plan {self._lacks}: one {'from an earlier start is used' if verdict.earlier else how}"
            f"{'' if new else ' for another kind of call'}, {verdict.blocks} blocks, tokens at dim "
            f"{', '.join(map(str, verdict.dims))}, {verdict.share:.0%} of a step divided"
            f"{': each worker computes the rest, so that more of them help little' if little else ''}",
            level=logging.WARNING if little else logging.INFO,
        )
        kind = _Kind(key, verdict, doubt, installed)
        self._summarise(kind)
        return kind

    def _remembered(self, key: Hashable) -> Verdict | None:
        """What an earlier start has found out; a proof does not depend on who runs it, and every call is checked."""
        kept = self._kept()
        held = kept.get((key, self._mesh.sequence.size)) if kept is not None else None
        if held is None:
            return None
        try:
            forms = {str(name): frozenset(map(_tuples, each)) for name, each in held["forms"].items()}
            blocks, dims, share = int(held["blocks"]), tuple(map(int, held["dims"])), float(held["share"])
        except (KeyError, TypeError, ValueError, AttributeError):
            # it is no file of ours
            return None
        return Verdict(plan=held["plan"], forms=forms, share=share, blocks=blocks, dims=dims, earlier=True)

    def _keep(self, key: Hashable, verdict: Verdict) -> None:
        kept = self._kept()
        if kept is not None:
            forms = {name: list(each) for name, each in verdict.forms.items()}
            told = {"forms": forms, "share": verdict.share, "blocks": verdict.blocks, "dims": verdict.dims}
            kept.put((key, self._mesh.sequence.size), {"plan": verdict.plan, **told})

    def _examined(self, method: str, inputs: Inputs, cancelled: Callable[[], bool]) -> Verdict:
        """Find a plan and prove it, on this rank alone."""
        began = time.monotonic()

        def tick() -> None:
            if cancelled():
                raise Cancelled("Cancelled")
            if time.monotonic() - began > FIND_S:
                raise Refused(f"it takes longer than {FIND_S:.0f} s")

        try:
            with torch.inference_mode(False), torch.no_grad(), draws.same_draws(_device(inputs)):
                twin = wide(self._model)
                function = getattr(twin, method)
                given = small(function, normal(function, widened(inputs)), grain=self._grain, tick=tick)
                known = found.find(twin, function, given, tick=tick)
                ranks = sorted({*proof.SIZES, self._mesh.sequence.size})
                held = proof.prove(twin, method, known.plan, known.inputs, ranks, tick=tick)
        except Cancelled:
            return Verdict(cancelled=True)
        except Exception as error:
            # whatever it is, this model is not shared. The others wait for what is said here
            text = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            return Verdict(why=" ".join(text.split())[:300], seconds=time.monotonic() - began)
        listed = [blocks for region in held.plan.regions for blocks in region.blocks]
        return Verdict(
            plan=held.plan,
            forms=dict(known.forms),
            share=held.share,
            seconds=time.monotonic() - began,
            blocks=sum(len(modules(self._model, blocks.at)) for blocks in listed),
            dims=tuple(sorted({stream.dim for blocks in listed for stream in blocks.streams.values()})),
        )

    def _say(self, text: str, *, level: int = logging.WARNING) -> None:
        if text not in self._told:
            self._told.add(text)
            self._lines.append((level, text))

    def _summarise(self, new: _Kind | None = None) -> None:
        every = [kind for kind in (*self._kinds.values(), new) if kind is not None and kind.verdict.plan is not None]
        live = [kind.verdict for kind in every if kind.installation is not None]
        dropped = len(every) - len(live)
        parts = [f"{each.blocks} blocks, {each.share:.0%} of a step divided" for each in live]
        parts += [f"{dropped} dropped"] if dropped else []
        self.summary = f"plan found: {'; '.join(dict.fromkeys(parts))}"


def differs(whole: Any, out: Any, control: Comm) -> str:
    """How a model's output differs from what it gives alone, on any rank; "" for not at all. All ranks ask.

    Args:
        control: the ranks, on CPU connections.
    """
    pairs = list(zip(tensors([whole]), tensors([out]), strict=False))
    same = len(tensors([whole])) == len(tensors([out]))
    error = max((apart(b, a) / limit(a) for a, b in pairs), default=0.0) if same else float("inf")
    most = float(control.all_reduce(torch.tensor(min(error, 1e30), dtype=torch.float64), op="max"))
    return "" if most <= OUTPUT else f"the model's output differs by {most:.0e} times what rounding explains"


def tried(run: Run, bare: Callable[..., Any], shared: Callable[..., Any], inputs: Inputs, control: Comm) -> Any:
    """A call that each rank computes whole, which is its answer, and that they share as well; how these differ.

    Args:
        bare, shared: what computes it in these ways.
    """
    device = _device(inputs)
    before = draws.states(device)
    whole = run(bare, *copied(inputs))
    after = draws.states(device)
    _draw(device, before)
    out = run(shared, *inputs)
    _draw(device, after)
    return whole, differs(whole, out, control)


def _from_first(control: Comm, verdict: Verdict) -> Verdict:
    """The first rank's verdict, on all of them."""
    packed = pickle.dumps(verdict)
    size = int(control.broadcast(torch.tensor(len(packed))))
    mine = torch.frombuffer(bytearray(packed), dtype=torch.uint8) if control.rank == 0 else torch.zeros(size).byte()
    told: Verdict = pickle.loads(control.broadcast(mine).numpy().tobytes())
    return told


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _device(inputs: Inputs) -> torch.device:
    args, kwargs = inputs
    return next((t.device for t in tensors([list(args), kwargs])), torch.device("cpu"))


def _draw(device: torch.device, states: list[torch.Tensor]) -> None:
    """What is drawn next is drawn as of these states."""
    for module, state in zip(draws.generators(device), states, strict=True):
        module.set_rng_state(state)
