"""ComfyUI's page, driven in headless Chromium: files dropped on it, what it then holds, and its buttons."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZE: Any = {"width": 1600, "height": 1000}
LARGE = {"width": 2400, "height": 1350}
PADDING = 24
TIMEOUT_MS = 60_000
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasInfo": False, "Comfy.Minimap.Visible": False}
"""So that no greeting covers the canvas."""
NO_CHROMIUM = "no Chromium: apt-get install chromium, and pip install playwright"


def chromium() -> str:
    """The browser's command, or "" where there is none that can be driven."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return ""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


class Canvas:
    """ComfyUI's page.

    Attributes:
        page: Playwright's.
        errors: what the page's own scripts reported.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.request.post(f"{url}/api/settings", data=SETTINGS)
        self.url = url
        self.open()

    def open(self) -> None:
        """Load the page, anew where it is loaded."""
        page = self.page
        page.goto(self.url)
        page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=TIMEOUT_MS)
        page.wait_for_selector("#graph-canvas, canvas", timeout=TIMEOUT_MS)
        page.wait_for_timeout(1500)
        page.keyboard.press("Escape")

    def drop(self, path: Path) -> None:
        """Drop a file on the canvas, as a user does."""
        data = self.page.evaluate_handle(
            """([text, name]) => {
                const data = new DataTransfer()
                data.items.add(new File([text], name, {type: "application/json"}))
                return data
            }""",
            [path.read_text(encoding="utf-8"), path.name],
        )
        self.page.evaluate("() => { window.before = app.graph.nodes[0] ?? null }")
        for kind in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event("#graph-canvas", kind, {"dataTransfer": data})
        changed = "() => app.graph.nodes.length && app.graph.nodes[0] !== window.before"
        self.page.wait_for_function(changed, timeout=TIMEOUT_MS)
        self.page.wait_for_timeout(300)

    def load_prompt(self, prompt: dict[str, Any], name: str, note: str) -> None:
        """Open an API prompt, arrange its nodes, and put a note beside them."""
        self.page.evaluate(
            """async ([prompt, name, note]) => {
                app.clean()  // pictures of nodes with the same numbers
                await app.loadApiJson(prompt, name)
                app.graph.arrange(60)
                for (const widget of app.graph.nodes.flatMap(node => node.widgets ?? []))
                    if (widget.name === "control_after_generate") widget.value = "fixed"
                const text = LiteGraph.createNode("MarkdownNote")
                app.graph.add(text)
                text.widgets[0].value = note
                text.size = [420, 300]
                text.pos = [-460, 40]
                text.title = name
            }""",
            [prompt, name, note],
        )
        self.page.wait_for_timeout(300)

    def fit(self) -> None:
        """Show all nodes, in full at any size."""
        self.page.evaluate(
            """() => {
                app.canvas.low_quality_zoom_threshold = app.canvas.min_font_size_for_lod = 0
                return app.extensionManager.command.execute("Comfy.Canvas.FitView")
            }"""
        )
        self.page.wait_for_timeout(1000)

    def picture(self, path: Path, *, quality: int = 80, largest: float = 10.0) -> None:
        """A JPEG of all nodes and nothing else, large enough to read.

        Args:
            largest: pixels for each of the canvas's, at most.
        """
        self.page.add_style_tag(content=".p-toast, .p-toast-message, .p-message { display: none !important }")
        self.page.set_viewport_size(LARGE)
        self.fit()
        self.page.evaluate(
            """largest => {
                const {ds, canvas} = app.canvas
                if (ds.scale > largest) ds.changeScale(largest, [canvas.clientWidth / 2, canvas.clientHeight / 2])
                app.canvas.setDirty(true, true)
            }""",
            largest,
        )
        self.page.wait_for_timeout(300)
        left, top, right, bottom = self.page.evaluate(
            """() => {
                const boxes = app.graph.nodes.map(node => node.boundingRect ?? node.getBounding())
                const {scale, offset} = app.canvas.ds
                const {left, top} = app.canvas.canvas.getBoundingClientRect()
                const ends = boxes.map(([x, y, width, height]) => [x, y, x + width, y + height])
                const at = [0, 1, 2, 3].map(n => (n < 2 ? Math.min : Math.max)(...ends.map(end => end[n])))
                return at.map((value, n) => (value + offset[n % 2]) * scale + (n % 2 ? top : left))
            }"""
        )
        clip = {"x": max(0, left - PADDING), "y": max(0, top - PADDING)}
        clip["width"] = min(LARGE["width"], right + PADDING) - clip["x"]
        clip["height"] = min(LARGE["height"], bottom + PADDING) - clip["y"]
        self.screenshot(path, type="jpeg", quality=quality, clip=clip)

    def workflow(self) -> dict[str, Any]:
        """The canvas as a file."""
        # by itself Playwright hands over null for what is left out
        return dict(json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())")))

    def prompt(self) -> dict[str, Any]:
        """The canvas as an API prompt."""
        return dict(json.loads(self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)")))

    def run(self) -> None:
        """Press Run. Later pages have another button of that name behind it, which opens a menu."""
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def in_library(self, name: str) -> Any:
        """A node's entry in the node library, by its name."""
        self.page.get_by_role("button", name="Node Library (n)").click()
        self.page.get_by_placeholder(re.compile(r"^Search( Nodes)?\.\.\.$")).fill(name)
        found = self.page.locator(".p-tree-node-content, div[role=treeitem]").filter(has_text=name).first
        found.wait_for()
        return found

    def help(self, entry: Any, title: str) -> Any:
        """Open a node's help: with the button at its entry in the library or, on later pages, above the node itself."""
        entry.hover()
        if entry.locator(".help-button").count():
            entry.locator(".help-button").click()
        else:
            self.page.evaluate(
                "title => app.canvas.selectItems([app.graph.nodes.findLast(node => node.title === title)])", title
            )
            self.page.get_by_role("button", name="Node Info").click()
        told = self.page.locator(".node-help-content")
        told.get_by_text("How to use it").wait_for()
        return told

    def refused(self) -> str:
        """Why ComfyUI would refuse the canvas; "" where it would not."""
        answer = self.page.evaluate(
            """async prompt => {
                const body = JSON.stringify({prompt})
                return await (await fetch("/raylight-test/validate", {method: "POST", body})).json()
            }""",
            self.prompt(),
        )
        return "" if answer["fine"] else str({**answer, "nodes": answer["nodes"] or answer["error"]})

    def unknown(self) -> list[str]:
        """Types of nodes on the canvas that ComfyUI does not know, or draws in red for another reason.

        Later pages also mark a picture in a folder of `input`, where pasted ones lie: it is not in LoadImage's list,
        but ComfyUI takes it.
        """
        found: list[str] = self.page.evaluate(
            """() => app.graph.nodes
                .filter(node => !LiteGraph.registered_node_types[node.type]
                    || node.has_errors && !(node.type === "LoadImage" && node.widgets[0].value.includes("/")))
                .map(node => node.type)"""
        )
        return found

    def messages(self) -> list[str]:
        """Texts that popped up in the corner, which are closed."""
        found: list[str] = self.page.evaluate(
            """() => [...document.querySelectorAll(".p-toast-message")].map(message => {
                message.querySelector("button")?.click()
                return message.innerText
            })"""
        )
        self.page.wait_for_timeout(600)
        return found

    def dialogs(self) -> list[str]:
        """Texts of open dialogs."""
        found: list[str] = self.page.evaluate(
            "() => [...document.querySelectorAll('[role=dialog]')].map(dialog => dialog.innerText)"
        )
        return found

    def screenshot(self, path: Path, **options: Any) -> None:
        """Keep a picture of the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path), **options)


@contextmanager
def opened(url: str) -> Iterator[Canvas]:
    """The page of the ComfyUI at this address."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        try:
            yield Canvas(browser.new_page(viewport=SIZE), url)
        finally:
            browser.close()
