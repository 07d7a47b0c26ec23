"""Ranks that stay in step whatever goes wrong in a part of their work: after each part all know how it went on all."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import threading
import traceback
from collections.abc import Callable
from typing import Any

from comfy_raylight.raylight.mesh import Mesh

WAIT_S = 180.0
"""A rank may wait for another as long as a few collectives do before they give up."""
BROKE = -1
"""What a rank says instead of a number of collectives."""


class OutOfStepError(RuntimeError):
    """A rank is gone or does not answer: nothing can be run on these ranks any more."""


class Agreement:
    """How each rank fared in the last part, in memory that all share: it outlives a mesh that broke.

    Made before the ranks are forked.
    """

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("fork")
        # two, by turns: a fast rank must not write over what a slow one still reads
        self._said = [context.RawArray("q", size) for _ in range(2)]
        self._barrier = context.Barrier(size)
        self._turn = 0

    def on_all(self, rank: int, said: int) -> list[int]:
        """What every rank says; all must ask.

        Raises:
            OutOfStepError: one did not ask in time, or has left.
        """
        told = self._said[self._turn]
        self._turn = 1 - self._turn
        told[rank] = said
        try:
            self._barrier.wait(WAIT_S)
        except threading.BrokenBarrierError:
            raise OutOfStepError(f"another rank than {rank} ended, or did not come within {WAIT_S:.0f} s") from None
        return list(told)

    def leave(self) -> None:
        """Tell those that ask, now or later, that this will be no agreement any more."""
        self._barrier.abort()


class Parts:
    """Runs parts of a rank's work on a mesh, which is made anew where a part went wrong on any rank.

    Args:
        make: makes the mesh; the number says which one, since two must not meet in one file.
    """

    def __init__(self, make: Callable[[int], Mesh], *, rank: int, agreement: Agreement) -> None:
        self._make = make
        self._rank = rank
        self._agreement = agreement
        self._made = 0
        self._mesh: Mesh | None = None
        self._renew()

    def run(self, part: Callable[[Mesh], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """What a part returns here, and whether all ranks came through it with equal numbers of collectives.

        Of one that raised it is "raised", "text" and, as a traceback, "broke". "broke" and "lost" is all there is of a
        part in which a rank was lost, and of those that come later, which are not run.
        """
        if self._mesh is None:
            return {"broke": "not run, since the ranks got out of step before", "lost": True}, False
        before = self._mesh.collectives
        try:
            result = part(self._mesh)
            said = self._mesh.collectives - before
        except Exception as error:
            said = BROKE
            result = {"raised": type(error).__name__, "text": str(error), "broke": traceback.format_exc()}
        if said == BROKE:
            # ranks that wait for this one in a collective hear of it now, and not when that times out
            self._drop()
        try:
            told = self._agreement.on_all(self._rank, said)
            in_step = said != BROKE and len(set(told)) == 1
            if not in_step:
                self._renew()
        except OutOfStepError as error:
            self._drop()
            return {"broke": f"the ranks got out of step: {error}", "lost": True}, False
        return result, in_step

    def close(self) -> None:
        """Leave the mesh when all have come here: one that left early would break what others still exchange."""
        if self._mesh is not None:
            # nothing is run after this: a rank that is lost now takes nothing along
            with contextlib.suppress(OutOfStepError):
                self._agreement.on_all(self._rank, 0)
            self._drop()

    def _renew(self) -> None:
        self._drop()
        try:
            self._mesh = self._make(self._made)
        except Exception as error:
            self._agreement.leave()
            raise OutOfStepError(f"no mesh: {error}") from error
        self._made += 1
        # one that fails at once must not break connections that others still make
        self._agreement.on_all(self._rank, 0)

    def _drop(self) -> None:
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None
            # connections end with the groups, which what was raised may still hold
            gc.collect()
