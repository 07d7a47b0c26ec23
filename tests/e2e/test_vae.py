"""Decoding and encoding on the workers through ComfyUI's HTTP API, against ComfyUI's own nodes.

What is slow here is what `tests/decode` shows as well, without a server.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.decode.files import write
from comfy_raylight.tests.host import processes
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, LOADER, Case, PoolCase, pool
from comfy_raylight.tests.host.server import ComfyServer
from safetensors.torch import load_file

CLOSE = 1e-5
NODE = "decoder"
TILES = {"tile_size": 64, "overlap": 32, "temporal_size": 8, "temporal_overlap": 4}


@dataclass(frozen=True, kw_only=True)
class Latent:
    """A random latent for a VAE file."""

    vae: str
    channels: int
    height: int
    width: int = 10
    frames: int = 0
    batch: int = 1

    @property
    def inputs(self) -> dict[str, Any]:
        size = {"channels": self.channels, "frames": self.frames, "height": self.height, "width": self.width}
        return {**size, "batch": self.batch, "seed": 5, "empty": False}


WAN = Latent(vae="wan", channels=16, height=13, frames=3)
WAN_IMAGE = Latent(vae="wan", channels=16, height=11, frames=1)
WAN_BATCH = Latent(vae="wan", channels=16, height=8, frames=2, batch=2)
WAN_LOW = Latent(vae="wan", channels=16, height=2, frames=2)
TAESD = Latent(vae="taesd", channels=4, height=13, batch=2)
LTXV = Latent(vae="ltxv", channels=128, height=5, width=4, frames=2)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def stock(latent: Latent, *, tiled: bool = False) -> Prompt:
    """ComfyUI's own decode of a latent."""
    decoder = node("VAEDecodeTiled", samples=["latent", 0], vae=["vae", 0], **TILES)
    return {
        "latent": node("RLTestLatent", **latent.inputs),
        "vae": node("VAELoader", vae_name=f"{latent.vae}.safetensors"),
        NODE: decoder if tiled else node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "save": node("RLTestSavePixels", images=[NODE, 0], name=f"stock-{uuid.uuid4().hex}"),
    }


def on_pool(where: PoolCase) -> Prompt:
    """A model on the pool, for its RAY_ACTORS."""
    prompt = pool(Case(file="wan.safetensors", inputs=FAMILIES["wan"]), where)
    return {name: prompt[name] for name in ("init", LOADER)}


def ray(latent: Latent, *, workers: int = 2, release: bool = True, **widgets: Any) -> Prompt:
    """The pool's decode of a latent."""
    return {
        **on_pool(PoolCase(workers=workers)),
        "latent": node("RLTestLatent", **latent.inputs),
        NODE: node(
            "RayVAEDecodeDistributed",
            ray_actors=[LOADER, 0],
            samples=["latent", 0],
            vae_name=f"{latent.vae}.safetensors",
            vae_dtype="auto",
            release_vae=release,
            **{**TILES, **widgets},
        ),
        "save": node("RLTestSavePixels", images=[NODE, 0], name=f"ray-{uuid.uuid4().hex}"),
    }


def pixels(server: ComfyServer, name: str) -> torch.Tensor:
    """What the last prompt of `stock` or `ray` saved, under a name of its own: ComfyUI runs nothing twice."""
    (path,) = server.output.glob(f"{name}-*.safetensors")
    found = load_file(path)["pixels"].clone()
    path.unlink()
    return found


def shared_memory_files() -> set[str]:
    """Ours in the folder of named shared memory, and files of the temporary folder."""
    folders = [Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp"))]
    return {str(path) for folder in folders for path in folder.glob("raylight*") if path.is_file()}


@pytest.fixture(scope="module")
def vaes(server: ComfyServer, comfy_root: Path) -> Path:
    folder = server.base / "models" / "vae"
    write(folder, comfy_root=comfy_root)
    return folder


@pytest.fixture
def clean(server: ComfyServer) -> Any:
    before = shared_memory_files()
    yield
    assert shared_memory_files() == before
    for name in ("stock", "ray"):  # of a test that does not look at them
        for path in server.output.glob(f"{name}-*.safetensors"):
            path.unlink()


CASES = [
    pytest.param(WAN, 2, {}, "seamless", id="wan"),
    pytest.param(WAN, 3, {"mode": "seamless"}, "seamless", id="wan on 3", marks=SLOW),
    pytest.param(WAN_IMAGE, 2, {}, "seamless", id="wan image", marks=SLOW),
    pytest.param(WAN_BATCH, 2, {}, "seamless", id="wan batch", marks=SLOW),
    pytest.param(WAN_LOW, 3, {}, "seamless", id="wan lower than workers", marks=SLOW),
    pytest.param(TAESD, 2, {}, "seamless", id="taesd batch"),
    pytest.param(TAESD, 1, {}, "seamless", id="taesd alone", marks=SLOW),
    pytest.param(LTXV, 2, {}, "seamless", id="ltxv with noise", marks=SLOW),
    pytest.param(WAN, 2, {"mode": "tiles"}, "tiles", id="wan tiles"),
    pytest.param(WAN, 3, {"mode": "tiles"}, "tiles", id="wan tiles on 3", marks=SLOW),
    pytest.param(TAESD, 2, {"mode": "tiles"}, "tiles", id="taesd tiles", marks=SLOW),
]


@pytest.mark.usefixtures("vaes", "clean")
@pytest.mark.parametrize("latent,workers,widgets,way", CASES)
def test_equals_comfyui(  # noqa: PLR0917, fixtures and parameters
    server: ComfyServer, client: ComfyClient, latent: Latent, workers: int, widgets: dict[str, Any], way: str
) -> None:
    if latent is LTXV and version_of(server.comfy) == "0.3.75":
        pytest.skip("its VAELoader does not look at the sizes that a file names")
    tiled = way == "tiles"
    client.run(stock(latent, tiled=tiled))
    before = len(server.log())
    client.run(ray(latent, workers=workers, **widgets), timeout=400)
    a, b = pixels(server, "stock"), pixels(server, "ray")
    assert f", {way}" in server.log()[before:]
    assert a.shape == b.shape and a.dtype == b.dtype and a.std() > 1e-3
    if latent is LTXV:
        # its noise comes from the process's own state, which differs by then
        assert (a - b).abs().mean() < 0.2
    elif tiled:
        assert torch.equal(a, b)
    else:
        assert (a - b).abs().max() <= CLOSE


@pytest.mark.usefixtures("vaes", "clean")
def test_progress_counts_frames(server: ComfyServer, client: ComfyClient) -> None:
    found = client.run(ray(WAN, mode="seamless"), timeout=400)
    seen = [(value, most) for _, value, most in found.progress(NODE)]
    assert seen and seen[-1] == (9, 9) and seen == sorted(seen)


@SLOW
@pytest.mark.usefixtures("vaes", "clean")
def test_kept_until_the_file_changes(server: ComfyServer, client: ComfyClient) -> None:
    """A kept VAE is not loaded again; the model and the pool go on as before."""
    client.run(ray(WAN, release=False, overlap=0), timeout=400)
    first = pixels(server, "ray")
    client.run(ray(WAN, release=False, overlap=32), timeout=400)
    assert torch.equal(pixels(server, "ray"), first)


@SLOW
@pytest.mark.usefixtures("vaes", "clean")
def test_killed_worker(server: ComfyServer, client: ComfyClient) -> None:
    """The next prompt builds a new pool."""
    client.run(ray(WAN), timeout=400)
    first = pixels(server, "ray")
    long = Latent(vae="wan", channels=16, height=24, width=24, frames=15)
    prompt_id = client.queue(ray(long, mode="seamless"))
    wait_for_progress(client, prompt_id)
    victim = workers_of(server)[-1]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(PromptError, match="died"):
        client.wait(prompt_id, timeout=120)
    client.run(ray(WAN, overlap=0), timeout=400)
    assert torch.equal(pixels(server, "ray"), first)


@pytest.mark.usefixtures("vaes", "clean")
def test_interrupt(server: ComfyServer, client: ComfyClient) -> None:
    """Cancel ends a decode between frames; the workers live on."""
    long = Latent(vae="wan", channels=16, height=24, width=24, frames=15)
    prompt_id = client.queue(ray(long, mode="seamless", overlap=96))
    wait_for_progress(client, prompt_id)
    alive = workers_of(server)
    client.interrupt()
    with pytest.raises(PromptError) as caught:
        client.wait(prompt_id, timeout=120)
    assert caught.value.kind == "interrupted"
    client.run(ray(WAN, overlap=64), timeout=400)
    assert workers_of(server) == alive


@pytest.mark.usefixtures("vaes", "clean")
@pytest.mark.parametrize(
    "vae,frames", [("wan", 9), pytest.param("wan", 1, marks=SLOW), pytest.param("taesd", 2, marks=SLOW)]
)
def test_encode_equals_comfyui(server: ComfyServer, client: ComfyClient, vae: str, frames: int) -> None:
    picture = node("RLTestPixels", frames=frames, height=70, width=48, channels=3, smooth=False)
    plain = {
        "pixels": picture,
        "vae": node("VAELoader", vae_name=f"{vae}.safetensors"),
        "encoder": node("VAEEncode", pixels=["pixels", 0], vae=["vae", 0]),
        "save": node("RLTestSaveLatent", samples=["encoder", 0], name="stock"),
    }
    encoder = node(
        "RayVAEEncodeDistributed",
        ray_actors=[LOADER, 0],
        pixels=["pixels", 0],
        vae_name=f"{vae}.safetensors",
        vae_dtype="auto",
        release_vae=True,
    )
    save = node("RLTestSaveLatent", samples=["encoder", 0], name="ray")
    client.run(plain)
    client.run({**on_pool(PoolCase(workers=2)), "pixels": picture, "encoder": encoder, "save": save}, timeout=400)
    a, b = (load_file(server.output / f"{name}.safetensors")["samples"] for name in ("stock", "ray"))
    assert a.shape == b.shape and (a - b).abs().max() <= CLOSE * a.abs().max()


REFUSED = [
    pytest.param({"vae_name": "missing.safetensors"}, "not in list", id="missing"),
    pytest.param({"vae_name": "text.safetensors"}, "text.safetensors cannot be loaded", id="text"),
    pytest.param({"mode": "diagonal"}, "not in list", id="mode"),
]


@pytest.mark.parametrize("widgets,words", REFUSED)
def test_refused(client: ComfyClient, vaes: Path, widgets: dict[str, Any], words: str) -> None:
    (vaes / "text.safetensors").write_text("this is a text file\n" * 100)
    prompt = ray(WAN)
    prompt[NODE]["inputs"].update(widgets)
    with pytest.raises(PromptError, match=words):
        client.run(prompt, timeout=400)


def workers_of(server: ComfyServer) -> list[int]:
    return [process.pid for process in processes.workers(server.pid)]


def wait_for_progress(client: ComfyClient, prompt_id: str, *, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if any(event.kind == "progress" and int(event.data["value"]) > 0 for event in client.events_of(prompt_id)):
            return
        time.sleep(0.05)
    raise AssertionError("decoding did not begin")
