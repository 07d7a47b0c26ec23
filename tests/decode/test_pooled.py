"""VAE files on a pool of forked workers: the pack's driver, messages and runner against comfy.sd.VAE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.conftest import SLOW

from .newer import NEWER
from .pooled import LATENTS

CLOSE = 1e-5
Found = Callable[[Path], dict[str, Any]]

pytestmark = pytest.mark.timeout(1800)  # the first test of a ComfyUI waits for all of its results


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


@SLOW
@pytest.mark.parametrize("mode", ("auto", "tiles"))
def test_sound_is_decoded_on_one_rank(found: Found, comfy_root: Path, mode: str) -> None:
    assert found(comfy_root)[f"sound, {mode}"]


@pytest.mark.parametrize("name", NEWER)
def test_newer_vaes_equal_comfyui_or_are_refused(found: Found, comfy_root: Path, name: str) -> None:
    """Those that cut pictures by themselves, or attend to all of one, are never cut into strips."""
    one, prefix = NEWER[name], f"newer, {name}, "
    results = {key.removeprefix(prefix): value for key, value in found(comfy_root).items() if key.startswith(prefix)}
    if not results:
        pytest.skip("this ComfyUI does not have it")
    assert results["spread"] > 1e-3 and results["auto"] and results["alive"]
    if one.way:
        assert results["way"] == one.way and results["inline"] and results["picture"]
    if one.refused[0]:
        assert one.refused[0] in results["seamless"] and "Set mode to auto or tiles" in results["seamless"]
    elif one.pixels:
        assert "tiles of its own" in results["tiles"] and "VAE Decode (Tiled)" in results["tiles"]
    if one.refused[1]:
        assert one.refused[1] in results["encode"] and "VAE Encode" in results["encode"]
    elif one.pixels:
        assert results["encode"] <= CLOSE and results["dealt out"] == (one.way == "own tiles")


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


def test_a_kept_vae_is_loaded_once(found: Found, comfy_root: Path) -> None:
    """By two workers: kept, kept, released, loaded again; then the file is another one by its time."""
    results = found(comfy_root)
    assert results["loads"] == [2, 2, 2, 4, 6] and results["loads, equal"]


def test_weights_are_the_files(found: Found, comfy_root: Path) -> None:
    """Also after they were on a device, in another type."""
    results = found(comfy_root)
    assert results["private bytes"] == 0
    assert results["on the device"] and results["bytes there"] == results["bytes wanted"] > 0
    assert results["bytes after"] == 0


@pytest.mark.parametrize("way", ("seamless", "tiles"))
def test_the_driver_holds_the_output_only(found: Found, comfy_root: Path, way: str) -> None:
    beside, output = found(comfy_root)[f"driver, {way}"]
    assert output > 25e6 and beside <= 0.1 * output
