"""The tables of model families, from the registry, the parity cases and their results."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_raylight.patches.registry import FAMILIES, UNSPLIT
from comfy_raylight.tests.host import documents

from . import residency_ranks, unplanned, verdicts
from .families import CASES
from .meshes import MESHES

BEGIN, END = "<!-- families: written by the tests -->\n", "<!-- end of families -->\n"
MARKS = "¹²³⁴"
REFUSED: Mapping[str, str] = {
    "StageB": "Stable Cascade",
    "StageC": "Stable Cascade",
    "ACEStepTransformer2DModel": "ACE-Step 1",
    "CausalWanModel": "causal Wan",
    "WanAnimate2Model": "Wan Animate 2",
    "NaDiT": "SeedVR2",
    "HiDreamO1Transformer": "HiDream O1",
    "Trellis2": "Trellis 2",
}
"""What users know the classes by that no plan can share."""


def readme_table() -> str:
    """What is shared by a written plan, with how many comparisons; what by one that is found, and what not at all."""
    lines = ["| models | ComfyUI's class | cases/runs |", "|---|---|---|"]
    notes: list[str] = []
    for name, family in FAMILIES.items():
        cases = [case for case in CASES if case.family == name and not (case.wrong or case.raises)]
        runs = sum(len(case.meshes or MESHES) for case in cases)
        note = family.limit or (f"the workers divide the {family.divided} of the picture" if family.divided else "")
        if note and note not in notes:
            notes.append(note)
        mark = f" {MARKS[notes.index(note)]}" if note else ""
        lines.append(f"| {family.models}{mark} | `{name}` | {len(cases)}/{runs} |")
    lines += ["", *_wrapped(" ".join(f"{MARKS[number]} {_sentence(note)}" for number, note in enumerate(notes)))]
    found = [
        f"{models} (`{name}`, {share} %, {sum(case.family == name for case in unplanned.CASES)})"
        for name, (models, share) in unplanned.MODELS.items()
        if name not in unplanned.FIXED
    ]
    lines += ["", *_sentences("Plans are found for these (how much of a step they share, cases):", found)]
    lines += ["", *_sentences("Refused, each for [a reason](docs/families.md#refused):", _refused())]
    return "\n".join(lines) + "\n"


def reasons() -> str:
    """Why the workers do not share some classes."""
    every = {**unplanned.FIXED, **UNSPLIT}
    entries = (f"- `{name}` ({_known_as(name)}): {reason}." for name, reason in every.items())
    return "\n".join(line for entry in entries for line in _wrapped(entry, indent="  ")) + "\n"


def with_table(text: str, table: str) -> str:
    """The README with the table between its marks replaced."""
    return documents.with_table(text, BEGIN, END, table)


def error_table(results: Mapping[str, Any]) -> str:
    """Worst error of each family, relative to the maximum of the output, by mesh.

    Args:
        results: of `ranks.main`, for one ComfyUI.
    """
    lines = [f"| class | {' | '.join(MESHES)} |", "|---" * (len(MESHES) + 1) + "|"]
    for name in FAMILIES:
        cases = [case for case in CASES if case.family == name and not (case.wrong or case.raises or case.half)]
        cells = []
        for mesh in MESHES:
            (table, *_) = verdicts.tables_of(results["ranks"][mesh])
            errors = [r["error"] for c in cases for r in table.get(c.name, {}).values() if "error" in r]
            cells.append(_rounded_up(max(errors)) if errors else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def residency_table(results: Mapping[str, Any]) -> str:
    """Calls of each family with divided weights that gave the resident model's bits, by mesh: sharded and streamed.

    Args:
        results: of `residency_ranks.main`, for one ComfyUI.
    """
    meshes = residency_ranks.MESHES
    lines = [f"| class | {' | '.join(meshes)} |", "|---" * (len(meshes) + 1) + "|"]
    for name in FAMILIES:
        cells = []
        for mesh in meshes:
            ranks = list(results[mesh].values())
            found = [rank[case.name] for rank in ranks for case in CASES if case.family == name and case.name in rank]
            calls = [
                sum(sum(run["equal"]) for runs in found for title, run in runs.items() if kind in title)
                for kind in residency_ranks.KINDS
            ]
            cells.append(" + ".join(map(str, calls)) if found else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _refused() -> list[str]:
    """Models with their classes."""
    classes: dict[str, list[str]] = {}
    for name in (*unplanned.FIXED, *UNSPLIT):
        classes.setdefault(_known_as(name), []).append(f"`{name}`")
    return [f"{models} ({', '.join(names)})" for models, names in classes.items()]


def _known_as(name: str) -> str:
    return REFUSED[name] if name in REFUSED else unplanned.MODELS[name][0]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _sentences(opening: str, entries: Sequence[str]) -> list[str]:
    """A list as a sentence."""
    return _wrapped(f"{opening} {', '.join(entries)}.")


def _wrapped(text: str, *, indent: str = "") -> list[str]:
    """Lines as long as those of the documents."""
    return textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _rounded_up(error: float) -> str:
    """One significant digit, so that another machine seldom changes the table."""
    if error == 0:
        return "0"
    scale = 10 ** math.floor(math.log10(error))
    return f"{math.ceil(error / scale) * scale:.0e}"
