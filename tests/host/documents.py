"""Documents of the repository that have a table between two marks, which a command writes."""

from __future__ import annotations


def with_table(text: str, begin: str, end: str, table: str) -> str:
    """The document with what is between its marks replaced by the table."""
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    assert first and last, f"the document has lost a mark of its table: {begin.strip()}"
    return f"{before}{begin}{table}{end}{after}"
