"""The help pages and translations of the pack's nodes, made from what ComfyUI publishes of their classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .server import PACK_FOLDER

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ROOT / "benchmarks" / "help_texts"
PICTURES = ROOT / "web" / "docs" / "pictures"
Published = Mapping[str, Mapping[str, Any]]


class UntranslatedError(KeyError):
    """A text has no Chinese."""


def of_pack(published: Published) -> dict[str, Mapping[str, Any]]:
    """The pack's own nodes among all that are published."""
    return {name: info for name, info in sorted(published.items()) if PACK_FOLDER in info["python_module"]}


def files(nodes: Published) -> dict[str, str]:
    """Every file, by its path in the repository.

    Raises:
        UntranslatedError: a text has no Chinese.
    """
    notes = json.loads((TEXTS / "notes.json").read_text(encoding="utf-8"))
    chinese = json.loads((TEXTS / "chinese.json").read_text(encoding="utf-8"))
    found = {f"web/docs/{name}.md": page(name, info, notes.get(name, {})) for name, info in nodes.items()}
    english = {name: definition(info) for name, info in nodes.items()}
    found["locales/en/nodeDefs.json"] = _json(english)
    found["locales/zh/nodeDefs.json"] = _json({name: _translated(entry, chinese) for name, entry in english.items()})
    return found


def page(name: str, info: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """The help page of a node, in Markdown."""
    lines = [f"# {info['display_name']}", "", info["description"], ""]
    if (PICTURES / f"{name}.jpg").is_file():
        lines += [f"![{info['display_name']}, wired](pictures/{name}.jpg)", ""]
    if info.get("deprecated"):
        lines += ["This node is there for old files; new workflows do not need it.", ""]
    inputs = list(inputs_of(info))
    if inputs:
        lines += ["## Inputs", "", "| name | type | default | |", "|---|---|---|---|"]
    for label, kind, options, needed in inputs:
        default = options.get("default", "")
        shown = "" if default == "" else f"`{default}`"
        tooltip = options.get("tooltip", "").replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `{label}`{'' if needed else ' (optional)'} | {kind} | {shown} | {tooltip} |")
    if info["output"]:
        lines += ["", "## Outputs", "", "| name | type | |", "|---|---|---|"]
    tooltips = info.get("output_tooltips") or [""] * len(info["output"])
    lists = info["output_is_list"]
    for label, kind, tooltip, many in zip(info["output_name"], info["output"], tooltips, lists, strict=True):
        lines.append(f"| `{label}` | {kind}{' (list)' if many else ''} | {tooltip} |")
    for title in ("How to use it", "Limits"):
        if notes.get(title):
            lines += ["", f"## {title}", "", *(f"- {note}" for note in notes[title])]
    return "\n".join([*lines, ""])


def inputs_of(info: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], bool]]:
    """Name, type, options, and whether it must be there, of each input."""
    for part in ("required", "optional"):
        for name, (kind, *more) in info["input"].get(part, {}).items():
            yield name, "choice" if isinstance(kind, list) else kind, more[0] if more else {}, part == "required"


def definition(info: Mapping[str, Any]) -> dict[str, Any]:
    """A node's entry of nodeDefs.json, in English."""
    entry: dict[str, Any] = {"display_name": info["display_name"], "description": info["description"]}
    entry["inputs"] = {name: {"tooltip": options["tooltip"]} for name, _, options, _ in inputs_of(info)}
    tooltips = info.get("output_tooltips") or ()
    entry["outputs"] = {str(number): {"tooltip": tooltip} for number, tooltip in enumerate(tooltips)}
    return {name: value for name, value in entry.items() if value}


def strings(value: Any) -> Iterator[str]:
    """Every text in nested dicts."""
    if isinstance(value, str):
        yield value
    else:
        for part in value.values():
            yield from strings(part)


def _translated(value: Any, chinese: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _translated(part, chinese) for name, part in value.items()}
    if value not in chinese:
        raise UntranslatedError(f"benchmarks/help_texts/chinese.json has no {value!r}")
    return chinese[value]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
