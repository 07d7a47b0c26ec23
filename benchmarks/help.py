"""Writes what explains the nodes in ComfyUI's page: help pages in web/docs, and English and Chinese in locales.

    python benchmarks/help.py [--comfy PATH ...] [--write]

Texts are those of the node classes. What a help page says beyond them, and the Chinese, is in benchmarks/help_texts;
a text without its Chinese is an error, and so is Chinese that nothing uses. Without --write it says what is not up to
date.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from host import setup  # noqa: E402


def main() -> int:
    """Set up, then write or compare in the environment; 0 if all is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--comfy", type=Path, nargs="+", default=[], help="roots of ComfyUIs, of which the union counts"
    )
    parser.add_argument("--write", action="store_true", help="write the files")
    options = parser.parse_args()
    if not setup.inside():
        return subprocess.run([str(setup.ensure()), *sys.argv], check=False).returncode
    from host import help_pages
    from host.server import ComfyServer

    published: dict[str, object] = {}
    for root in options.comfy or [setup.COMFY]:
        with (
            tempfile.TemporaryDirectory() as folder,
            ComfyServer(root, base=Path(folder), python=setup.ensure(root)) as server,
            server.client() as client,
        ):
            published |= help_pages.of_pack(client.object_info())
    stale = 0
    for name, text in help_pages.files(published).items():  # type: ignore[arg-type]
        path = ROOT / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"{'written' if options.write else 'not up to date'}: {name}")
        if options.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    return 0 if options.write or not stale else 1


if __name__ == "__main__":
    sys.exit(main())
