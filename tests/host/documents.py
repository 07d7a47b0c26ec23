"""Documents of the repository that have a table between two marks, which a command writes."""

from __future__ import annotations

import re


def with_table(text: str, begin: str, end: str, table: str) -> str:
    """The document with what is between its marks replaced by the table."""
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    assert first and last, f"the document has lost a mark of its table: {begin.strip()}"
    return f"{before}{begin}{table}{end}{after}"


def with_section(text: str, introduction: str, version: str, section: str) -> str:
    """A document with a section for each ComfyUI, newest first: one is replaced, the others stay as they are."""
    found = re.findall(r"^## ComfyUI (\S+)\n\n(.*?)(?=\n## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    sections = {**{name: body.strip("\n") + "\n" for name, body in found}, version: section}
    order = sorted(sections, key=lambda name: [int(part) for part in re.findall(r"\d+", name)], reverse=True)
    return "\n".join([introduction, *(f"## ComfyUI {name}\n\n{sections[name]}" for name in order)])
