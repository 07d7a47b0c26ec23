"""Wherever ComfyUI is started, a pool works and gives the same bits, or says in one error what to set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host import machines

STARTED_IN = Path(__file__).with_name("started_in.py")
ERROR_S = 30.0
LONG = "x" * (60 - len("/tmp/rt1234567/"))
"""A TMPDIR of 60 characters, of which a socket of Ray's would have too many."""


@dataclass(frozen=True)
class Place:
    """Where a process starts.

    Attributes:
        variables: of its environment; None takes one away, {here} is a folder of the test's own.
        first: shell commands before it, in namespaces of its own.
        alone: whether it has no network.
        error: what the message must have, "" where the pool works.
    """

    variables: Mapping[str, str | None] = field(default_factory=dict)
    first: Sequence[str] = ()
    alone: bool = False
    error: str = ""


SHM = "mount -t tmpfs -o size={size} none /dev/shm"
PLACES = {
    "long TMPDIR": Place({"TMPDIR": "{here}/" + LONG}),
    "TMPDIR beyond ASCII": Place({"TMPDIR": "{here}/tmp ü"}),
    "HOME missing": Place({"HOME": "{here}/missing"}),
    "HOME unset": Place({"HOME": None}),
    "without a HOME, and long": Place({"TMPDIR": "{here}/" + LONG, "HOME": None}),
    "HOME read-only": Place({"HOME": "{here}/home"}, ["mount --bind -o ro {here}/home {here}/home"]),
    "/dev/shm read-only": Place({}, [SHM.format(size="1g"), "mount -o remount,ro /dev/shm"]),
    "small /dev/shm": Place({}, [SHM.format(size="64m")]),
    "no network": Place(alone=True),
    "all of it": Place(
        {"TMPDIR": "{here}/" + LONG, "HOME": None},
        [SHM.format(size="64m"), "mount -o remount,ro /dev/shm"],
        alone=True,
    ),
    "nowhere": Place(
        {"TMPDIR": "{here}/" + LONG, "XDG_RUNTIME_DIR": None},
        ["mount --bind -o ro /tmp /tmp", "mount -o remount,bind,ro /tmp"],
        error="TMPDIR .*has more than .* characters.*/tmp cannot be written.*Set TMPDIR",
    ),
}
POSSIBLE = machines.possible()
BY_DEFAULT = ("all of it", "nowhere") if POSSIBLE else ("without a HOME, and long",)


@pytest.fixture
def here() -> Iterator[Path]:
    """A folder that ComfyUI is started from, with modules of names that workers import."""
    folder = Path(f"/tmp/rt{os.getpid():07}")
    for name in (LONG, "tmp ü", "home"):
        (folder / name).mkdir(parents=True)
    for name in ("einops", "psutil", "utils"):
        (folder / f"{name}.py").write_text("raise SystemExit('the current folder is on the search path')\n")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def wanted(comfy_root: Path, tiny_wan: Path) -> str:
    """What is computed in an ordinary place."""
    return str(started(Place(), Path("/"), comfy_root, tiny_wan)["digest"])


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in BY_DEFAULT else SLOW) for name in PLACES])
def test_place(name: str, here: Path, comfy_root: Path, tiny_wan: Path, request: pytest.FixtureRequest) -> None:
    place = PLACES[name]
    if not POSSIBLE and (place.first or place.alone):
        pytest.skip("needs namespaces")
    found = started(place, here, comfy_root, tiny_wan)
    if place.error:
        assert found["seconds"] < ERROR_S
        assert re.search(place.error, found["error"]), found
        return
    assert "error" not in found
    assert str(here) not in found["path"] and "" not in found["path"]
    assert found["folder"] != str(here)
    assert found["digest"] == request.getfixturevalue("wanted")


def started(place: Place, here: Path, comfy_root: Path, checkpoint: Path) -> dict[str, Any]:
    """What a process says that starts a pool there."""
    variables = dict(os.environ)
    for name, value in place.variables.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value.format(here=here)
    script = [sys.executable, str(STARTED_IN), str(comfy_root), str(checkpoint)]
    commands = [*(command.format(here=here) for command in place.first), 'exec "$@"']
    if place.alone:
        commands.insert(0, "ip link set lo up")
    if place.first or place.alone:
        inside = ["unshare", "--mount", *(["--net"] if place.alone else []), "sh", "-ec"]
        script = [*inside, "\n".join(commands), "-", *script]
    done = subprocess.run(
        script,
        cwd=here,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
