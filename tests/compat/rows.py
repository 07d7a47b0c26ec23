"""A row of the table, and the file that a part writes its rows to, one by one: what it has found outlives it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["right", "found", "wrong", "refused", "new", "absent"]
TEXT_LIMIT = 400
"""Characters of what is told of a row; logs and tracebacks have more."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was tried.

    Attributes:
        part: of the table.
        name: of the thing.
        state: "found" to be right by a plan that nobody wrote, "refused" by name, "new" to the pack, or "absent" from
            this ComfyUI; all else is right or wrong.
        detail: what is to be said of it.
        fault: whether something should change: all that is wrong, and a refusal of what the pack claims to do.
    """

    part: str
    name: str
    state: State
    detail: str = ""
    fault: bool = False

    @property
    def line(self) -> str:
        """The row as plain text."""
        return f"{self.part:9} {self.name:34} {self.state:8} {self.detail}".rstrip()


def wrong(part: str, name: str, detail: str) -> Row:
    return Row(part=part, name=name, state="wrong", detail=short(detail), fault=True)


def short(text: str) -> str:
    """A text as one line, its end where it is long: errors come last."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT_LIMIT else f"... {line[-TEXT_LIMIT:]}"


def chosen(patterns: Sequence[str], part: str, name: str) -> bool:
    """Whether one of the patterns, as families/Wan*, is that of a row."""
    return any(fnmatch.fnmatchcase(f"{part}/{name}", pattern) for pattern in patterns)


def write(path: Path, row: Row) -> None:
    """Add a row to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Row(**json.loads(line)) for line in lines]
