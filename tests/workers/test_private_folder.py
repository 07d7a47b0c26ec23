"""The private folder: where it is made, who can enter it, and what is swept."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_raylight.raylight.errors import ConfigError
from comfy_raylight.workers.pool import private_folder

NOBODY = 65534


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder of this test with a path that is short enough; pytest's own is not."""
    folder = Path(f"/tmp/rt{os.getpid()}")
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


def test_nobody_else_can_enter() -> None:
    folder = private_folder.make()
    found = folder.path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.geteuid()
    assert folder.path.parent == Path("/tmp")
    folder.remove()
    assert not folder.path.exists()


@pytest.mark.parametrize(
    "name,mode,why",
    [
        pytest.param("x" * 60, 0o700, "characters, and a socket's path", id="long"),
        pytest.param("tmp ü", 0o700, "beyond ASCII", id="beyond ASCII"),
        pytest.param("missing", 0, "is no folder", id="missing"),
        pytest.param("open", 0o777, "can be replaced by other users", id="others may write"),
        pytest.param("theirs", 0o700, "can be replaced by other users", id="of another user"),
        pytest.param("in/a", 0o777, "can be replaced by other users", id="below what others may write"),
    ],
)
def test_unfit_places_are_passed_over_and_named(
    short: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: int, why: str
) -> None:
    place = short / name
    if mode:
        place.mkdir(parents=True)
        (place.parent if name == "in/a" else place).chmod(mode)
    if name == "theirs":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(place, NOBODY, NOBODY)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    folder = private_folder.make()
    folder.remove()
    assert folder.path.parent == Path("/tmp")
    monkeypatch.setattr(private_folder, "LAST", str(place))
    with pytest.raises(ConfigError, match=f"XDG_RUNTIME_DIR.*{why}.*Set TMPDIR"):
        private_folder.make()


def test_what_dead_processes_left_is_swept(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: no folder in use, of another user, or behind a link."""
    monkeypatch.setenv("TMPDIR", str(short))
    door = "from comfy_raylight.workers.pool.private_folder import make"
    make = f"{door}; f = make(); (f.path / 'x').touch(); print(f.path)"
    made = subprocess.run([sys.executable, "-c", make], env=child(), check=True, capture_output=True, text=True)
    dead = Path(made.stdout.strip())
    assert (dead / "x").exists()
    living = private_folder.make()
    assert not dead.exists(), "its process is gone"
    victim = short / "victim"
    victim.mkdir()
    (victim / "kept").touch()
    (short / f"{private_folder.PREFIX}link").symlink_to(victim)
    theirs = short / f"{private_folder.PREFIX}theirs"
    theirs.mkdir()
    if not os.geteuid():
        os.chown(theirs, NOBODY, NOBODY)
    another = private_folder.make()
    assert living.path.is_dir() and (victim / "kept").exists()
    assert theirs.is_dir() == (not os.geteuid())
    for folder in (living, another):
        folder.remove()


def child() -> dict[str, str]:
    root = Path(private_folder.__file__).parents[1] / "import_root"
    return {**os.environ, "PYTHONPATH": str(root)}
