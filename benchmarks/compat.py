"""What of Raylight works with a ComfyUI, as a table: run it with the Python that runs that ComfyUI.

    python benchmarks/compat.py ROOT [--only PATTERN ...] [--json FILE] [--write]

ROOT is the folder of any ComfyUI (where its main.py is). It is started once, on the CPU and a port of its own, without
other packs; nothing in its folder is changed. The whole table takes some ten minutes on two cores.

The rows: whether the pack is imported; nodes that are not as recorded; each model family on two ranks against one
process; VAEs in strips; a few families sampled over HTTP on two Ray workers against plain ComfyUI; kinds of files. One
that fails, crashes or hangs is one row. A row is right, found (right by a plan that nobody wrote), wrong, refused (by
name), new (this pack knows nothing of it) or absent (this ComfyUI has no such thing). A refusal of what the pack claims
to do counts as wrong.

Exit status: 0 nothing is wrong, 1 something is, 2 it could not run. Please send the output with a report.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_raylight.tests.compat.rows import Row

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"host": ("imports", "nodes", "sampling", "files"), "engine": ("families",), "vaes": ("VAEs",)}
"""Modules of tests/compat, with the parts of the table that they write."""
PART_S = {"host": 1200, "engine": 1800, "vaes": 900}
"""Seconds after which a module is ended; its rows so far are kept."""
NOT_NEEDED = {"yunchang", "xfuser"}
"""Requirements that only other attention kernels have."""
SHOWN = ("torch", "ray", "comfy-kitchen", "safetensors", "gguf")
"""Packages whose versions are told."""
TABLE = ROOT / "docs" / "compat.md"
BEGIN, END = "<!-- compat: written by benchmarks/compat.py -->\n", "<!-- end of compat -->\n"
STATES = ("right", "found", "wrong", "refused", "new", "absent")
COLUMNS = ("nodes", "families", "VAEs", "sampling", "files")
EVERY_S = 30
"""Seconds between two lines on how far it is."""


class Unable(Exception):
    """Why it cannot run."""


def main() -> int:
    """Run the parts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of a ComfyUI")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", default=["*"], help="rows: nodes, families/Wan*; default all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as JSON too")
    parser.add_argument("--write", action="store_true", help="write this ComfyUI's line into docs/compat.md")
    options = parser.parse_args()
    root = options.root.expanduser().resolve()
    try:
        check(root)
    except Unable as error:
        print(f"compat.py cannot run: {error}", file=sys.stderr)
        return 2
    sys.path.append(str(ROOT / "workers" / "import_root"))
    patterns = [pattern if "/" in pattern else f"{pattern}/*" for pattern in options.only]
    started = time.monotonic()
    facts = versions(root)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = [rows_of(module, root, patterns, Path(folder) / module) for module in PARTS]
    rows = [row for part in found for row in part]
    order = [part for parts in PARTS.values() for part in parts]
    rows.sort(key=lambda row: (order.index(row.part), not row.fault, row.state == "right", row.name))
    print("\n" + "\n".join(row.line for row in rows))
    count = {state: sum(row.state == state for row in rows) for state in STATES}
    faults = sum(row.fault for row in rows)
    told = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    print(f"\n{told or 'no rows'}; {faults} of them should not be so; {time.monotonic() - started:.0f} s")
    if options.json:
        table = [{**vars(row)} for row in rows]
        text = json.dumps({"versions": facts, "rows": table, "faults": faults}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.write and options.only == ["*"]:
        write_line(facts, rows)
    if not rows:
        print(f"compat.py: no row is called {' or '.join(options.only)}", file=sys.stderr)
        return 2
    return 1 if faults else 0


def check(root: Path) -> None:
    """Raises Unable where something is missing, by name."""
    if not ((root / "main.py").is_file() and (root / "comfy").is_dir()):
        raise Unable(f"{root} holds no ComfyUI (no main.py and comfy/)")
    if not (ROOT / "tests" / "compat").is_dir():
        raise Unable(
            f"{ROOT} has no folder tests/, whose cases it runs: packs installed from the registry come without it. "
            "Clone the pack's repository anywhere and run the file there"
        )
    if not hasattr(os, "fork"):
        raise Unable("this system has no fork(), which the workers of its cases need: use Linux, or WSL")
    missing = [name for name in ["torch", *needed(ROOT)] if not version_of(name)]
    if missing:
        files = f"-r {ROOT / 'requirements.txt'} -r {root / 'requirements.txt'}"
        raise Unable(
            f"{sys.executable} has no {', '.join(dict.fromkeys(missing))}. Start it with the Python that runs this "
            f"ComfyUI, or install there: {sys.executable} -m pip install {files}"
        )


def needed(folder: Path) -> list[str]:
    """Packages that a folder's requirements name without a condition; the page and its documents are not used."""
    file = folder / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = [re.match(r"[A-Za-z0-9._-]+", line) for line in lines if ";" not in line]
    names = [match.group() for match in found if match]
    return [name for name in names if name not in NOT_NEEDED and not name.startswith("comfyui")]


def version_of(package: str) -> str:
    """Of an installed package; "" where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions(root: Path) -> dict[str, str]:
    """What the table is about."""
    from comfy_raylight.workers.wire import standing
    from comfy_raylight.workers.wire.node_facts import look

    comfyui = look(str(root), "")["ComfyUI"] or "unknown"
    pack = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "ComfyUI": f"{comfyui}, {standing.standing(comfyui) or 'which Raylight is tested with'}",
        "Raylight": f"{pack[1] if pack else 'unknown'}, code {look(str(root), str(ROOT))['Raylight']}",
        "not installed": ", ".join(name for name in needed(root) if not version_of(name)) or "nothing that it asks for",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **{name: version_of(name) or "not installed" for name in SHOWN},
    }


def write_line(facts: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Put what was found of this ComfyUI into the document, in the place of what it says of that version."""
    from comfy_raylight.tests.host import documents

    version = facts["ComfyUI"].partition(",")[0]
    cells = [version, f"Python {facts['Python'].partition(' ')[0]}, " + ", ".join(f"{n} {facts[n]}" for n in SHOWN[:3])]
    for part in COLUMNS:
        # a row of the nodes is for those that are otherwise, and one for all that are as they were
        here = [
            row.detail if part == "nodes" and row.state == "right" else row.state for row in rows if row.part == part
        ]
        cells.append(
            ", ".join(each if part == "nodes" else f"{here.count(each)} {each}" for each in dict.fromkeys(sorted(here)))
        )
    cells.append(str(sum(row.fault for row in rows)))
    text = TABLE.read_text(encoding="utf-8")
    _, _, table = text.partition(BEGIN)
    lines = [line for line in table.partition(END)[0].splitlines() if not line.startswith(f"| {version} |")]
    lines = [*lines[:2], *sorted([*lines[2:], f"| {' | '.join(cells)} |"], key=_numbers)]
    found = documents.with_table(text, BEGIN, END, "\n".join([*lines, ""]))
    TABLE.write_text(found, encoding="utf-8", newline="\n")


def _numbers(line: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", line.split("|")[1])))


def rows_of(module: str, root: Path, patterns: Sequence[str], out: Path) -> list[Row]:
    """Run one module of tests/compat; its rows, and one for its end where that was not a good one."""
    from comfy_raylight.tests.compat import rows

    if not any(fnmatch.fnmatchcase(part, pattern.partition("/")[0]) for part in PARTS[module] for pattern in patterns):
        return []
    file, log = out.with_suffix(".rows"), out.with_suffix(".log")
    problem = _run(module, root, file, patterns, log)
    found = rows.read(file)
    if problem:
        text = log.read_text(encoding="utf-8", errors="replace")
        found.append(rows.wrong(PARTS[module][-1], "all that is left", f"{problem}: {text}"))
    return found


def _run(module: str, root: Path, file: Path, patterns: Sequence[str], log: Path) -> str:
    """Run a module in a process of its own; what went wrong, "" for nothing."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "workers" / "import_root")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", "-m", f"compat.{module}", str(root), str(file), *patterns]
    done = threading.Event()
    watcher = threading.Thread(target=_tell, args=(module, file, done), daemon=True)
    watcher.start()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, cwd=log.parent, start_new_session=True
        )
        try:
            code = process.wait(PART_S[module])
            return f"{module} ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            return f"{module} had not ended after {PART_S[module]} s"
        finally:
            done.set()
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that a started ComfyUI is ended too; then for good."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _tell(module: str, file: Path, done: threading.Event) -> None:
    """Say how far it is, until it is done."""
    while not done.wait(EVERY_S):
        lines = len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0
        print(f"{', '.join(PARTS[module])}: {lines} rows so far", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
