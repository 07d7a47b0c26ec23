"""Help pages, translations and aliases: every node has them, made from what it says of itself now."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfy_raylight.tests.host import help_pages
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.help_pages import ROOT, TEXTS
from comfy_raylight.tests.host.server import PACK_FOLDER

from .interface import NODES

FOLDERS = {"en": ROOT / "locales" / "en", "zh": ROOT / "locales" / "zh"}


@pytest.fixture(scope="module")
def nodes(client: ComfyClient) -> dict[str, Any]:
    return dict(help_pages.of_pack(client.object_info()))


def test_up_to_date(nodes: dict[str, Any]) -> None:
    """`python benchmarks/help.py --write` brings them up to date."""
    stale = []
    for name, text in help_pages.files(nodes).items():
        written = (ROOT / name).read_text(encoding="utf-8")
        if name.endswith(".json"):  # it has nodes of all versions of ComfyUI
            entries = json.loads(written)
            same = all(entries.get(node) == entry for node, entry in json.loads(text).items())
        else:
            same = written == text
        stale += [] if same else [name]
    assert not stale


@pytest.mark.parametrize("node", NODES)
def test_page_and_translations(node: str) -> None:
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith("# ") and "\n## " in page
    for folder in FOLDERS.values():
        entry = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))[node]
        assert entry["display_name"] and entry["description"]
        assert set(entry["inputs"]) == {*NODES[node].required, *NODES[node].optional}


def test_nothing_is_left_over() -> None:
    """Pages, entries and Chinese of nodes and texts that are gone."""
    pages = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    entries = [set(json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))) for folder in FOLDERS.values()]
    assert pages == set(NODES) and all(found == set(NODES) for found in entries)
    english = json.loads((FOLDERS["en"] / "nodeDefs.json").read_text(encoding="utf-8"))
    used = set(help_pages.strings(english))
    assert json.loads((TEXTS / "chinese.json").read_text(encoding="utf-8")).keys() == used
    assert set(json.loads((TEXTS / "notes.json").read_text(encoding="utf-8"))) <= set(NODES)


def test_chinese_is_chinese() -> None:
    """Each sentence of it; names of products alone may stay as they are."""
    chinese = json.loads((TEXTS / "chinese.json").read_text(encoding="utf-8"))
    plain = [text for text in chinese.values() if not any("\u4e00" <= letter <= "\u9fff" for letter in text)]
    assert set(plain) <= {"TeaCache (Ray)", "EasyCache (Ray)"}


def test_published(client: ComfyClient, nodes: dict[str, Any]) -> None:
    """ComfyUI serves all of it, and finds nodes by other words where it can."""
    translations = client.get("/i18n")
    assert translations["zh"]["nodeDefs"]["RayInitializer"]["display_name"] == "Ray 初始化"
    extensions = client.get("/extensions")
    assert {f"/extensions/{PACK_FOLDER}/{name}" for name in ("mend.js", "report.js")} <= set(extensions)
    assert nodes["RayVAELoader"]["deprecated"] and not nodes["RayUNETLoader"].get("deprecated")
    without = [name for name, info in nodes.items() if not info.get("search_aliases", ["as of ComfyUI 0.20"])]
    assert not without
