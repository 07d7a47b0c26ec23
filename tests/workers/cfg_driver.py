"""Samples on a pool of two cfg groups and on the plain model, and writes down how they differ and who did what.

    cfg_driver.py COMFY_ROOT OUT.json FAMILY=CHECKPOINT:WORKERS ...

One process: the driver's. With four workers each group is two, by Ulysses.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "workers" / "import_root"))

from comfy_raylight.tests.sweep.sweep import boot, difference
from comfy_raylight.tests.workers.cfg_bench import GROUPS, Bench
from comfy_raylight.tests.workers.cfg_checks import CHECKS, Check
from comfy_raylight.tests.workers.cfg_facts import FACTS, Fact

CHECK_LIMIT_S = 200
"""After so long with one check this process shows its stacks and ends."""


def run(bench: Bench, function: Check) -> dict[str, Any]:
    """One check on both models, and what each group did for the pool's."""
    result: dict[str, Any] = {}
    pictures: list[torch.Tensor] = []
    for name, model in (("plain", bench.plain), ("pool", bench.far)):
        before = bench.calls()
        try:
            pictures.append(function(bench, model))
        except Exception as error:
            logging.exception("%s of the %s model", function.__name__, name)
            result[name] = f"{type(error).__name__}: {error}"
    result["calls"] = [now - then for now, then in zip(bench.calls(), before, strict=True)]
    if len(pictures) == 2:
        result["difference"] = difference(pictures[1], pictures[0])
        result["finite"] = bool(pictures[0].isfinite().all())
    return result


def state(bench: Bench, function: Fact) -> dict[str, Any]:
    """One fact."""
    try:
        function(bench)
    except Exception as error:
        logging.exception("%s", function.__name__)
        return {"pool": f"{type(error).__name__}: {error}"}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("comfy", type=Path, help="root of a ComfyUI")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("settings", nargs="+", metavar="FAMILY=CHECKPOINT:WORKERS")
    parser.add_argument("--only", default="", metavar="TEXT", help="only checks with this in their names")
    options = parser.parse_args()
    out = options.out.resolve()
    given = [
        (family, Path(rest.rpartition(":")[0]).resolve(), int(rest.rpartition(":")[2]))
        for family, _, rest in (word.partition("=") for word in options.settings)
    ]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    boot(options.comfy.resolve(), GROUPS)

    from comfy_raylight.workers.pool.pool import close_all

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for family, file, workers in given:
                setting = f"{family}:{workers}"
                faulthandler.dump_traceback_later(CHECK_LIMIT_S, exit=True)
                bench = Bench(family, file, workers, Path(tempfile.mkdtemp(dir=folder)))
                chosen: dict[str, Callable[[], dict[str, Any]]] = {
                    **{name: partial(run, bench, check) for name, (check, on, _) in CHECKS.items() if setting in on},
                    **{name: partial(state, bench, fact) for name, (fact, on) in FACTS.items() if setting in on},
                }
                for name, judge in chosen.items():
                    if options.only not in name:
                        continue
                    faulthandler.dump_traceback_later(CHECK_LIMIT_S, exit=True)
                    result = judge()
                    result["afterwards"] = difference(bench.picture(bench.far), bench.first)
                    sys.stderr.write(f"{setting} {name}: {result}\n")
                    results[f"{setting} {name}"] = result
        finally:
            faulthandler.cancel_dump_traceback_later()
            close_all()
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
