"""Keeps what a newcomer sees on the way to a first picture: docs/pictures, for docs/first-picture.md.

    python benchmarks/screenshots.py [--comfy PATH]

Needs a Chromium (Debian's `chromium`); the demo runs on two CPU workers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import environment
from environment import ROOT, setup

PICTURES = ROOT / "docs" / "pictures"
LIMIT_MS = 300_000


def main() -> int:
    """Set up, then open the page in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    options = parser.parse_args()
    code = environment.within_browser(options.comfy)
    if code is not None:
        return code
    from browser import files
    from browser.canvas import Canvas, opened
    from host.server import ComfyServer

    def keep(canvas: Canvas, name: str) -> None:
        canvas.messages()
        canvas.screenshot(PICTURES / f"{name}.jpg", type="jpeg", quality=75)
        print(name, flush=True)

    previews = ("--preview-method", "latent2rgb")
    with tempfile.TemporaryDirectory() as folder:
        files.copy_demo(Path(folder))
        server = ComfyServer(
            options.comfy or setup.COMFY, base=Path(folder), args=previews, folder="raylight", test_nodes=False
        )
        with server, opened(server.url) as canvas:
            canvas.drop(ROOT / "example_workflows" / "demo.json")
            canvas.fit()
            keep(canvas, "1-dropped")
            page = canvas.page
            canvas.run()
            sampler = "app.graph.nodes.find(node => node.type === 'XFuserKSamplerAdvanced')"
            page.wait_for_function(f"() => {sampler}.progress > 0", timeout=LIMIT_MS, polling=20)
            keep(canvas, "2-running")
            done = "Object.values(app.nodeOutputs ?? {}).some(output => output.animated)"
            page.wait_for_function(f"() => {done} && !app.runningNodeId", timeout=LIMIT_MS)
            page.wait_for_timeout(2500)
            canvas.fit()
            keep(canvas, "3-finished")
            canvas.help(canvas.in_library("Ray Init Actor"), "Ray Init Actor")
            page.wait_for_timeout(1000)
            keep(canvas, "4-help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
