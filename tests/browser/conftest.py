"""A real ComfyUI with the demo's files and those that workflows name, and its page in a browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_raylight.tests.browser import files, old_files
from comfy_raylight.tests.browser.canvas import NO_CHROMIUM, Canvas, chromium, opened
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.server import ComfyServer


@pytest.fixture(scope="package")
def server(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("page")
    files.copy_demo(base)
    files.write_named(base, [*old_files.write(base / "old"), *files.OLD, *files.PROMPTS])
    previews = ("--preview-method", "latent2rgb")
    python = Path(sys.executable)
    with ComfyServer(comfy_root, base=base, python=python, threads=1, args=previews, folder="raylight") as server:
        yield server


@pytest.fixture(scope="package")
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="package")
def page(server: ComfyServer) -> Iterator[Canvas]:
    if not chromium():
        pytest.skip(NO_CHROMIUM)
    with opened(server.url) as canvas:
        yield canvas
