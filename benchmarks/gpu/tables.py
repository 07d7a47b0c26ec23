"""What the benchmarks of this folder print: Markdown tables, and the same as JSON where a folder is named."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "RAYLIGHT_BENCHMARK_OUT"
"""Environment variable that names the folder for JSON; run.py sets it."""


class Table:
    """One table, printed row by row, so that a run that is cut short has shown what it found.

    Args:
        name: of its JSON file.
        columns: headings.
        digits: format of the numbers of a column, by its heading.
    """

    def __init__(self, name: str, columns: Sequence[str], **digits: str) -> None:
        self._name = name
        self._columns = list(columns)
        self._digits = digits
        self._rows: list[dict[str, Any]] = []
        print("\n| " + " | ".join(columns) + " |")
        print("|---" * len(columns) + "|", flush=True)

    def row(self, *values: Any) -> None:
        """Add one row, a value for every column."""
        row = dict(zip(self._columns, values, strict=True))
        self._rows.append(row)
        print("| " + " | ".join(self._shown(*cell) for cell in row.items()) + " |", flush=True)
        if folder := os.environ.get(FOLDER):
            text = json.dumps(self._rows, indent=1)
            (Path(folder) / f"{self._name}.json").write_text(text, encoding="utf-8")

    def _shown(self, column: str, value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return format(value, self._digits.get(column.split(" ", maxsplit=1)[0].replace("%", ""), ".3f"))
