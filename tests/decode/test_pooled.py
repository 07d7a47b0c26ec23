"""VAE files on a pool of forked workers: the pack's driver, messages and runner against comfy.sd.VAE."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .files import write
from .pooled import LATENTS

TESTS = Path(__file__).resolve().parents[1]
CLOSE = 1e-5
Found = Callable[[Path], dict[str, Any]]

pytestmark = pytest.mark.timeout(1800)  # the first test of a ComfyUI waits for all of its results


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Results of `pooled.main` for a ComfyUI, computed once each."""
    known: dict[Path, dict[str, Any]] = {}

    def run(root: Path) -> dict[str, Any]:
        if root not in known:
            folder = tmp_path_factory.mktemp("vaes")
            write(folder, comfy_root=root)
            result = folder / "results.json"
            path = [str(TESTS), str(TESTS.parent / "workers" / "import_root"), os.environ.get("PYTHONPATH", "")]
            done = subprocess.run(
                [sys.executable, "-B", "-m", "decode.pooled", str(result), str(root), str(folder)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "CUDA_VISIBLE_DEVICES": ""},
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=1800,
            )
            assert done.returncode == 0, done.stdout
            known[root] = json.loads(result.read_text())
        return known[root]

    return run


@pytest.mark.parametrize("workers", (1, 3))
@pytest.mark.parametrize("name", LATENTS)
def test_seamless_equals_vae_decode(found: Found, comfy_root: Path, name: str, workers: int) -> None:
    """Also of a VAE that draws noise: the workers draw from the driver's state."""
    results = found(comfy_root)
    assert results[f"spread, {name}, {workers}"] > 1e-2
    assert results[f"seamless, {name}, {workers}"] <= (CLOSE if workers > 1 else 0)


@pytest.mark.parametrize("workers", (2, 3))
@pytest.mark.parametrize("name", ("wan", "wan batch", "wan image", "taesd batch"))
def test_tiles_are_vae_decode_tiled(found: Found, comfy_root: Path, name: str, workers: int) -> None:
    assert found(comfy_root)[f"tiles, {name}, {workers}"] is True


@pytest.mark.parametrize("name", ("wan", "wan image", "taesd", "ltxv"))
def test_encode_equals_vae_encode(found: Found, comfy_root: Path, name: str) -> None:
    assert found(comfy_root)[f"encode, {name}"] <= CLOSE


@pytest.mark.parametrize("way", ("seamless", "tiles"))
def test_without_shared_memory(found: Found, comfy_root: Path, way: str) -> None:
    assert found(comfy_root)[f"inline, {way}"] is True


def test_where_pixels_are(found: Found, comfy_root: Path) -> None:
    """In memory that has no name; on disk where there is none; gone with the IMAGE."""
    results = found(comfy_root)
    assert results["memory, mapped"] and not results["memory, mapped afterwards"]
    assert results["disk, equal"] and results["disk, mapped"] and not results["disk, mapped afterwards"]
    assert results["disk, names left"] == []


@pytest.mark.parametrize("way", ("seamless", "tiles"))
def test_cancel_between_frames(found: Found, comfy_root: Path, way: str) -> None:
    results = found(comfy_root)
    assert results[f"cancel, {way}"] == "yes"
    assert results[f"cancel, {way}, alive"] and results[f"cancel, {way}, again"]
    assert results["cancel, names left"] == []


def test_a_killed_worker_leaves_nothing(found: Found, comfy_root: Path) -> None:
    results = found(comfy_root)
    assert "Worker 1" in results["kill"] and "died during decode" in results["kill"]
    assert not results["kill, alive"] and not results["kill, mapped"] and results["kill, names left"] == []


def test_rows_mixed_by_hand_are_found(found: Found, comfy_root: Path) -> None:
    """No rule sees it, the self-test does."""
    results = found(comfy_root)
    assert "self-test is off by" in results["refused"] and "auto or tiles" in results["refused"]
    assert results["refused, auto"] and results["refused, alive"]


def test_a_file_that_is_no_vae(found: Found, comfy_root: Path) -> None:
    results = found(comfy_root)
    assert "broken.safetensors cannot be loaded" in results["broken"] and results["broken, alive"]


def test_smooth_video_has_no_seam(found: Found, comfy_root: Path) -> None:
    """Frames change across the borders of what each worker had as they do elsewhere."""
    seam, elsewhere = found(comfy_root)["smooth"]
    assert 0 < seam <= 1.5 * elsewhere
