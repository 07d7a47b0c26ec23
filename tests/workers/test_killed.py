"""A process with a pool that is killed at any moment, or replaces its program, leaves no process and no folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.workers.pool import private_folder

STARTED_IN = Path(__file__).with_name("started_in.py")
MOMENTS = [number / 8 for number in range(1, 11)] if LARGE else [0.4, 0.9]
"""As parts of the time that a start and a call of a model take."""
GONE_S = 15.0

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux only")


@pytest.fixture
def here() -> Iterator[Path]:
    """Where the private folders are made."""
    folder = Path(f"/tmp/rk{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def inside(folder: Path) -> list[str]:
    """Processes that are somewhere below a folder, as all are that a pool's Ray has started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd().startswith(f"{folder}/"):
                found.append(process.name())
        except psutil.Error:  # it has ended
            continue
    return found


def left(folder: Path) -> list[Path]:
    """Private folders in it."""
    return list(folder.glob(f"{private_folder.PREFIX}*"))


def test_killed_at_any_moment(here: Path, comfy_root: Path, tiny_wan: Path) -> None:
    command = [sys.executable, str(STARTED_IN), str(comfy_root), str(tiny_wan)]
    variables = {**os.environ, "TMPDIR": str(here)}
    usual = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    seconds = json.loads(usual.stdout.splitlines()[-1])["seconds"]
    assert inside(here) == [] and left(here) == []
    seen = 0
    for moment in MOMENTS:
        process = subprocess.Popen([*command, "on"], env=variables)
        time.sleep(moment * seconds)
        seen += len(inside(here))
        how = signal.SIGTERM if moment == MOMENTS[-1] else signal.SIGKILL
        process.send_signal(how)
        assert process.wait(GONE_S) == -how, "what Ray does at a signal is not what the process does"
        end = time.monotonic() + GONE_S
        while (inside(here) or left(here)) and time.monotonic() < end:
            time.sleep(0.1)
        assert inside(here) == [] and left(here) == [], f"{moment} of {seconds:.0f} s"
    assert seen, "nothing had started yet"


def test_replaced_by_another_program(here: Path, comfy_root: Path, tiny_wan: Path) -> None:
    """The process keeps its number, and the former program's pool is as foreign to the new one as any."""
    command = [sys.executable, str(STARTED_IN), str(comfy_root), str(tiny_wan), "between", "within"]
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(here)}, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 3 and len({each["digest"] for each in told}) == 1
    assert len({each["folder"] for each in told}) == 3
    assert [each["zombies"] for each in told] == [[], [], []]
    assert inside(here) == [] and left(here) == []
