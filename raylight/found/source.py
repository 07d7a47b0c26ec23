"""A plan as the lines that one would write by hand."""

from __future__ import annotations

from ..cuts import Split
from ..plan import Blocks, Plan, Region, Site, Whole
from .cuts import Count, Nested, Same

STEP = "    "


def source(plan: Plan) -> str:
    """The plan as Python."""
    return _call("Plan", [_region(region) for region in plan.regions])


def _call(name: str, parts: list[str]) -> str:
    """A call with an argument a line."""
    lines = "".join(f"{part},\n" for part in parts)
    return f"{name}(\n{_indented(lines)})"


def _indented(text: str) -> str:
    return "".join(f"{STEP}{line}" for line in text.splitlines(keepends=True))


def _region(region: Region) -> str:
    parts = [_blocks(blocks) for blocks in region.blocks]
    if region.whole:
        parts.append("whole=" + _tuple([_whole(whole) for whole in region.whole]))
    if region.per_block:
        parts.append("per_block=True")
    return _call("Region", parts)


def _blocks(blocks: Blocks) -> str:
    parts = [f'at="{blocks.at}"', "streams=" + _dict(blocks.streams)]
    if blocks.shared:
        parts.append("shared=" + _dict(blocks.shared))
    parts.append("outputs=" + _tuple([_entry(stream) for stream in blocks.outputs]))
    parts.append("attention=" + _tuple([_site(site) for site in blocks.attention]))
    if blocks.order != ("x",):
        parts.append("order=" + _tuple([_text(name) for name in blocks.order]))
    return _call("Blocks", parts)


def _site(site: str | Site) -> str:
    if isinstance(site, str):
        return _text(site)
    parts = [f"at={_text(site.at)}", "order=" + _tuple([_text(name) for name in site.order or ()])]
    parts += ["also=" + _tuple([_text(name) for name in site.also])] if site.also else []
    parts += ["replicated_query=True"] if site.replicated_query else []
    return f"Site({', '.join(parts)})"


def _whole(whole: Whole) -> str:
    plain = whole.stream == Split(1)
    return f"Whole({_text(whole.at)}, {_text(whole.arg)}{'' if plain else ', ' + _entry(whole.stream)})"


def _entry(entry: object) -> str:
    if isinstance(entry, Split):
        names = [] if entry.over == ("x",) else [_text(name) for name in entry.over]
        grid = [f"grid={entry.grid}"] if entry.grid > 1 else []
        return f"Split({', '.join([str(entry.dim), *names, *grid])})"
    if isinstance(entry, Nested):
        return f"Nested({', '.join([_dict(dict(entry.entries)), *map(_value, entry.form)])})"
    if isinstance(entry, Same):
        return "Same()"
    if isinstance(entry, Count):
        return f"Count({', '.join(map(_text, entry.over))})"
    # dataclasses print as they are made
    return repr(entry).replace("'", '"')


def _dict(entries: object) -> str:
    assert hasattr(entries, "items")
    return "{" + ", ".join(f"{_value(key)}: {_entry(entry)}" for key, entry in entries.items()) + "}"


def _tuple(parts: list[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _value(value: object) -> str:
    return repr(value).replace("'", '"')


def _text(text: str) -> str:
    return f'"{text}"'
