"""`benchmarks/find_plan.py` prints a plan that fits the file, or says why there is none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_raylight.patches.registry import FAMILIES
from comfy_raylight.raylight import cuts, plan
from comfy_raylight.raylight.found import cuts as found_cuts
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host.checkpoints import Job, write

from .conftest import comfy_roots
from .found_toys import Toy, picture

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "find_plan.py"


def said(root: str, folder: Path, family: str, *more: str) -> subprocess.CompletedProcess[str]:
    """What the command says of a small checkpoint."""
    file = folder / f"{family}.safetensors"
    write([Job(family=family, path=file)], comfy_root=Path(root))
    command = [sys.executable, str(SCRIPT), str(file), "--comfy", root, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)


@pytest.mark.parametrize("root", comfy_roots())
def test_a_plan_is_printed(root: str, tmp_path: Path) -> None:
    done = said(root, tmp_path, "sd3")
    assert done.returncode == 0, done.stderr[-2000:]
    head, _, text = done.stdout.partition("PLAN = ")
    assert "on 2, 3 and 5 ranks" in head and "of a forward's multiplications" in head
    found = eval(text, {**vars(cuts), **vars(found_cuts), **vars(plan)})
    # the lists, streams and joins of the one that is written down
    written = FAMILIES["OpenAISignatureMMDITWrapper"].plan
    assert isinstance(written, plan.Plan)
    ((region,), (known,)) = found.regions, written.regions
    assert [(b.at, set(map(str, b.streams))) for b in region.blocks] == [("joint_blocks.*", {"0", "1"})]
    assert [b.at for b in known.blocks] == ["joint_blocks.*"]


def test_it_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "path", list(sys.path))
    find_plan = importlib.import_module("find_plan")
    assert find_plan.tell(Toy("mean").eval().requires_grad_(False), "forward", picture()) == 1
    assert "Toy has no plan that was found: blocks." in capsys.readouterr().out


@SLOW
@pytest.mark.parametrize("root", comfy_roots())
def test_it_says_that_it_could_not_run(root: str, tmp_path: Path) -> None:
    done = said(root, tmp_path, "sd3", "--width", "3")
    assert done.returncode == 2
    assert "--width" in done.stderr
