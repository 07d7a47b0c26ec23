"""The README's table of families is the registry's; `--write-tables` brings it and docs/families.md up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.host import documents
from comfy_raylight.tests.host.large import LARGE

from . import tables
from .conftest import comfy_roots

pytestmark = pytest.mark.timeout(2000)  # it may be the first to want the ranks' results
PACK = Path(__file__).resolve().parents[2]
README = PACK / "README.md"
ERRORS = PACK / "docs" / "families.md"
REASONS, END = "<!-- reasons: written by the tests -->\n", "<!-- end of reasons -->\n"
SECTION = "## ComfyUI "
"""How each version's figures begin."""


def test_readme_table_is_current(request: pytest.FixtureRequest) -> None:
    text = README.read_text(encoding="utf-8")
    new = tables.with_table(text, tables.readme_table())
    if request.config.getoption("--write-tables"):
        README.write_text(new, encoding="utf-8", newline="\n")
    else:
        assert new == text, (
            "run `RAYLIGHT_TEST_LARGE=1 python tests/run.py tests/engine --write-tables` and commit the README"
        )


def test_reasons_are_current(request: pytest.FixtureRequest) -> None:
    text = ERRORS.read_text(encoding="utf-8")
    new = documents.with_table(text, REASONS, END, tables.reasons())
    if request.config.getoption("--write-tables"):
        ERRORS.write_text(new, encoding="utf-8", newline="\n")
    else:
        assert new == text, "run it with --write-tables, and commit docs/families.md"


def test_errors_are_written(request: pytest.FixtureRequest, run_ranks: Any) -> None:
    if not request.config.getoption("--write-tables"):
        pytest.skip("only with --write-tables")
    assert LARGE, "the table has every mesh: set RAYLIGHT_TEST_LARGE=1"
    text = ERRORS.read_text(encoding="utf-8")
    introduction = text[: text.index(SECTION)].rstrip("\n") + "\n"
    for root in comfy_roots():
        (path,) = root.values
        text = documents.with_section(text, introduction, str(root.id), tables.error_table(run_ranks(path)))
    ERRORS.write_text(text, encoding="utf-8", newline="\n")
