"""Any bytes whatever: a header is refused with a LoadError, or all of it holds."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from comfy_raylight.loaders.header import Header
from comfy_raylight.raylight.errors import LoadError
from gguf import GGUFReader
from safetensors import safe_open

from .header_files import Reads, Scratch, must_hold
from .header_mutants import gguf_mutants, safetensors_mutants

MUTANTS = 20_000
"""Different files per format."""
TRIES = 30_000
COMPARED = 2_000
"""Accepted files that safetensors' own reader reads as well."""
COMPARED_GGUF = 500
"""And the gguf package's, which takes ten times as long."""
SEED = 7


@dataclass
class Outcome:
    """What became of the mutants: how many there were, how many were accepted, and which checks refused how many."""

    different: set[int] = field(default_factory=set)
    accepted: int = 0
    refused: Counter[tuple[str, int]] = field(default_factory=Counter)


def run(mutants: Iterator[bytes], name: str, scratch: Scratch, reads: Reads, outcome: Outcome) -> Iterator[Header]:
    """Read each mutant once; gives the headers that were accepted, while the file is there."""
    for blob in islice(mutants, TRIES):
        if len(outcome.different) == MUTANTS:
            return
        if hash(blob) in outcome.different:
            continue
        outcome.different.add(hash(blob))
        reads.ranges.clear()
        try:
            header = scratch.read(blob, name)
        except LoadError as error:
            assert name in error.what and error.why and error.remedy
            assert len(str(error)) < 5000
            outcome.refused[_place(error)] += 1
        else:
            must_hold(header, len(blob))
            outcome.accepted += 1
            yield header
        # the beginning is read twice: to tell the format, and as the header's
        assert reads.end <= len(blob) and reads.total <= reads.end + 8


def _place(error: LoadError) -> tuple[str, int]:
    """Module and line that raised it."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return os.path.basename(trace.tb_frame.f_code.co_filename), trace.tb_lineno


def test_safetensors(scratch: Scratch, reads: Reads) -> None:
    outcome = Outcome()
    compared = 0
    for header in run(safetensors_mutants(random.Random(SEED)), "model.safetensors", scratch, reads, outcome):
        if compared == COMPARED:
            continue
        compared += 1
        with safe_open(scratch.path, "pt") as theirs:
            assert set(theirs.keys()) == header.entries.keys()
            assert (theirs.metadata() or {}) == header.metadata
            for name, entry in header.entries.items():
                value = theirs.get_tensor(name)
                assert (value.dtype, tuple(value.shape)) == (entry.dtype, entry.shape)
    assert len(outcome.different) >= MUTANTS
    assert compared >= COMPARED
    assert sum(outcome.refused.values()) >= MUTANTS // 4
    assert len(outcome.refused) >= 15, outcome.refused


def test_gguf(scratch: Scratch, reads: Reads) -> None:
    outcome = Outcome()
    compared = 0
    for header in run(gguf_mutants(random.Random(SEED)), "model.gguf", scratch, reads, outcome):
        if compared == COMPARED_GGUF:
            continue
        compared += 1
        theirs = {each.name: each for each in GGUFReader(scratch.path).tensors}
        assert theirs.keys() == header.entries.keys()
        for name, entry in header.entries.items():
            assert (theirs[name].data_offset, theirs[name].n_bytes) == (entry.start, entry.nbytes)
    assert len(outcome.different) >= MUTANTS
    assert compared >= COMPARED_GGUF
    assert sum(outcome.refused.values()) >= MUTANTS // 4
    assert len(outcome.refused) >= 20, outcome.refused
