"""Every node of the pack beside what it is in plain ComfyUI: the table of docs/nodes.md.

    python benchmarks/nodes.py [--comfy PATH ...] [--only NODE ...] [--write]

Starts each ComfyUI with a pool of two CPU workers and a small model of random weights, and runs every node that is
registered there beside ComfyUI's own. `--write` brings the table in docs/nodes.md up to date.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from host import documents, setup  # noqa: E402

if TYPE_CHECKING:
    from comfy_raylight.tests.host.counterparts import Outcome

TABLE = ROOT / "docs" / "nodes.md"
BEGIN, END = "<!-- nodes: written by benchmarks/nodes.py -->\n", "<!-- end of nodes -->"


def main() -> int:
    """Set up, then compare in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, nargs="+", default=[], help="roots of ComfyUIs (default: the test host)")
    parser.add_argument("--only", nargs="+", metavar="NODE", help="by default all that are registered")
    parser.add_argument("--write", action="store_true", help="write the table into docs/nodes.md")
    options = parser.parse_args()
    if setup.inside():
        return run(options)
    python = setup.ensure()
    return subprocess.run([str(python), *sys.argv], check=False).returncode


def run(options: argparse.Namespace) -> int:
    """All nodes on all ComfyUIs; 0 if every one equals its counterpart, and none is without."""
    sys.path.append(str(ROOT / "workers" / "import_root"))
    os.environ["OMP_NUM_THREADS"] = "1"
    from comfy_raylight.tests.conftest import version_of

    columns = {version_of(root): outcomes(root, options.only) for root in options.comfy or [setup.COMFY]}
    rows = table(columns)
    print("\n".join(rows))
    wrong = [
        f"{name} on {version}: {outcome.error if outcome else 'no counterpart is known'}"
        for version, column in columns.items()
        for name, outcome in column.items()
        if outcome is None or not outcome.fine(name)
    ]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if options.write and not options.only:
        write(rows)
    return 0


def outcomes(root: Path, only: list[str] | None) -> dict[str, Outcome | None]:
    """What came of each node of the pack; None for those that nothing is known to compare with."""
    from comfy_raylight.tests.host import counterparts
    from comfy_raylight.tests.host.server import ComfyServer

    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(root, base=Path(folder), python=setup.ensure(root), threads=1)
        counterparts.write_files(server)
        with server, server.client() as client:
            nodes = only or counterparts.nodes_of_pack(client.object_info())
            found = counterparts.compare(server, client, counterparts.comparable(client) & set(nodes))
            return {name: found.get(name) for name in nodes}


def table(columns: Mapping[str, Mapping[str, Outcome | None]]) -> list[str]:
    """The rows: a node, its counterpart, and the error in each ComfyUI."""
    titles = [f"error, ComfyUI {version}" for version in columns]
    rows = [f"| node | in plain ComfyUI | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for name in sorted({name for column in columns.values() for name in column}):
        found = [column.get(name) for column in columns.values()]
        core = next((outcome.core for outcome in found if outcome), "")
        cells = [f"{outcome.error:.1g}" if outcome else "not there" for outcome in found]
        rows.append(f"| `{name}` | {core} | {' | '.join(cells)} |")
    return rows


def write(rows: list[str]) -> None:
    """Put the table into the document."""
    text = documents.with_table(TABLE.read_text(encoding="utf-8"), BEGIN, END, "\n".join([*rows, ""]))
    TABLE.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
