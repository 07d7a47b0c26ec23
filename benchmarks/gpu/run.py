"""Everything that GPUs have to show, in one command: correctness, then speed, into a report.

    python benchmarks/gpu/run.py --comfy ROOT --out FOLDER [--wheels FOLDER] [--gpus 2,4] [--layers 40] [--only ...]
        [--try]

Nothing is fetched. What the machine's Python lacks (Ray, gguf, what ComfyUI needs) comes from a folder of wheels and
is unpacked into FOLDER. Parts run one after another, each in a process of its own and within --limit seconds: families
(parity of every family's cases), recorded (the same, of repeated calls), sampling (the engine, one process per GPU, no
Ray), models (the same for other models and kinds of files), pool (Ray and the driver included, kill and cancel), vae,
encoders (of prompts), weights (load, reload, LoRA and GGUF on one GPU). Every speed is a ratio to plain ComfyUI on one
GPU in the same run, a median after a first run. FOLDER gets report.md, a JSON file per table, the output of each part,
and speedup.png where matplotlib is installed. Exit status 1 if a part failed; the others run all the same. With --try
all of it is done with small models and once, on CPUs as well: whether the scripts work, before a machine with GPUs is
paid for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from tables import FOLDER  # noqa: E402

MODELS = "wan1.3b;flux:5;zimage:10;sdxl;ltxv:12;ltx2:8;wan14b:8:fp8;wan14b:8:scaled;wan14b:8:Q8_0;wan14b:8:Q4_K"
ONCE = ("--rounds", "1")
SMALL_VIDEO = ("--frames", "5", "--height", "64", "--width", "64")
TRIAL: Mapping[str, Sequence[str]] = {
    "families": ("--only", "wan*"),
    "recorded": ("--only", "wan*"),
    "sampling": (*ONCE, "--models", "small"),
    "models": (*ONCE, "--models", "small:4:fp8;small:4:Q8_0"),
    "pool": (*ONCE, *SMALL_VIDEO, "--model", "small"),
    "encoders": (*ONCE, "--kinds", "clip_l:stable_diffusion"),
    "vae": (*ONCE, *SMALL_VIDEO),
    "weights": (*ONCE, "--model", "small", "--tokens", "1024"),
}
"""What --try has come after the other arguments of a part, and so in their place."""
SCRIPTS = {"models": "sampling.py", "recorded": "families.py"}
"""Of parts that have none of their own."""
DESCRIBE = """
import platform, torch
count = torch.cuda.device_count()
print(f"{count} x {torch.cuda.get_device_name(0) if count else platform.processor()}, torch {torch.__version__}, "
      f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version())) if count else 'none'}")
"""


def main() -> int:
    """Run the parts and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what this Python lacks")
    parser.add_argument("--gpus", default="2", help="how many besides one, comma-separated")
    parser.add_argument("--layers", type=int, default=40, help="of Wan 14B's 40; one has 0.7 GB")
    parser.add_argument("--rounds", type=int, default=5, help="to take the median of")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each part")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--try", action="store_true", dest="trial", help="small models, once, on whatever is there")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    files = given.out / "checkpoints"
    files.mkdir(exist_ok=True)
    environment = {**os.environ, FOLDER: str(given.out), "PYTHONUNBUFFERED": "1"}
    if given.wheels:
        site = unpacked(given.wheels, given.out / "site")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    gpus, rounds = ["--gpus", given.gpus], ["--rounds", str(given.rounds)]
    folder = ["--folder", str(files)]
    parts: Mapping[str, Sequence[str]] = {
        "families": gpus,
        "recorded": [*gpus, "--recorded", "--table", "recorded"],
        "sampling": [*gpus, *rounds, *folder, "--models", f"wan14b:{given.layers}"],
        "models": [*gpus, *rounds, *folder, "--models", MODELS, "--modes", "ulysses;recorded", "--table", "models"],
        "pool": [*gpus, *rounds, *folder, "--model", f"wan14b:{given.layers}"],
        "encoders": ["--gpus", f"1,{given.gpus}", *rounds, *folder],
        "vae": ["--gpus", f"1,{given.gpus}", *rounds],
        "weights": [*rounds, *folder],
    }
    unknown = set(given.only or ()) - parts.keys()
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    described = subprocess.check_output([sys.executable, "-c", DESCRIBE], env=environment, text=True)
    report = [f"# Raylight on GPUs\n\n{described}"]
    failed = []
    for name in given.only or parts:
        script = SCRIPTS.get(name, f"{name}.py")
        command = [sys.executable, str(HERE / script), "--comfy", str(given.comfy), *parts[name]]
        command += TRIAL[name] if given.trial else ()
        began = time.monotonic()
        print(f"== {name}", flush=True)
        code, text = run(command, given.out / f"{name}.log", environment, given.limit)
        if code:
            failed.append(name)
        outcome = f"failed with {code}, see {name}.log" if code else f"{time.monotonic() - began:.0f} s"
        report.append(f"## {name} ({outcome})\n\n{text}\n")
        (given.out / "report.md").write_text("\n".join(report), encoding="utf-8")
    draw(given.out)
    print(f"report: {given.out / 'report.md'}; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def unpacked(wheels: Path, site: Path) -> str:
    """The folder that has the packages of these wheels."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    subprocess.run([*command, "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))], check=True)
    return str(site)


def run(command: Sequence[str], log: Path, environment: Mapping[str, str], limit: float) -> tuple[int, str]:
    """Run a part, its output into the log and its tables on the screen; its exit status and its tables."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = 124
        with contextlib.suppress(ProcessLookupError):  # also what the part has left running
            os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    text = "\n".join(line for line in lines if line.startswith("|"))
    print(text, flush=True)
    return code, text


def draw(out: Path) -> None:
    """Speed-ups over the number of GPUs, of what the tables have of it."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no speedup.png")
        return
    figure, axes = pyplot.subplots(figsize=(6, 4))
    most = 1
    for name, label in (("sampling", "engine"), ("pool", "pool")):
        path = out / f"{name}.json"
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        found: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            count = int(str(row["GPUs"]).removesuffix("cfg").replace("plain", "1"))
            kind = str(row.get("mode", "cfg" if str(row["GPUs"]).endswith("cfg") else "ulysses"))
            most = max(most, count)
            if kind != "plain" and count > 1:
                found.setdefault(f"{label}: {kind}", [(1, 1.0)]).append((count, row["speed-up"]))
        for title, points in found.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=title)
    axes.plot((1, most), (1, most), linestyle=":", color="grey", label="as many times as GPUs")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("times plain ComfyUI's speed")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "speedup.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
