"""Writes the example workflows: API prompts in examples/api, and canvases with their pictures in example_workflows.

    python benchmarks/examples.py [--comfy PATH] [--only NAME ...]

The prompts are those of benchmarks/example_prompts.py. ComfyUI's own page turns them into canvases, which needs a
Chromium (Debian's `chromium`); the ComfyUI must have all nodes that they use.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from pathlib import Path

import environment
from environment import ROOT, setup
from example_prompts import EXAMPLES, built

CANVASES, PROMPTS = ROOT / "example_workflows", ROOT / "examples" / "api"


def main() -> int:
    """Set up, then write in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    parser.add_argument("--only", nargs="+", choices=list(EXAMPLES), default=list(EXAMPLES), metavar="NAME")
    options = parser.parse_args()
    code = environment.within(options.comfy)
    if code is not None:
        return code
    PROMPTS.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        (PROMPTS / f"{name}.json").write_text(json.dumps(built(name), indent=2) + "\n", encoding="utf-8")
    return draw(options.comfy or setup.COMFY, options.only)


def draw(comfy: Path, names: list[str]) -> int:
    """Have ComfyUI's page make the canvases; 1 where it refuses one."""
    from browser import files
    from browser.canvas import NO_CHROMIUM, chromium, opened
    from host.server import ComfyServer

    if not chromium():
        print(NO_CHROMIUM, file=sys.stderr)
        return 1
    CANVASES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files.copy_demo(Path(folder))
        files.write_named(Path(folder), [PROMPTS / f"{name}.json" for name in names])
        with ComfyServer(comfy, base=Path(folder), folder="raylight") as server, opened(server.url) as canvas:
            for name in names:
                prompt = json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))
                canvas.load_prompt(prompt, name, inspect.cleandoc(EXAMPLES[name].__doc__ or ""))
                if why := canvas.refused():
                    print(f"{name} is refused: {why}", file=sys.stderr)
                    return 1
                canvas.picture(CANVASES / f"{name}.jpg")
                text = json.dumps(canvas.workflow(), indent=1)
                (CANVASES / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
                print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
