"""benchmarks/compat.py: its rows and exit status, on real ComfyUIs and on some that are broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host import broken

from . import forks

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compat.py"
TOMORROW = {
    "comfy/model_base.py": (
        (
            "\nclass Omnigen2(BaseModel):",
            "\nclass Tomorrow(BaseModel):\n    def __init__(self, config):\n"
            "        super().__init__(config, unet_model=comfy.ldm.tomorrow.model.TomorrowModel)\n\n\n"
            "class Omnigen2(BaseModel):",
        ),
    )
}
"""A ComfyUI with a model family that nobody knows yet."""
NO_START = {"main.py": (("import comfy.options", "raise ImportError('no today')"),)}


def run(root: Path, *arguments: str, script: Path = SCRIPT) -> tuple[int, str]:
    """Exit status and what was printed."""
    command = [sys.executable, str(script), str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    return done.returncode, done.stdout + done.stderr


def table(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a JSON file by part and name."""
    return {f"{row['part']}/{row['name']}": row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def test_no_comfyui(tmp_path: Path) -> None:
    code, text = run(tmp_path)
    assert code == 2 and "holds no ComfyUI" in text


def test_a_pack_without_tests(tmp_path: Path) -> None:
    """As the registry has it."""
    comfy, script = bare(tmp_path / "comfy"), tmp_path / "pack" / "benchmarks" / "compat.py"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    code, text = run(comfy, script=script)
    assert code == 2 and "no folder tests/" in text and "Clone" in text


def test_a_python_that_lacks_something(tmp_path: Path) -> None:
    comfy, script = bare(tmp_path / "comfy"), tmp_path / "pack" / "benchmarks" / "compat.py"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    (script.parents[1] / "tests" / "compat").mkdir(parents=True)
    lines = "ray\nthis-is-not-installed>=1.0 # so\nonly-there; sys_platform == 'other'\n"
    (script.parents[1] / "requirements.txt").write_text(lines)
    code, text = run(comfy, script=script)
    assert code == 2 and "has no this-is-not-installed." in text and f"{sys.executable} -m pip install" in text


def test_what_comfyui_lacks_is_told(tmp_path: Path) -> None:
    """It may run without: some of its packages are for nodes of their own."""
    code, text = run(bare(tmp_path / "comfy", "torch\nthis-is-not-installed\n"), "--only", "nothing")
    assert code == 2 and "not installed: this-is-not-installed\n" in text and "no row is called nothing" in text


def test_needs_no_tools_of_tests() -> None:
    """A user's Python has what ComfyUI and the pack need, and no more."""
    pack = SCRIPT.parents[1]
    code = f"import sys; sys.path += [{str(pack / 'tests')!r}, {str(pack / 'workers' / 'import_root')!r}]; "
    code += "import compat.engine, compat.host, compat.vaes; "
    code += "print(sorted({'pytest', 'websocket', 'playwright', 'tomllib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


def bare(folder: Path, requirements: str = "") -> Path:
    """What passes for a ComfyUI at first sight."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "requirements.txt").write_text(requirements)
    return folder


def test_jobs_that_crash_or_hang() -> None:
    """They are one failed job each, and what they started is gone."""

    def hang() -> None:
        subprocess.run(["sleep", "600"], check=False)

    jobs = {"hang": hang, "crash": lambda: os.kill(os.getpid(), signal.SIGKILL), "raise": lambda: 1 // 0}
    began = time.monotonic()
    ended = dict(forks.run({**jobs, "fine": lambda: 7}, seconds=5, at_once=2))
    assert ended["fine"].value == 7 and not ended["fine"].problem
    assert "no end after 5 s" in ended["hang"].problem
    assert "ended with -9" in ended["crash"].problem and "ZeroDivisionError" in ended["raise"].problem
    assert time.monotonic() - began < 60


@pytest.mark.timeout(900)
def test_a_comfyui_that_is_right(comfy_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    names = ("families/CameraWanModel", "families/LensTransformer2DModel", "VAEs/taesd")
    code, text = run(comfy_root, "--only", *names, "--json", str(out))
    rows = table(out)
    assert code == 0, text
    there = (comfy_root / "comfy" / "ldm" / "lens").is_dir()
    assert {name: row["state"] for name, row in rows.items()} == {
        "families/CameraWanModel": "right",
        "families/LensTransformer2DModel": "found" if there else "absent",
        "VAEs/taesd": "right",
    }


@pytest.mark.timeout(900)
def test_a_comfyui_that_is_another_one(comfy_root: Path, tmp_path: Path) -> None:
    """Its families are refused, wrong and new, each by name."""
    edits = (broken.OTHER_ROPE, broken.HIDDEN_ATTENTION, TOMORROW)
    comfy, out = broken.tree(comfy_root, tmp_path / "comfy", *edits), tmp_path / "table.json"
    names = ("CameraWanModel", "OmniGen2Transformer2DModel", "TomorrowModel")
    code, text = run(comfy, "--only", *(f"families/{name}" for name in names), "--json", str(out))
    rows = table(out)
    assert code == 1, text
    assert f"ComfyUI: {broken.UNKNOWN}, newer than any" in text
    assert {name: row["state"] for name, row in rows.items()} == {
        "families/CameraWanModel": "refused",
        "families/OmniGen2Transformer2DModel": "wrong",
        "families/TomorrowModel": "new",
    }
    assert "The rope table does not fit" in rows["families/CameraWanModel"]["detail"]
    assert "differs by" in rows["families/OmniGen2Transformer2DModel"]["detail"]
    assert "comfy.ldm.tomorrow.model" in rows["families/TomorrowModel"]["detail"]
    assert [row["fault"] for row in rows.values()].count(True) == 2


@pytest.mark.timeout(900)
def test_a_comfyui_that_does_not_start(comfy_root: Path, tmp_path: Path) -> None:
    comfy, out = broken.tree(comfy_root, tmp_path / "comfy", NO_START), tmp_path / "table.json"
    code, text = run(comfy, "--only", "imports", "nodes", "--json", str(out))
    assert code == 1, text
    (row,) = table(out).values()
    assert row["part"] == "imports" and row["state"] == "wrong" and "no today" in row["detail"]


@SLOW
@pytest.mark.timeout(1600)
def test_the_whole_table(comfy_root: Path, tmp_path: Path) -> None:
    """Nothing of this ComfyUI is wrong, or refused though it should not be."""
    out = tmp_path / "table.json"
    code, text = run(comfy_root, "--json", str(out))
    rows = table(out)
    assert code == 0, text
    assert {row["part"] for row in rows.values()} == {"imports", "nodes", "families", "VAEs", "sampling", "files"}
    assert sum(row["state"] == "right" for row in rows.values()) > 50, text
