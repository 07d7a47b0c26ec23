"""Chooses among what a list of blocks may do with its tokens, by replaying blocks on a part of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..cuts import Split
from ..plan import Blocks, Whole
from .guess import Chosen, Guess, Key
from .lengths import Lengths, Runs, varies
from .replay import Replay, Verdict, random_call
from .trace import Call
from .values import Refused, never

SIZES = (2, 3)
"""Numbers of ranks in the search."""
MORE_SIZES = (2, 3, 5)
"""Those of the last check: a boundary inside a sequence must have been inside a rank's part once."""
TRIALS = 120
"""Sets of choices that are tried between two changes of what is asked of them."""
ROUNDS = 8
"""How often a choice that does not hold for more may be looked for again, or another module be given all tokens."""


class Search:
    """The search for one list of blocks.

    Args:
        tick: called before each replay; what it raises ends the search.

    Attributes:
        notes: what its answer does not cover.
    """

    def __init__(
        self, model: nn.Module, runs: Runs, lengths: Lengths, guess: Guess, *, tick: Callable[[], None] = never
    ) -> None:
        self._tick = tick
        self._model, self._runs, self._lengths, self._guess = model, runs, lengths, guess
        self._sizes: Sequence[int] = SIZES
        self._trials = 0
        self.notes: list[str] = []
        self._cases = list(guess.kinds)
        for call in guess.kinds:
            other = random_call(model, call)
            if other is None:
                self.notes.append(f"{call.name} was not tried with random arguments")
            else:
                self._cases.append(other)

    def run(self) -> tuple[Blocks, tuple[Whole, ...]]:
        """Blocks as a plan says them, and the modules in them that get all tokens.

        Raises:
            Refused: nothing passes; the message is the first check that fails with the best of the choices.
        """
        choices = self._guess.choices()
        wholes: tuple[Whole, ...] = ()
        others = self._others()
        why = ""
        for _ in range(ROUNDS):
            chosen, verdict = self._climb(choices, wholes)
            why = verdict.failed
            if why:
                more = self._culprit(chosen, wholes)
                wholes = (*wholes, more)
                # its own attention needs no site
                inside = more.at.split("*.", 1)[1]
                choices = {key: options for key, options in choices.items() if not _below(key, inside)}
                continue
            final = self._judge(chosen, wholes, others, sizes=MORE_SIZES)
            why = final.failed
            if not why:
                return self._fewest(choices, chosen, wholes, others), wholes
            # what it does not hold for is asked of the next ones
            if final.call is not None and all(final.call is not case for case in self._cases):
                self._cases.append(final.call)
            elif self._sizes != MORE_SIZES:
                self._sizes = MORE_SIZES
            else:
                break
        raise Refused(why)

    def _others(self) -> list[Call]:
        """What a choice must hold for in the end: every block, other lengths, and random values with these."""
        keys = {call.key for call in self._guess.kinds}
        longer = [call for run in self._runs.longer for call in run.calls if call.key in keys]
        random = [random_call(self._model, call) for call in longer]
        return [*self._guess.calls, *longer, *(call for call in random if call is not None)]

    def _fewest(
        self, choices: dict[Key, list[object]], chosen: Chosen, wholes: tuple[Whole, ...], others: list[Call]
    ) -> Blocks:
        """The plan's entry without what need not be cut."""
        for key, options in choices.items():
            if None in options and chosen[key] is not None:
                trial = {**chosen, key: None}
                if not self._judge(trial, wholes, [*self._cases, *others], sizes=MORE_SIZES).failed:
                    chosen = trial
        return self._guess.build(chosen)

    def _judge(
        self,
        chosen: Chosen,
        wholes: tuple[Whole, ...],
        calls: Sequence[Call],
        *,
        sizes: Sequence[int] = (),
        locate: bool = False,
    ) -> Verdict:
        """Replay calls on every rank of some numbers of ranks."""
        verdict = Verdict()
        self._trials += 1
        blocks = self._guess.build(chosen)
        for call in calls:
            if wholes and call.slim:
                # a replay gives such modules what was recorded for them; the proof runs this block as well
                continue
            verdict.call = call
            self._tick()
            try:
                replay = Replay(self._model, call, blocks, wholes, locate=locate)
            except KeyError as error:
                # a block of another kind than the first
                verdict.failed = f"{call.name} has no module {error}"
                return verdict
            for size in sizes or self._sizes:
                for rank in range(size):
                    replay.run(rank, size, verdict)
                    if verdict.failed:
                        return verdict
        return verdict

    def _climb(self, choices: dict[Key, list[object]], wholes: tuple[Whole, ...]) -> tuple[Chosen, Verdict]:
        """Change one choice at a time, or two, as long as replays come further."""
        start = self._trials
        chosen: Chosen = {key: options[0] for key, options in choices.items()}
        best = self._judge(chosen, wholes, self._cases)
        better = True
        while best.failed and better and self._trials - start < TRIALS:
            better = False
            singles = [{key: o} for key, options in choices.items() for o in options if o is not chosen[key]]
            pairs = ({**a, **b} for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys())
            for change in itertools.chain(singles, pairs):
                if self._trials - start >= TRIALS:
                    break
                trial = {**chosen, **change}
                verdict = self._judge(trial, wholes, self._cases)
                if not verdict.failed or verdict.held > best.held:
                    chosen, best, better = trial, verdict, True
                    break
        return chosen, best

    def _culprit(self, chosen: Chosen, wholes: tuple[Whole, ...]) -> Whole:
        """The module to give all tokens to: the innermost whose result is wrong, or that raises.

        Raises:
            Refused: there is none that a plan can give them to.
        """
        verdict = self._judge(chosen, wholes, self._cases, locate=True)
        block = next((call for call in self._guess.kinds if verdict.module.startswith(f"{call.name}.")), None)
        known = {whole.at for whole in wholes}
        name = verdict.module
        # outwards until a module has a stream for an argument and as many tokens in its one output
        while block is not None and name != block.name:
            at = f"{self._guess.at}.*.{name[len(block.name) + 1 :]}"
            call = next((c for c in self._runs.base.calls if c.name == name and c.within(block)), None)
            found = None if call is None or at in known else self._whole(at, call)
            if found is not None:
                return found
            name = name.rpartition(".")[0]
        raise Refused(verdict.failed or f"{self._guess.at}: no choice holds")

    def _whole(self, at: str, call: Call) -> Whole | None:
        """Give this module all tokens, by the argument that has as many as its output."""
        if not isinstance(call.out, torch.Tensor):
            return None
        out = self._lengths.tensors_of(call, "out")[()]
        for path, lengths in self._lengths.tensors_of(call).items():
            for dim, length in enumerate(lengths if len(path) == 1 and isinstance(path[0], str) else ()):
                orders = self._guess.orders(length)
                if varies(length) and orders and dim < len(out) and out[dim] == length:
                    return Whole(at, path[0], Split(dim, *orders[0]))
        return None


def _below(key: Key, inside: str) -> bool:
    kind, path = key
    return kind == "site" and (path == inside or str(path).startswith(f"{inside}."))
