"""VAE files on a pool, against comfy.sd.VAE: `python -m decode.pooled COMFYUI_ROOT RESULTS FOLDER`."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from comfy_raylight.tests.engine.ranks import enter_comfy
from comfy_raylight.tests.weights.memory import Watch, private

from .families import random
from .newer import NEWER, make_small

Results = dict[str, Any]


def main(root: str, result: str, folder: str) -> None:
    """Run every check in one process, and write down what each found."""
    torch.set_num_threads(1)
    enter_comfy(root)
    logging.disable(logging.INFO)
    results: Results = {}
    with torch.inference_mode():
        for check in CHECKS:
            began = time.monotonic()
            try:
                check(results, Path(folder))
                results[f"seconds of {check.__name__}"] = time.monotonic() - began
                Path(result).write_text(json.dumps(results), encoding="utf-8")
            except Exception as error:
                raise RuntimeError(f"in {check.__name__}") from error


def pool(world: int, **more: Any) -> Any:
    from .local_pool import LocalPool

    return LocalPool(world, **more)


def spec(folder: Path, name: str) -> Any:
    from comfy_raylight.raylight.config import ModelSpec

    return ModelSpec.of(folder / f"{name}.safetensors", options=("vae",))


def vae(folder: Path, name: str) -> Any:
    from comfy_raylight.workers.worker.vae.loading import load_vae

    return load_vae(spec(folder, name))[0]


def flat(images: torch.Tensor) -> torch.Tensor:
    """Batches of videos as one row of frames, as VAEDecode returns them."""
    return images.reshape(-1, *images.shape[-3:])


def run(
    workers: Any, latent: torch.Tensor, of: Any, *, mode: str = "seamless", keep: bool = True, times: int = 1
) -> torch.Tensor:
    from comfy_raylight.workers.driver.decode import decode_on

    return decode_on(workers, latent, of, mode=mode, tiles=sizes(times), keep=keep)  # type: ignore[arg-type]


def sizes(times: int = 1) -> Any:
    """Tiles of 64 pixels and 8 frames, or that many times as large."""
    from comfy_raylight.workers.wire.vae_messages import TileSizes

    return TileSizes(size=64 * times, overlap=32 * times, frames=8 * times, frame_overlap=4 * times)


LATENTS = {
    "wan": (1, 16, 3, 13, 10),
    "wan batch": (2, 16, 2, 8, 6),
    "wan image": (1, 16, 1, 11, 10),
    "wan lower than ranks": (1, 16, 2, 2, 6),
    "taesd batch": (2, 4, 13, 10),
    "ltxv": (1, 128, 2, 5, 4),
}


def equal(results: Results, folder: Path) -> None:
    """Seamless against VAE.decode, and the same states of random generators."""
    files = {name: vae(folder, name) for name in ("wan", "taesd", "ltxv")}
    for world in (1, 3):
        workers = pool(world)
        for name, shape in LATENTS.items():
            latent, file = random(*shape, seed=3), name.split()[0]
            torch.manual_seed(11)
            wanted = flat(files[file].decode(latent))
            torch.manual_seed(11)
            found = run(workers, latent, spec(folder, file))
            assert found.shape == wanted.shape and found.dtype == wanted.dtype, (name, found.shape, wanted.shape)
            results[f"seamless, {name}, {world}"] = (found - wanted).abs().max().item()
            results[f"spread, {name}, {world}"] = wanted.std().item()
        workers.close()


def tiled(results: Results, folder: Path) -> None:
    """Tiles against VAEDecodeTiled, bit for bit."""
    nodes: Any = importlib.import_module("nodes")
    for world in (2, 3):
        workers = pool(world)
        for name in ("wan", "wan batch", "wan image", "taesd batch"):
            latent, file = random(*LATENTS[name], seed=3), name.split()[0]
            wanted = nodes.VAEDecodeTiled().decode(vae(folder, file), {"samples": latent}, 64, 32, 8, 4)[0]
            results[f"tiles, {name}, {world}"] = torch.equal(
                run(workers, latent, spec(folder, file), mode="tiles"), wanted
            )
        workers.close()


def encoded(results: Results, folder: Path) -> None:
    """Encoding against VAE.encode."""
    from comfy_raylight.workers.driver.decode import encode_on

    workers = pool(3)
    pictures = {"wan": (9, 70, 50, 3), "wan image": (1, 64, 48, 3), "taesd": (2, 61, 48, 3), "ltxv": (9, 96, 64, 3)}
    for name, shape in pictures.items():
        file = name.split()[0]
        pixels = random(*shape, seed=4).sigmoid()
        wanted = vae(folder, file).encode(pixels)
        found = encode_on(workers, pixels, spec(folder, file), keep=True)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype, (name, found.shape, wanted.shape)
        results[f"encode, {name}"] = ((found - wanted).abs().max() / wanted.abs().max()).item()
    workers.close()


def sound(results: Results, folder: Path) -> None:
    """What has no rows is decoded whole, on one rank."""
    if not (folder / "oobleck.safetensors").is_file():
        return
    workers, latent = pool(2), random(1, 64, 8, seed=3)
    wanted = vae(folder, "oobleck").decode(latent)
    for mode in ("auto", "tiles"):
        found = run(workers, latent, spec(folder, "oobleck"), mode=mode)
        results[f"sound, {mode}"] = torch.equal(found, wanted) and wanted.std().item() > 1e-4
    workers.close()


def newer(results: Results, folder: Path) -> None:
    """VAEs of ComfyUI 0.33: what ComfyUI's own nodes give, or an error that says why not."""
    from comfy_raylight.raylight.errors import UnsupportedError
    from comfy_raylight.workers.driver import decode
    from comfy_raylight.workers.driver.decode import encode_on
    from comfy_raylight.workers.wire.vae_messages import VAEPlan

    def words(call: Callable[[], torch.Tensor]) -> str:
        try:
            call()
        except UnsupportedError as error:
            return str(error)
        return ""

    nodes: Any = importlib.import_module("nodes")
    make_small()
    workers = pool(2)
    for name in [name for name, one in NEWER.items() if one.exists]:
        one, file, of = NEWER[name], vae(folder, name), spec(folder, name)
        latent = random(*one.latent, seed=3)
        whole = flat(file.decode(latent))
        if one.auto == "tiles":
            wanted = nodes.VAEDecodeTiled().decode(file, {"samples": latent}, 64, 32, 8, 4)[0]
        else:
            wanted = whole
        results[f"newer, {name}, spread"] = wanted.std().item()
        results[f"newer, {name}, auto"] = torch.equal(flat(run(workers, latent, of, mode="auto")), wanted)
        if one.way:
            found = [facts for facts in workers.call("plan_vae", VAEPlan(spec=of, shape=latent.shape)) if facts]
            results[f"newer, {name}, way"] = decode._way("auto", found)[0]
            with mock.patch.object(decode, "can_share", lambda *_: False):
                results[f"newer, {name}, inline"] = torch.equal(flat(run(workers, latent, of, mode="auto")), wanted)
            still = latent[:, :, :1]
            results[f"newer, {name}, picture"] = torch.equal(
                flat(run(workers, still, of, mode="auto")), flat(file.decode(still))
            )
        if one.refused[0]:
            results[f"newer, {name}, seamless"] = words(functools.partial(run, workers, latent, of))
        elif one.pixels:
            results[f"newer, {name}, tiles"] = words(functools.partial(run, workers, latent, of, mode="tiles"))
        if one.pixels:
            pixels = random(*one.pixels, seed=4).sigmoid()
            encode = functools.partial(encode_on, workers, pixels, of, keep=True)
            asked = VAEPlan(spec=of, shape=pixels.shape, encode=True)
            results[f"newer, {name}, dealt out"] = all(facts.own for facts in workers.call("plan_vae", asked) if facts)
            if one.refused[1]:
                results[f"newer, {name}, encode"] = words(encode)
            else:
                made, wanted = encode(), file.encode(pixels)
                results[f"newer, {name}, encode"] = ((made - wanted).abs().max() / wanted.abs().max()).item()
        results[f"newer, {name}, alive"] = workers.alive()
    workers.close()


def without_sharing(results: Results, folder: Path) -> None:
    """Where workers cannot open the driver's memory, bytes travel with the messages."""
    from comfy_raylight.workers.driver import decode

    workers, latent = pool(2), random(*LATENTS["wan"], seed=3)
    wanted = run(workers, latent, spec(folder, "wan"))
    tiles = run(workers, latent, spec(folder, "wan"), mode="tiles")
    can = decode.can_share
    decode.can_share = lambda *_: False
    try:
        results["inline, seamless"] = torch.equal(run(workers, latent, spec(folder, "wan")), wanted)
        results["inline, tiles"] = torch.equal(run(workers, latent, spec(folder, "wan"), mode="tiles"), tiles)
    finally:
        decode.can_share = can
    workers.close()


def on_disk(results: Results, folder: Path) -> None:
    """Without room in memory the pixels go to a file without a name, and the result is the same."""
    from comfy_raylight.workers.driver import output

    workers, latent = pool(2), random(*LATENTS["wan"], seed=3)
    wanted = run(workers, latent, spec(folder, "wan"))
    results["memory, mapped"] = mapped("memfd:raylight")
    room, output.memory_room = output.memory_room, lambda: 1 << 10
    try:
        found = run(workers, latent, spec(folder, "wan"))
        results["disk, equal"] = torch.equal(found, wanted)
        results["disk, mapped"] = mapped(tempfile.gettempdir())
    finally:
        output.memory_room = room
    results["disk, names left"] = left()
    del found, wanted
    results["disk, mapped afterwards"] = mapped(tempfile.gettempdir())
    results["memory, mapped afterwards"] = mapped("memfd:raylight")
    workers.close()


def mapped(name: str) -> bool:
    """Whether this process maps something of ours whose path has `name` in it."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(name in line and "raylight" in line for line in lines)


def left() -> list[str]:
    """Files of ours that have a name."""
    folders = {Path("/dev/shm"), Path(tempfile.gettempdir())}
    return [str(path) for folder in folders for path in folder.glob("raylight*") if path.is_file()]


def cancelled(results: Results, folder: Path) -> None:
    """The flag ends a decode between frames on all ranks; the pool goes on."""
    from comfy_raylight.raylight.errors import Cancelled

    flag = threading.Event()
    for mode, latent in (("seamless", random(1, 16, 9, 9, 10, seed=3)), ("tiles", random(1, 16, 9, 26, 26, seed=3))):
        workers = pool(2, interrupted=flag.is_set)
        small = run(workers, latent[:, :, :1], spec(folder, "wan"), mode=mode)
        progress_of(lambda done, total: flag.set() if done else None)
        try:
            run(workers, latent, spec(folder, "wan"), mode=mode)
            results[f"cancel, {mode}"] = "was not"
        except Cancelled:
            results[f"cancel, {mode}"] = "yes"
        finally:
            progress_of(None)
        flag.clear()
        results[f"cancel, {mode}, alive"] = workers.alive()
        again = run(workers, latent[:, :, :1], spec(folder, "wan"), mode=mode)
        results[f"cancel, {mode}, again"] = torch.equal(again, small)
        workers.close()
    results["cancel, names left"] = left()


def progress_of(show: Callable[[int, int], None] | None) -> None:
    """Have progress bars tell `show` instead of a canvas."""
    import comfy.utils

    hook = None if show is None else (lambda value, total, preview, **more: show(value, total))
    comfy.utils.set_progress_bar_global_hook(hook)


def killed(results: Results, folder: Path) -> None:
    """A worker that dies in a decode ends it, with nothing left behind."""
    from comfy_raylight.raylight.errors import WorkerError

    workers, latent = pool(2), random(1, 16, 9, 16, 10, seed=3)
    run(workers, latent[:, :, :1], spec(folder, "wan"))
    victim = workers.members[1].place.pid
    progress_of(lambda done, total: os.kill(victim, signal.SIGKILL) if done else None)
    began = time.monotonic()
    try:
        run(workers, latent, spec(folder, "wan"))
        results["kill"] = "was not"
    except WorkerError as error:
        results["kill"] = str(error)
    finally:
        progress_of(None)
    results["kill, seconds"] = time.monotonic() - began
    results["kill, alive"] = workers.alive()
    results["kill, names left"] = left()
    gc.collect()  # an error and the frames it came through hold one another
    results["kill, mapped"] = mapped("memfd:raylight")


def refused(results: Results, folder: Path) -> None:
    """A VAE that mixes rows by hand: found by measurement, tiles by auto, an error by seamless."""
    from comfy_raylight.raylight.errors import RaylightError, UnsupportedError

    def mix(runner: Any) -> None:
        """Have the VAE add the mean over rows, by a method that no rule sees."""
        load = runner._vaes._vae

        def loaded(of: Any) -> Any:
            found = load(of)
            model = found.first_stage_model
            if not hasattr(model, "plain"):
                model.plain = model.decode
                model.decode = lambda z: model.plain(z) + z.mean(-2, keepdim=True).mean()
            return found

        runner._vaes._vae = loaded

    workers, latent = pool(2, before=mix), random(*LATENTS["taesd batch"], seed=3)
    try:
        run(workers, latent, spec(folder, "taesd"))
        results["refused"] = ""
    except UnsupportedError as error:
        results["refused"] = str(error)
    results["refused, auto"] = run(workers, latent, spec(folder, "taesd"), mode="auto").isfinite().all().item()
    results["refused, alive"] = workers.alive()
    workers.close()
    broken = folder / "broken.safetensors"
    broken.write_bytes((folder / "taesd.safetensors").read_bytes()[:20] + b"x" * 30)
    workers = pool(2)
    try:
        run(workers, latent, spec(folder, "broken"))
        results["broken"] = ""
    except RaylightError as error:
        results["broken"] = str(error)
    results["broken, alive"] = workers.alive()
    workers.close()


def smooth(results: Results, folder: Path) -> None:
    """Change from frame to frame of a smooth video, at the first rows of strips and at all others."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 12), torch.linspace(0, 1, 10), indexing="ij")
    waves = [torch.sin(3 * (x + y) + channel + 0.3 * frame) for channel in range(16) for frame in range(3)]
    latent = torch.stack(waves).view(1, 16, 3, 12, 10)
    workers = pool(3)
    video = run(workers, latent, spec(folder, "wan"))
    workers.close()
    step = (video[1:] - video[:-1]).abs().mean((0, 2, 3))
    borders = [row for strip in (32, 64) for row in (strip - 1, strip)]
    elsewhere = [row for row in range(8, 88) if row not in borders]
    results["smooth"] = [step[borders].mean().item(), step[elsewhere].mean().item()]


def kept(results: Results, folder: Path) -> None:
    """A kept VAE is loaded once by each worker; a released one and a changed file anew."""
    from comfy_raylight.workers.worker.vae import vaes as module

    vaes: Any = module
    notes, file = folder / "loads", folder / "changing.safetensors"

    def count(runner: Any) -> None:
        load = vaes.load_vae

        def counted(of: Any) -> Any:
            with notes.open("a") as log:
                log.write(".")
            return load(of)

        vaes.load_vae = counted  # in the worker, which is a process of its own

    workers, latent = pool(2, before=count), random(*LATENTS["taesd batch"], seed=3)
    shutil.copy(folder / "taesd.safetensors", file)
    loads, pixels = [], []
    for keep in (True, True, False, True):
        pixels.append(run(workers, latent, spec(folder, "changing"), keep=keep))
        loads.append(len(notes.read_text()))
    os.utime(file)
    pixels.append(run(workers, latent, spec(folder, "changing")))
    loads.append(len(notes.read_text()))
    workers.close()
    results["loads"] = loads
    results["loads, equal"] = all(torch.equal(found, pixels[0]) for found in pixels)


def moved(results: Results, folder: Path) -> None:
    """Weights are the file's memory, are converted on the way to the device, and go home to the file."""
    from comfy_raylight.workers.mapping.mapped_patcher import ATTACHMENT
    from comfy_raylight.workers.worker.vae import loading as vae_loading

    plain, source = vae_loading.load_vae(spec(folder, "wan"))
    results["private bytes"] = private_bytes(plain.patcher.attachments[ATTACHMENT].homes, source)
    on_cpu, vae_loading.on_cpu = vae_loading.on_cpu, lambda: False
    try:
        half, source = vae_loading.load_vae(dataclasses.replace(spec(folder, "wan"), dtype="bfloat16"))
    finally:
        vae_loading.on_cpu = on_cpu
    homes = half.patcher.attachments[ATTACHMENT].homes
    elsewhere = torch.device("cpu", 0)  # `to` copies to it, as to any other device
    for _ in range(2):
        half.patcher.load(elsewhere, full_load=True)
        there = half.first_stage_model.state_dict()
        wanted = {key: value.bfloat16() for key, value in plain.first_stage_model.state_dict().items()}
        results["on the device"] = all(torch.equal(there[key], value) for key, value in wanted.items())
        results["bytes there"] = private_bytes(homes, source, now=True)
        results["bytes wanted"] = sum(value.nbytes for value in wanted.values())
        del there
        half.patcher.detach()
        results["bytes after"] = private_bytes(homes, source, now=True)


def private_bytes(homes: Any, source: Any, *, now: bool = False) -> int:
    """Bytes of weights that are not the file's memory, on the host or (`now`) wherever they are."""
    tensors = [home.parameter.detach() if now else home.tensor for home in homes.values()]
    return sum(tensor.nbytes for tensor in tensors if source.offset(tensor) is None)


def driver_memory(results: Results, folder: Path) -> None:
    """What a decode takes of the driver besides its output, which is shared memory: nothing of that size."""
    workers, latent = pool(2), random(1, 128, 3, 12, 12, seed=3)
    for mode in ("seamless", "tiles"):
        small = run(workers, latent[..., :2, :2, :2], spec(folder, "ltxv"), mode=mode, times=8)
        before = private([os.getpid()])
        with Watch(private, [os.getpid()]) as own:
            images = run(workers, latent, spec(folder, "ltxv"), mode=mode, times=8)
        results[f"driver, {mode}"] = [own.peak - before, images.nbytes]
        del images, small
    workers.close()


CHECKS = (
    equal,
    tiled,
    encoded,
    sound,
    newer,
    without_sharing,
    on_disk,
    kept,
    moved,
    driver_memory,
    cancelled,
    killed,
    refused,
    smooth,
)

if __name__ == "__main__":
    main(*sys.argv[1:4])
