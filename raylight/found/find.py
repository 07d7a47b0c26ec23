"""Finds the plan of a diffusion model that nobody wrote one for, or the reason why there is none.

1. Trace (`found_trace`, `found_lengths`): one forward of small inputs, and one for each axis made longer.
2. Guess (`found_guess`): lists of blocks, streams, orders and arguments whose lengths fit.
3. Replay (`found_replay`, `found_search`): what fits in several ways is tried, a block at a time.

What comes out holds for the inputs it was found with, and for others of their kind; `proof.prove` compares the whole
model. Nothing here is trusted without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..plan import Blocks, Plan, Region
from .cuts import Counted, Same
from .guess import Guess
from .kinds import Form, Forms
from .lengths import Lengths, Runs, run_all
from .search import Search
from .trace import Call
from .values import Inputs, Refused, narrow, never, tensors


@dataclass(frozen=True)
class Found:
    """A plan that was found.

    Attributes:
        inputs: all that it was found with, for the proof.
        notes: what is left whole, cut around every block, or not tried, and why.
        forms: what each block of the plan was given, by its name.
    """

    plan: Plan
    inputs: tuple[Inputs, ...]
    notes: tuple[str, ...]
    forms: Mapping[str, frozenset[Form]]


def find(model: nn.Module, function: Callable[..., Any], inputs: Inputs, *, tick: Callable[[], None] = never) -> Found:
    """Find where a model's tokens are.

    Args:
        function: what runs it: its `_forward` where it has one, else its `forward`.
        inputs: small ones, of the kind of those to come.
        tick: called between parts of the work; what it raises ends this.

    Raises:
        Refused: no list of blocks can be cut.
    """
    runs = run_all(model, function, inputs, tick=tick)
    lengths = Lengths(runs)
    lists = _lists(model, runs, lengths)
    if not lists:
        raise Refused("no list of blocks passes image tokens on")
    blocks_of_all = [call for calls in lists.values() for call in calls]
    for call in runs.base.calls:
        if any(map(narrow, tensors(call.out))) and any(call.within(block) for block in blocks_of_all):
            raise Refused(f"{call.name} computes in 16 bits, in which small differences are not seen")
    regions: list[Region] = []
    notes: list[str] = []
    refused: list[str] = []
    for at, calls in lists.items():
        try:
            guess = Guess(model, runs, lengths, at=at, calls=calls)
            search = Search(model, runs, lengths, guess, tick=tick)
            blocks, wholes = search.run()
        except Refused as why:
            refused.append(str(why))
            continue
        between = _between(model, runs, calls, blocks)
        notes += search.notes
        notes += [f"{at} is cut around every block: {between}"] if between else []
        regions.append(Region(blocks, whole=wholes, per_block=bool(between)))
    if not regions:
        raise Refused("; ".join(refused))
    notes += [f"left whole: {why}" for why in refused]
    return Found(Plan(*regions), (inputs, *runs.inputs), tuple(notes), _forms(model, runs, regions))


def _forms(model: nn.Module, runs: Runs, regions: list[Region]) -> dict[str, frozenset[Form]]:
    """What the blocks of these regions were given in all runs."""
    found: dict[str, set[Form]] = {}
    for blocks in (blocks for region in regions for blocks in region.blocks):
        at = blocks.at.removesuffix(".*")
        for call in (call for run in (runs.base, *runs.longer) for call in run.calls):
            if call.name.rpartition(".")[0] == at:
                form = Forms(model.get_submodule(call.name), tuple(blocks.streams))
                found.setdefault(call.name, set()).add(form(*call.given))
    return {name: frozenset(forms) for name, forms in found.items()}


def _lists(model: nn.Module, runs: Runs, lengths: Lengths) -> dict[str, list[Call]]:
    """Calls of the outermost lists of blocks that carry image tokens, by the path of the list."""
    called = {call.name for call in runs.base.calls}
    found: dict[str, list[Call]] = {}
    for call in runs.base.calls:
        at, _, _ = call.name.rpartition(".")
        if not at or at in called or not isinstance(model.get_submodule(at), (nn.ModuleList, nn.ModuleDict)):
            continue
        if any(call.within(other) for calls in found.values() for other in calls):
            continue
        given = list(lengths.tensors_of(call).values())
        outs = lengths.tensors_of(call, "out").values()
        if any(out in given and any(map(runs.image, out)) for out in outs):
            found.setdefault(at, []).append(call)
    return found


def _between(model: nn.Module, runs: Runs, calls: list[Call], blocks: Blocks) -> str:
    """What happens to tokens between the blocks; "" where they go from one to the next untouched and unseen."""
    at = blocks.at.removesuffix(".*")
    children = [f"{at}.{name}" for name, _ in model.get_submodule(at).named_children()]
    if [call.name for call in calls] != children:
        return "not each block runs once in its place"
    streams = {stream.over for stream in blocks.streams.values() if not isinstance(stream, Counted)}
    for one, other in itertools.pairwise(calls):
        given = tensors(other.args)
        fed = {
            stream.over
            for stream, value in zip(blocks.outputs, one.outs, strict=True)
            if not isinstance(stream, Same) and value is not None
            if any(t.shape == value.shape and torch.equal(t, value) for t in given)
        }
        if not streams <= fed:
            return "tokens are changed in between"
    produced = {live for call in calls[:-1] for live in call.out_live}

    def inside(call: Call | None) -> bool:
        return call is not None and any(call.within(block) for block in calls)

    for call in runs.base.calls:
        if calls[0].end < call.begin < calls[-1].begin and not inside(call) and call.live & produced:
            return f"{call.name} sees tokens in between"
    for use in runs.base.uses:
        if calls[0].end <= use.clock < calls[-1].begin and not inside(use.inside) and use.used & produced:
            return f"the model's own code sees tokens in between ({use.name})"
    earlier: set[int] = set()
    for one, other in itertools.pairwise(calls):
        if other.live & (earlier - set(one.out_live)):
            return "blocks are given tokens of earlier ones"
        earlier |= set(one.out_live)
    return ""
