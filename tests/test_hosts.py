"""Which ComfyUIs are tested, each in which environment, and with which tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_raylight.tests import conftest
from comfy_raylight.tests.host import documents, setup

TESTS = Path(__file__).resolve().parent


def tree(folder: Path, version: str, *, needs: str = "torch\nnumpy\n") -> Path:
    """What is taken for a ComfyUI."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'# made by a build\n__version__ = "{version}"\n')
    (folder / "requirements.txt").write_text(needs)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ComfyUIs in a user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    folder = tmp_path / "raylight" / "hosts"
    folder.mkdir(parents=True)
    return folder


def found_in(folder: Path) -> list[Path]:
    return [root for root in setup.hosts() if root.is_relative_to(folder)]


def test_trees_of_the_cache_are_hosts(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, other = tree(cache / "b", "0.9.2"), tree(cache / "a", "0.33.0"), tree(tmp_path / "elsewhere", "0.40.1")
    (cache / "notes.txt").touch()
    (cache / "empty").mkdir()
    (cache / "gone").symlink_to(tmp_path / "nowhere")
    (cache / "same").symlink_to(new)
    assert found_in(tmp_path) == [new, old], "newest first, by numbers, and each once"
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join([str(other), str(old)]))
    assert found_in(tmp_path) == [other, new, old]
    monkeypatch.setenv("COMFYUI_PATH", str(cache / "empty"))
    with pytest.raises(setup.SetupError, match="holds no ComfyUI"):
        setup.hosts()


def test_a_tree_that_leaves_is_not_missed(cache: Path) -> None:
    first = tree(cache / "first", "0.33.0")
    environment = setup.environment(first)
    moved = first.rename(cache / "second")
    assert found_in(cache) == [moved]
    assert setup.environment(moved) == environment, "its packages are the same"
    moved.rename(cache.parent / "away")
    assert found_in(cache) == []


def test_what_contradicts_has_environments_of_its_own(cache: Path) -> None:
    trees = [
        tree(cache / "a", "0.33.0", needs="comfy-kitchen==0.2.31\n"),
        tree(cache / "b", "0.33.0", needs="comfy-kitchen==0.2.32\n"),
        setup.COMFY,
    ]
    assert len({setup.environment(root) for root in trees}) == len(trees)
    assert setup.environment() == setup.HOME / "venv"
    assert setup.python(trees[0]).is_relative_to(setup.HOME / "envs")


def test_trees_of_one_version_have_names_of_their_own(cache: Path) -> None:
    trees = [tree(cache / "a", "0.33.0"), tree(cache / "b", "0.33.0"), tree(cache / "c", "0.34.0")]
    assert conftest.ids_of(trees) == ["0.33.0-a-0", "0.33.0-b-1", "0.34.0"]


def test_other_hosts_get_a_part_of_the_tests() -> None:
    assert [name for name in conftest.COMPAT if not (TESTS / name).exists()] == []
    paths = [str(TESTS / name) for name in ("test_doors.py", "test_entry.py")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--compat", *paths]
    listed = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True).stdout
    assert "test_entry.py::" in listed and "test_doors.py::" not in listed


def test_a_section_of_one_version_leaves_the_others() -> None:
    text = documents.with_section("", "# Title\n", "0.3.75", "old\n")
    text = documents.with_section(text, "# Title\n", "0.33.0", "new\n")
    assert text == "# Title\n\n## ComfyUI 0.33.0\n\nnew\n\n## ComfyUI 0.3.75\n\nold\n"
    assert documents.with_section(text, "# Title\n", "0.3.75", "other\n") == text.replace("old", "other")
