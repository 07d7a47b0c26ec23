"""Each VAE in strips on two ranks against one process: `python -m compat.vaes ROOT ROWS PATTERN ...`."""

from __future__ import annotations

import ast
import functools
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from comfy_raylight.tests.decode.families import FAMILIES, TILED, Family
from comfy_raylight.tests.decode.ranks import Prepared, seeded, strips_job, tiled, tiles_job, walk
from comfy_raylight.tests.engine.ranks import enter_comfy, fork
from comfy_raylight.vae import budget

from . import forks
from .rows import Row, chosen, short, write, wrong

PART = "VAEs"
SIZE, ROWS = 2, 5
"""Ranks, and rows of the latent: uneven."""
CLOSE = 1e-5
VAE_S = 120
"""Seconds for one VAE."""


def classes_of(root: Path) -> dict[str, str]:
    """VAE classes that a ComfyUI's comfy/sd.py makes, with their modules."""
    tree = ast.parse((root / "comfy" / "sd.py").read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if any(ast.unparse(target) == "self.first_stage_model" for target in node.targets):
                module, _, name = ast.unparse(node.value.func).rpartition(".")
                found[name] = module
    found.pop("eval", None)
    return found


def vae(family: Family) -> tuple[str, float, str]:
    """Name of the class, the largest error, and what is wrong beside that."""
    with torch.inference_mode():
        one = Prepared(family, {ROWS})
        whole = None
        if family.name in TILED:
            x, arguments = tiled(one)
            whole = walk(x, seeded(one.model.decode), arguments, "cpu")
    tables = list(fork(SIZE, strips_job, [one], (ROWS,)).values())
    broken = [table for table in tables if not isinstance(table, dict)]
    if broken:
        return type(one.model).__name__, 0.0, broken[0]
    errors = [value for table in tables for check, value in table.items() if check.endswith(" rows")]
    problem = "" if all(table[f"{family.name}, as before"] for table in tables) else "the model is not left as it was"
    if whole is not None:
        ranks: Any = fork(SIZE, tiles_job, [one], [whole])[0]
        same = isinstance(ranks, dict) and ranks[f"{family.name}, same bits"]
        problem = problem or ("" if same else f"tiles: {ranks if isinstance(ranks, str) else 'other bits'}")
    return type(one.model).__name__, max(errors), problem


def row_of(name: str, ended: forks.Ended) -> Row:
    """What is told of a VAE."""
    if ended.problem:
        return wrong(PART, name, ended.problem)
    _, error, problem = ended.value
    if problem:
        refused = "UnsupportedError" in problem
        detail = short(problem)
        return Row(part=PART, name=name, state="refused" if refused else "wrong", detail=detail, fault=True)
    if not error <= CLOSE:
        return wrong(PART, name, f"strips are off by {error:.1e}")
    return Row(part=PART, name=name, state="right", detail=f"at most {error:.0e} off")


def main(root: str, out: str, *patterns: str) -> None:
    """Write a row for each VAE."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    enter_comfy(root)
    newest = importlib.import_module("comfy.ldm.lightricks.vae.causal_video_autoencoder")
    importlib.import_module("comfy_raylight.workers.worker.vae.loading")  # once, and not in every process
    newer = hasattr(newest, budget.NAME)
    path = Path(out)
    wanted = [each for each in FAMILIES if chosen(patterns, PART, each.name)]
    for each in wanted:
        if each.newer and not newer:
            write(path, Row(part=PART, name=each.name, state="absent"))
    jobs = {each.name: functools.partial(vae, each) for each in wanted if newer or not each.newer}
    compared = set()
    for name, ended in forks.run(jobs, seconds=VAE_S, at_once=max(1, (os.cpu_count() or 2) // 2)):
        compared.add(ended.value[0] if not ended.problem else "")
        write(path, row_of(name, ended))
    if len(wanted) < len(FAMILIES):
        return  # what is not compared is known of all of them alone
    for name, module in sorted(classes_of(Path(root)).items()):
        if name not in compared:
            detail = f"{module}: nothing compares it; the Ray VAE nodes test it when it is loaded".lstrip(": ")
            write(path, Row(part=PART, name=name, state="new", detail=detail))


if __name__ == "__main__":
    main(*sys.argv[1:])
