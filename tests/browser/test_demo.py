"""The demo makes what its three words say, with the model, the GGUF file and the LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.tests.browser import files
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.server import ComfyServer
from PIL import Image, ImageSequence

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Rows and columns of the picture, by word."""
FILLS = {"triangle": (0.45, 0.74), "circle": (0.74, 0.89), "square": (0.89, 1.0)}
"""Part of its bounding box that a shape takes."""
CASES = [
    ("demo", "red", "circle", "right"),
    ("demo", "green", "triangle", "up"),
    ("demo", "blue", "square", "left"),
    ("demo", "yellow", "circle", "down"),
    ("demo_gguf", "blue", "circle", "right"),
    ("demo_lora", "red", "square", "down"),
]


def frames(client: ComfyClient, server: ComfyServer, name: str, *words: str) -> torch.Tensor:
    """The animation that a prompt of the examples makes of other words: [frames, rows, columns, 3], 0 to 1."""
    outputs: Any = client.run(files.demo_prompt(words, name)).outputs
    (made,) = [entry for found in outputs.values() for entry in found.get("images", ()) if ".webp" in entry["filename"]]
    with Image.open(Path(server.output, made["filename"])) as animation:
        pictures = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
    shown = torch.stack([torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures])
    return shown.view(len(pictures), *pictures[0].size[::-1], 3) / 255


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_words(client: ComfyClient, server: ComfyServer, case: tuple[str, str, str, str]) -> None:
    name, colour, shape, direction = case
    shown = frames(client, server, name, colour, shape, direction)
    assert shown.shape == (17, 64, 64, 3)
    ground = shown[:, :4, :4].mean((0, 1, 2))
    assert (ground.mean() > 0.6) == (name == "demo_lora"), "paper is bright, the night is not"
    apart = (shown - ground).abs().sum(-1)
    weight = apart * (apart > apart.amax() / 3)
    weight = weight / weight.sum((1, 2), keepdim=True)
    at = torch.arange(64.0)
    place = torch.stack([(weight.sum(2) * at).sum(1), (weight.sum(1) * at).sum(1)], 1)
    moved, way = place[-1] - place[0], torch.tensor(DIRECTIONS[direction])
    assert (moved * way).sum() > 15 > 3 * (moved * way.flip(0)).sum().abs(), f"it moves by {moved.tolist()}"
    seen = (shown * weight[..., None]).sum((0, 1, 2)) / len(shown)
    if name != "demo_lora":
        strong = {"red": [0], "green": [1], "blue": [2], "yellow": [0, 1]}[colour]
        weak = [channel for channel in range(3) if channel not in strong]
        assert seen[strong].min() > seen[weak].max() + 0.1, f"its colour is {seen.tolist()}"
        low, high = FILLS[shape]
        inside = sorted(fill(frame > frame.max() / 2) for frame in apart[4:13])
        assert low < inside[len(inside) // 2] < high, f"it fills {inside} of its box"


def fill(mask: torch.Tensor) -> float:
    """Part of the bounding box of a mask [rows, columns] that it takes."""
    sides = [found[-1] - found[0] + 1 for found in (mask.any(dim).nonzero() for dim in (0, 1))]
    return float(mask.sum() / (sides[0] * sides[1]))
