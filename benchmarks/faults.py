"""What a user sees of each fault: the fault table of docs/operations.md.

    python benchmarks/faults.py [--comfy PATH] [--only NAME ...] [--write]

Starts ComfyUI with a pool of two CPU workers, and hurts what runs there from outside, by process id. After each fault a
good prompt must give the bytes it gave before. `--write` brings the table in docs/operations.md up to date.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from host import documents, setup  # noqa: E402

TABLE = ROOT / "docs" / "operations.md"
BEGIN, END = "<!-- faults: written by benchmarks/faults.py -->\n", "<!-- end of faults -->"


def main() -> int:
    """Set up, then run the faults in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of tests/host/faults.py, by default all")
    parser.add_argument("--write", action="store_true", help="write the table into docs/operations.md")
    options = parser.parse_args()
    root = options.comfy or setup.COMFY
    if setup.inside(root):
        return run(options)
    setup.ensure()
    python = setup.ensure(root)
    return subprocess.run([str(python), *sys.argv], check=False).returncode


def run(options: argparse.Namespace) -> int:
    """All faults; 0 if every one ended as it should."""
    sys.path.insert(0, str(ROOT / "workers" / "import_root"))
    from comfy_raylight.tests.host import checkpoints
    from comfy_raylight.tests.host.faults import FAULTS, Stage, suffer, zombies
    from comfy_raylight.tests.host.server import ComfyServer

    comfy = options.comfy or setup.COMFY
    rows = ["| fault | what the user sees | s to the error | s to the next picture |", "|---|---|---|---|"]
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ComfyServer(comfy, base=Path(folder), threads=1) as server:
        job = checkpoints.Job(family="wan", path=server.models / "wan.safetensors")
        checkpoints.write([job], comfy_root=comfy)
        with server.client() as client:
            stage = Stage(server, client)
            wanted = stage.good()
            print("\n".join(rows), flush=True)
            for name in options.only or FAULTS:
                fault, outcome = FAULTS[name], suffer(stage, FAULTS[name])
                rows.append(
                    f"| {fault.what} | {shown(outcome.seen)} | {outcome.to_error:.1f} | {outcome.to_next:.1f} |"
                )
                print(rows[-1], flush=True)
                equal = outcome.next == wanted
                if fault.expect not in outcome.seen or not equal:
                    failed += 1
                    print(f"{name}: expected {fault.expect!r}; equal afterwards: {equal}", file=sys.stderr)
            left = zombies(server.pid)
            if left:
                failed += 1
                print(f"zombies: {left}", file=sys.stderr)
    if options.write and not failed:
        write(rows, keep=[fault.what for fault in FAULTS.values()] if options.only else [])
    return min(failed, 1)


def shown(text: str) -> str:
    """One cell: process ids, which differ from run to run, go."""
    text = re.sub(r"process \d+", "process N", " ".join(text.split()))
    text = re.sub(r"^[\w.]+ in \w+: ", "", text)  # ComfyUI shows the node, and the type apart
    return re.sub(r"([|<>*_`])", r"\\\1", text)


def write(rows: list[str], *, keep: list[str]) -> None:
    """Put the table into the document.

    Args:
        keep: faults in the order of the table, whose rows stay where there is no new one; none to keep no other row.
    """
    text = TABLE.read_text(encoding="utf-8")
    if keep:
        known = {row.split(" | ")[0]: row for row in [*text.partition(BEGIN)[2].partition(END)[0].splitlines(), *rows]}
        rows = rows[:2] + [known[f"| {what}"] for what in keep if f"| {what}" in known]
    text = documents.with_table(text, BEGIN, END, "\n".join([*rows, ""]))
    TABLE.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
