"""The command of `checkpoints`, run by its folder: it needs a `sys.path` of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]


def main() -> None:
    """Write every checkpoint asked for and say what each is."""
    sys.path.append(str(TESTS))
    from host.checkpoints import Job
    from host.checkpoints.controls import SCHEMES
    from host.checkpoints.recipes import RECIPES

    def job(words: Sequence[str]) -> Job:
        if len(words) < 2 or any("=" not in word for word in words[2:]):
            parser.error(f"--make needs FAMILY FILE [NAME=VALUE ...], not {' '.join(words)}")
        family, path, *options = words
        given = dict(option.split("=", 1) for option in options)
        dtype, seed = given.pop("dtype", ""), int(given.pop("seed", "0"))
        layout = given.pop("layout", "")
        like = SCHEMES.get(family, family)
        if family not in {*RECIPES, *SCHEMES}:
            parser.error(f"no family {family}, only {', '.join([*RECIPES, *SCHEMES])}")
        sizes = RECIPES[like].size if like else {}
        if unknown := given.keys() - sizes.keys():
            parser.error(f"{family} has no size {', '.join(unknown)}, only {', '.join(sizes)}")
        numbers = {name: int(value) for name, value in given.items()}
        return Job(family=family, path=Path(path), dtype=dtype, seed=seed, size=numbers, layout=layout)

    parser = argparse.ArgumentParser(description="Write small checkpoints that a ComfyUI detects.")
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    families = ", ".join([*RECIPES, *SCHEMES])
    help_make = (
        f"FAMILY FILE [NAME=VALUE ...]: one of {families}; the file; dtype, seed, layout and sizes; may be repeated"
    )
    parser.add_argument("--make", nargs="+", action="append", required=True, metavar="WORD", help=help_make)
    options = parser.parse_args()
    jobs = [job(words) for words in options.make]

    sys.path[0] = str(options.comfy.resolve())
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from host.checkpoints.make import make

    for each in jobs:
        print(make(each), flush=True)


if __name__ == "__main__":
    main()
