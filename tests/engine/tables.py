"""The tables of model families, from the registry, the parity cases and their results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_raylight.patches.registry import FAMILIES, UNSPLIT
from comfy_raylight.tests.host import documents

from . import residency_ranks, unplanned, verdicts
from .families import CASES
from .meshes import MESHES

BEGIN, END = "<!-- families: written by the tests -->\n", "<!-- end of families -->\n"


def readme_table() -> str:
    """What is split, by a plan that is written or found, with how many comparisons; what is not, and why."""
    lines = [
        "| models | ComfyUI's class | plan | Ulysses, ring | CFG, data parallel | compared with plain |",
        "|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        cases = [case for case in CASES if case.family == name and not (case.wrong or case.raises)]
        runs = sum(len(case.meshes or MESHES) for case in cases)
        shared = f"yes, but {family.limit}" if family.limit else "yes"
        shared = f"{family.divided}: {shared}" if family.divided else shared
        lines.append(f"| {family.models} | `{name}` | written | {shared} | yes | {len(cases)} cases, {runs} runs |")
    for name, (models, share) in unplanned.MODELS.items():
        cases = [case for case in unplanned.CASES if case.family == name]
        shared = f"no: {unplanned.FIXED[name]}" if name in unplanned.FIXED else f"yes, {share} % of a step"
        plan, told = ("", "") if name in unplanned.FIXED else ("found", f"{len(cases)} cases")
        lines.append(f"| {models} | `{name}` | {plan} | {shared} | yes | {told} |")
    lines += [f"| | `{name}` | | no: {reason} | yes | |" for name, reason in UNSPLIT.items()]
    return "\n".join(lines) + "\n"


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


def _rounded_up(error: float) -> str:
    """One significant digit, so that another machine seldom changes the table."""
    if error == 0:
        return "0"
    scale = 10 ** math.floor(math.log10(error))
    return f"{math.ceil(error / scale) * scale:.0e}"
