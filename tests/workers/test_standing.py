"""What a ComfyUI is to those that the pack is tested with, and what errors say of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_raylight.raylight.errors import (
    LoadError,
    MisfitError,
    PlanError,
    RaylightError,
    UnsupportedError,
    WorkerError,
)
from comfy_raylight.workers.wire import standing

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "0.99.0"
REMOVE = "Remove the node that adds tokens"


@pytest.fixture
def comfyui(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A ComfyUI of this version, as far as its version goes."""
    (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{request.param}"\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "comfyui_version", raising=False)
    yield request.param
    sys.modules.pop("comfyui_version", None)


on = pytest.mark.parametrize


@on("found", standing.TESTED)
def test_tested(found: str) -> None:
    assert standing.standing(found) == ""


@on(
    "found, told",
    [
        (UNKNOWN, f"newer than any.*{standing.TESTED[-1]}"),
        (f"{standing.TESTED[-1]}1", "newer than any"),
        ("0.3.9", f"older than any.*{standing.TESTED[0]}"),
        ("0.3.76", f"between two.*{standing.TESTED[0]} and {standing.TESTED[1]}"),
        ("0.21", f"between two.*{standing.TESTED[1]} and {standing.TESTED[2]}"),
        ("1.0.0-rc1", "newer than any"),
        ("main", "of a version that does not say"),
    ],
)
def test_not_tested(found: str, told: str) -> None:
    assert re.match(told, standing.standing(found))


def test_they_are_in_order() -> None:
    """Ranges go by it."""
    numbers = [tuple(map(int, found.split("."))) for found in standing.TESTED]
    assert numbers == sorted(numbers)


@on("comfyui", [UNKNOWN], indirect=True)
@on("error", [MisfitError("The table does not fit", "why", REMOVE), PlanError("Block has no argument x", "why")])
def test_no_node_is_blamed_where_there_is_none(comfyui: str, error: RaylightError) -> None:
    found = standing.explained(error, ())
    assert type(found) is type(error) and str(found).startswith(f"{error.what}: why. ")
    assert f"ComfyUI {UNKNOWN} is newer than any" in str(found) and "benchmarks/compat.py" in str(found)
    assert "Remove" not in str(found) and "ulysses_degree" in str(found)


@on("comfyui", [standing.TESTED[0]], indirect=True)
def test_on_a_tested_version_it_is_our_fault(comfyui: str) -> None:
    text = str(standing.explained(PlanError("Block has no argument x"), ()))
    assert f"fault of Raylight, which is tested with ComfyUI {comfyui}" in text and "compat.py" not in text


@on("comfyui", [standing.TESTED[0]], indirect=True)
@on("error", [MisfitError("What", "why", REMOVE), PlanError("What", "why")])
def test_what_changes_the_model_is_named(comfyui: str, error: RaylightError) -> None:
    text = str(standing.explained(error, ["cache (pack)", "a ControlNet", "cache (pack)"]))
    assert text.startswith("What: why. Remove the node that ")
    assert text.endswith("changed by cache (pack), a ControlNet")


@on("comfyui", [UNKNOWN], indirect=True)
@on(
    "error, noted",
    [
        (UnsupportedError("No plan", "", "Set ulysses_degree to 1"), True),
        (WorkerError("Failed", "TypeError: f() got an unexpected argument", "See the log", "TypeError"), True),
        (WorkerError("Failed", "RuntimeError: Connection closed by peer", "See the log", "RuntimeError"), False),
        (WorkerError("Failed", "RuntimeError: can't allocate memory", "See the log", "RuntimeError"), False),
        (WorkerError("Worker 1 died", "", "Queue again"), False),
        (LoadError("Broken file"), False),
    ],
)
def test_other_errors(comfyui: str, error: RaylightError, noted: bool) -> None:
    """They keep what they say; those that code meets which is of another version get a sentence more."""
    found = standing.explained(error, ())
    assert str(found).startswith(str(error)) and (str(found) != str(error)) == noted
    assert standing.explained(error, ["a node"]) is error
    assert getattr(found, "cause_type", "") == getattr(error, "cause_type", "")


@on("comfyui", [standing.TESTED[-1]], indirect=True)
def test_other_errors_on_a_tested_version(comfyui: str) -> None:
    error = UnsupportedError("No plan", "", "Set ulysses_degree to 1")
    assert standing.explained(error, ()) is error


def test_readme_names_the_versions() -> None:
    """In one sentence, which is written from the table of benchmarks/compat.py."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"Tested with ComfyUI (.*?):", readme)
    assert len(said) == 1
    assert tuple(re.findall(r"\d+\.\d+\.\d+", said[0])) == standing.TESTED


def test_what_was_found_of_them() -> None:
    """The lines that `benchmarks/compat.py --write` has written are of these versions, and nothing is wrong in them."""
    document = (ROOT / "docs" / "compat.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\d[\d.]*) \|.*\| (\d+) \|$", document, re.MULTILINE)
    assert {version for version, _ in lines} == set(standing.TESTED)
    assert not [version for version, faults in lines if faults != "0"]
