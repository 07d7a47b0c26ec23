"""The page itself: a node from the menu and its help, a run with progress and a picture, and Cancel."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from comfy_raylight.tests.browser.canvas import Canvas
from comfy_raylight.tests.browser.files import ROOT
from comfy_raylight.tests.host.server import ComfyServer
from PIL import Image

DEMO = ROOT / "example_workflows" / "demo.json"
SCREENSHOTS = ROOT / ".host" / "screenshots"
"""Kept, to be looked at."""
LIMIT_S = 180


def wait_until(page: Canvas, condition: str) -> None:
    page.page.wait_for_function(condition, timeout=LIMIT_S * 1000, polling=50)


def test_run(page: Canvas, server: ComfyServer) -> None:
    """The button starts it, the bar moves, and the picture appears."""
    before = set(server.output.glob("raylight_demo_*.webp"))
    page.drop(DEMO)
    page.messages()
    page.page.evaluate(
        """() => {
            window.seen = []
            app.api.addEventListener("progress", ({detail}) => window.seen.push(detail.value))
            window.shown = []
            setInterval(() => {
                const sampler = app.graph.nodes.find(node => node.type === "XFuserKSamplerAdvanced")
                if (sampler?.progress) window.shown.push(sampler.progress)
            }, 20)
        }"""
    )
    page.run()
    wait_until(page, "() => window.shown.some(value => value > 0.3 && value < 1)")
    page.screenshot(SCREENSHOTS / f"{server.comfy.name}-running.png")
    wait_until(page, "() => app.nodeOutputs && Object.values(app.nodeOutputs).some(output => output.animated)")
    wait_until(page, "() => app.graph.nodes.find(node => node.type === 'RayReport').widgets?.some(w => w.value)")
    page.page.wait_for_timeout(1500)
    page.screenshot(SCREENSHOTS / f"{server.comfy.name}-finished.png")
    assert page.page.evaluate("() => new Set(window.shown).size") > 3, "the bar moved"
    report = page.page.evaluate("() => app.graph.nodes.find(node => node.type === 'RayReport').widgets[0].value")
    assert "Pool: 2 workers" in report and "Last run: 20 steps" in report
    (made,) = set(server.output.glob("raylight_demo_*.webp")) - before
    with Image.open(made) as animation:
        assert animation.size == (64, 64) and getattr(animation, "n_frames", 1) == 17


def test_cancel(page: Canvas) -> None:
    """The button in the page ends a run between two steps."""
    page.drop(DEMO)
    page.messages()
    page.page.evaluate(
        """() => {
            const sampler = app.graph.nodes.find(node => node.type === "XFuserKSamplerAdvanced")
            sampler.widgets.find(({name}) => name === "steps").value = 2000
            window.seen = []
            window.ended = ""
            app.api.addEventListener("progress", ({detail}) => window.seen.push(detail.value))
            app.api.addEventListener("execution_interrupted", () => window.ended = "interrupted")
            app.api.addEventListener("execution_success", () => window.ended = "finished")
        }"""
    )
    page.run()
    wait_until(page, "() => window.seen.length > 3")
    pressed = time.monotonic()
    page.page.get_by_role("button", name="Cancel current run").first.click()  # later pages have a second
    wait_until(page, "() => window.ended")
    assert page.page.evaluate("() => window.ended") == "interrupted"
    assert time.monotonic() - pressed < 10
    assert page.page.evaluate("() => Math.max(...window.seen)") < 1900


@pytest.mark.parametrize("name", ["Ray Init Actor", "Ray Report"])
def test_help(page: Canvas, server: ComfyServer, name: str) -> None:
    """A node from the library, and its page of help."""
    browser = page.page
    found = page.in_library(name)
    before = browser.evaluate("() => app.graph.nodes.length")
    found.drag_to(browser.locator("#graph-canvas"), target_position={"x": 900, "y": 500})
    browser.wait_for_function("before => app.graph.nodes.length > before", arg=before)
    told = page.help(found, name)
    page.screenshot(SCREENSHOTS / f"{server.comfy.name}-help-{name.replace(' ', '-')}.png")
    assert "Limits" in told.inner_text() and "Inputs" in told.inner_text()
    page.open()


def test_client(server: ComfyServer, tmp_path: Path) -> None:
    """The client of the examples queues the demo and saves what it makes."""
    command = [sys.executable, str(ROOT / "examples" / "client.py"), str(ROOT / "examples" / "api" / "demo.json")]
    done = subprocess.run(
        [*command, server.url], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step 20 of 20" in done.stdout
    assert any(path.suffix == ".webp" and path.stat().st_size > 1000 for path in tmp_path.iterdir())
