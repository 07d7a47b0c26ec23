"""A real ComfyUI server per version, with the pack in its custom_nodes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, Prompt
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.prompts import SAVE
from comfy_raylight.tests.host.server import ComfyServer
from safetensors.torch import load_file

Run = Callable[[Prompt], torch.Tensor]

FAMILIES = ("wan", "flux", "unet", *(("zimage",) if LARGE else ()))
"""Flux has 1.1 GB and Z-Image 1.8 GB of bf16, which a CPU casts at every call: seconds for a step."""


@pytest.fixture(scope="session")
def server(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfy")
    previews = ("--preview-method", "latent2rgb")
    server = ComfyServer(comfy_root, base=base, python=Path(sys.executable), threads=1, args=previews)
    models = server.models
    models.mkdir(parents=True, exist_ok=True)
    jobs = [Job(family=family, path=models / f"{family}.safetensors") for family in FAMILIES]
    write(jobs, comfy_root=comfy_root, python=Path(sys.executable))
    (models / "text.safetensors").write_text("this is a text file, whatever its name says\n" * 100)
    server.start()
    try:
        yield server
    finally:
        stubborn = server.stop()
    assert stubborn == [], "ComfyUI and all workers end when they are asked to"


@pytest.fixture(scope="session")
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def result(server: ComfyServer, client: ComfyClient) -> Run:
    """Runs a prompt and returns its latent; ComfyUI keeps nothing of it that the next one could take."""
    count = itertools.count()

    def run(prompt: Prompt) -> torch.Tensor:
        name = f"result{next(count)}"
        prompt[SAVE]["inputs"]["name"] = name
        client.run(prompt, timeout=600)
        return load_file(server.output / f"{name}.safetensors")["samples"]

    return run
