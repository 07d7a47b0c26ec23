"""Documents name what is there: files they link to, and messages as the code has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "web" / "docs").glob("*.md")]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
ROOMS = ("raylight", "patches", "loaders", "vae", "workers", "nodes", "web")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    missing = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()]
    assert not missing


def test_messages() -> None:
    """The table of errors goes by messages: a change of one changes its row."""
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".js")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*f?"', "", code)  # a string in several pieces is one
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")][1:]
    parts = [part.strip(" .") for row in messages for part in re.split(r"\.\.\.|\(|, Worker|, No", row)]
    parts = [part for part in parts if len(part) > 6]
    assert len(parts) >= 10
    assert not [part for part in parts if part not in code]
