"""Each family on several ranks against one process: `python -m compat.engine ROOT ROWS PATTERN ...`.

A family is one forked process, which builds its models and forks their ranks; a case that fails leaves the others.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_raylight.patches.registry import FAMILIES, UNSPLIT
from comfy_raylight.tests.engine import found_ranks, unplanned, verdicts
from comfy_raylight.tests.engine.case import TOLERANCE, Case
from comfy_raylight.tests.engine.families import CASES
from comfy_raylight.tests.engine.in_step import Agreement
from comfy_raylight.tests.engine.meshes import MESHES
from comfy_raylight.tests.engine.ranks import SWITCHES, enter_comfy, fork, parity, prepare

from . import forks
from .rows import Row, chosen, short, write, wrong

PART = "families"
CHOSEN = ("u2", "r2")
"""Meshes that a case runs on, or the first of its own where it has neither."""
UNPLANNED = {
    name: [case for case in unplanned.CASES if case.family == name]
    for name in dict.fromkeys(case.family for case in unplanned.CASES)
}
"""Cases of the classes that have no written plan."""
REFUSALS = ("UnsupportedError", "MisfitError", "PlanError")
FAMILY_S = 300
"""Seconds for one family: the largest takes half a minute on two idle cores."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of a family's cases.

    Attributes:
        cases: how many there are for this ComfyUI.
        errors: of all runs that were right.
        wrong: what was wrong, by case.
        refused: what was refused though it should not have been, by case.
    """

    cases: int
    errors: list[float]
    wrong: dict[str, str]
    refused: dict[str, str]


def classes_of(root: Path) -> dict[str, str]:
    """Diffusion-model classes that a ComfyUI's comfy/model_base.py names, with their modules."""
    tree = ast.parse((root / "comfy" / "model_base.py").read_text(encoding="utf-8"))
    named = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "unet_model":
            named.append(node.value)
        elif isinstance(node, ast.FunctionDef):
            arguments = node.args.args[len(node.args.args) - len(node.args.defaults) :]
            pairs = zip(arguments, node.args.defaults, strict=True)
            named += [value for argument, value in pairs if argument.arg == "unet_model"]
    found = [ast.unparse(value).rpartition(".") for value in named]
    return {name: module for module, _, name in found if name != "unet_model"}


def rows_of_classes(known: Mapping[str, str]) -> list[Row]:
    """The classes of a ComfyUI that no case is for: refused ones, and those that the pack has never heard of."""
    rows = [
        Row(part=PART, name=name, state="refused", detail=reason) for name, reason in UNSPLIT.items() if name in known
    ]
    for name, module in sorted(known.items()):
        if name not in FAMILIES and name not in UNSPLIT and name not in UNPLANNED:
            detail = f"{module}: no plan: the workers look for one before its first use, prove it, or refuse it"
            rows.append(Row(part=PART, name=name, state="new", detail=detail))
    return rows


def meshes_of(case: Case) -> tuple[str, ...]:
    own = case.meshes or CHOSEN
    return tuple(name for name in CHOSEN if name in own) or own[:1]


def family(cases: Sequence[Case]) -> Found:
    """Run a family's cases."""
    prepared, report = prepare(cases)
    found = Found(len(cases) - len(report["absent"]), [], {}, {})
    found.wrong.update({name: f"cannot be built: {verdicts.last_line(why)}" for name, why in report["unbuilt"].items()})
    report["ranks"] = {}
    for name in MESHES:
        together([each for each in prepared if name in meshes_of(each[0])], name, report, found)
    return found


def together(prepared: list[Any], mesh: str, report: dict[str, Any], found: Found) -> None:
    """Run prepared cases on a mesh; those that were not run, since its ranks were lost in one, again without it."""
    if not prepared:
        return
    ulysses, ring = MESHES[mesh]
    job = functools.partial(parity, name=mesh, prepared=prepared)
    report["ranks"][mesh] = fork(ulysses * ring, job, agreement=Agreement(ulysses * ring))
    tables = verdicts.tables_of(report["ranks"][mesh])
    lost = [each for each in prepared if not tables or any(_lost(table[each[0].name]) for table in tables)]
    if len(prepared) == 1:
        lost = []
    for each in prepared:
        if not any(each is one for one in lost):
            judge(each[0], mesh, report, found)
    for part in [[each] for each in lost] if len(lost) == len(prepared) else [lost]:
        together(part, mesh, report, found)


def _lost(modes: Mapping[str, Any]) -> bool:
    return any("lost" in result for result in modes.values())


def judge(case: Case, mesh: str, report: Mapping[str, Any], found: Found) -> None:
    """Add what came of a case on a mesh to what was found."""
    tables = verdicts.tables_of(report["ranks"][mesh])
    results = [result for table in tables for result in table[case.name].values()]
    why = verdicts.wrong(case, mesh, report) or verdicts.apart(case, mesh, report)
    refusals = [result["text"] for result in results if "broke" in result and result.get("raised") in REFUSALS]
    if refusals:
        found.refused[case.name] = f"on {mesh}: {refusals[0]}"
    elif why:
        found.wrong[case.name] = f"on {mesh}: {verdicts.last_line(why)}"
    else:
        found.errors.extend(result["error"] for result in tables[0][case.name].values() if "error" in result)


def found(cases: Sequence[Case]) -> Found:
    """Run the cases of a class that has no written plan, as workers do that are given none."""
    result = Found(0, [], {}, {})
    for case in (case for case in cases if case.available()):
        result = dataclasses.replace(result, cases=result.cases + 1)
        entry = found_ranks.examine(case)
        if "refused" in entry:
            result.refused[case.name] = entry["refused"]
            continue
        ranks = fork(2, found_ranks.on_gloo, {case.name: entry["run"]})
        tables = [table[case.name] if isinstance(table, dict) else {} for table in ranks.values()]
        errors = [max(table["error"], table["worker"]["error"]) for table in tables if "worker" in table]
        if len(errors) < len(tables) or max(errors) > TOLERANCE:
            result.wrong[case.name] = f"{max(errors, default=0.0):.0e} off: {ranks}"
        else:
            result.errors.extend(errors)
    return result


def row_of_found(name: str, ended: forks.Ended) -> Row:
    """What is told of a class that has no written plan."""
    row = row_of(name, ended)
    if row.state != "right":
        return row
    worst = max(ended.value.errors, default=0.0)
    return dataclasses.replace(row, state="found", detail=f"{ended.value.cases} cases, at most {worst:.0e} off")


def row_of(name: str, ended: forks.Ended) -> Row:
    """What is told of a family."""
    if ended.problem:
        return wrong(PART, name, ended.problem)
    found: Found = ended.value
    if not found.cases:
        return Row(part=PART, name=name, state="absent")
    faults = {**found.refused, **found.wrong}
    if not faults:
        worst = max(found.errors, default=0.0)
        detail = f"{found.cases} cases, {len(found.errors)} runs, at most {worst:.0e} off"
        return Row(part=PART, name=name, state="right", detail=detail)
    # a wrong result counts for more than a refusal
    first, why = next(iter((found.wrong or found.refused).items()))
    detail = short(f"{len(faults)} of {found.cases} cases; {first} {why}")
    return Row(part=PART, name=name, state="wrong" if found.wrong else "refused", detail=detail, fault=True)


def main(root: str, out: str, *patterns: str) -> None:
    """Write a row for each family."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    enter_comfy(root)
    # all of it, as in ComfyUI: some of its modules count on what others have imported
    importlib.import_module("comfy.sd")
    path = Path(out)
    for row in rows_of_classes(classes_of(Path(root))):
        if chosen(patterns, PART, row.name):
            write(path, row)
    by_family: dict[str, list[Case]] = {}
    for case in CASES:
        if not (case.wrong or case.half) and chosen(patterns, PART, case.family):
            # where tokens are cut; the switches of an exchange do not depend on ComfyUI
            modes = tuple(mode for mode in case.modes if mode not in SWITCHES) or case.modes[:1]
            by_family.setdefault(case.family, []).append(dataclasses.replace(case, modes=modes))
    unwritten = {name: cases for name, cases in UNPLANNED.items() if chosen(patterns, PART, name)}
    jobs = {name: functools.partial(family, cases) for name, cases in by_family.items()}
    jobs |= {name: functools.partial(found, cases) for name, cases in unwritten.items()}
    # each family runs two ranks
    for name, ended in forks.run(jobs, seconds=FAMILY_S, at_once=max(1, (os.cpu_count() or 2) // 2)):
        write(path, row_of_found(name, ended) if name in unwritten else row_of(name, ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
