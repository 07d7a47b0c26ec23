"""Videos of one coloured shape that moves over a plain ground, from side to side or off and on between the borders."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FRAMES, SIDE = 17, 64
"""Of the videos that the model learns; the VAE takes others as well."""
RADIUS = 15.0
SPEED = 3.0
"""Pixels per frame, where the scene says no other."""
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}


@dataclass(frozen=True)
class World:
    """Colours as red, green and blue from 0 to 1: those of the shapes by their word, and the ground's."""

    colours: dict[str, tuple[float, float, float]]
    ground: tuple[float, float, float]


NIGHT = World(
    {"red": (0.95, 0.25, 0.25), "green": (0.3, 0.85, 0.35), "blue": (0.3, 0.5, 1.0), "yellow": (1.0, 0.8, 0.2)},
    (0.07, 0.08, 0.14),
)
"""The model's world."""
PAPER = World(
    {"red": (0.75, 0.2, 0.45), "green": (0.1, 0.5, 0.45), "blue": (0.25, 0.25, 0.55), "yellow": (0.8, 0.5, 0.1)},
    (0.95, 0.91, 0.82),
)
"""The LoRA's."""
WORDS = (*NIGHT.colours, *SHAPES, *DIRECTIONS)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: per scene the numbers of its three words, and where the shape starts, in
    pixels (y, x); all shapes move at one speed, in pixels per frame, and bounce off the border."""

    colour: Tensor
    shape: Tensor
    direction: Tensor
    start: Tensor
    side: int = SIDE
    speed: float = SPEED

    @staticmethod
    def draw(count: int, generator: torch.Generator, *, side: int = SIDE) -> Scenes:
        """Scenes drawn evenly, of pictures of `side` pixels; shapes start anywhere."""

        def number(below: int) -> Tensor:
            return torch.randint(below, (count,), generator=generator)

        start = RADIUS + torch.rand(count, 2, generator=generator) * (side - 2 * RADIUS)
        return Scenes(number(len(NIGHT.colours)), number(len(SHAPES)), number(len(DIRECTIONS)), start, side)

    def across(self) -> Scenes:
        """The same where shapes start at the side they come from, and end at the other one with the last frame.

        So each frame shows which way: with shapes that start anywhere, only what changes does, which takes a small
        model long to learn.
        """
        velocity = torch.tensor(list(DIRECTIONS.values()))[self.direction]
        low, high = RADIUS, self.side - RADIUS
        side = torch.where(velocity > 0, low, high)
        start = torch.where(velocity == 0, self.start, side)
        return replace(self, start=start, speed=(high - low) / (FRAMES - 1))

    def words(self) -> Tensor:
        """Numbers of each scene's words in `WORDS`, (scenes, 3)."""
        colours, shapes = len(NIGHT.colours), len(SHAPES)
        return torch.stack([self.colour, self.shape + colours, self.direction + colours + shapes], dim=1)


def cover(scenes: Scenes, frames: int = FRAMES) -> Tensor:
    """How much of each pixel the shape covers, from 0 to 1: (scenes, frames, side, side)."""
    velocity = torch.tensor(list(DIRECTIONS.values()))[scenes.direction] * scenes.speed
    at = scenes.start[:, None] + velocity[:, None] * torch.arange(frames)[None, :, None]
    low, span = RADIUS, scenes.side - 2 * RADIUS
    at = low + span - ((at - low) % (2 * span) - span).abs()  # bounces
    pixels = torch.arange(scenes.side) + 0.5
    y = (pixels[None, None, :] - at[..., 0:1])[..., :, None]
    x = (pixels[None, None, :] - at[..., 1:2])[..., None, :]
    distances = torch.stack(torch.broadcast_tensors(*_distances(y, x)))
    chosen = distances[scenes.shape, torch.arange(len(scenes.shape))]
    return (0.5 - chosen).clamp(0, 1)


def paint(covered: Tensor, colour: Tensor, ground: Tensor) -> Tensor:
    """Pictures from -1 to 1, (scenes, 3, frames, side, side); colours per scene, (scenes, 3)."""
    part = covered[:, None]
    picture = part * colour[:, :, None, None, None] + (1 - part) * ground[:, :, None, None, None]
    return picture * 2 - 1


def painted(scenes: Scenes, world: World) -> Tensor:
    """The scenes in the colours of a world."""
    colours = torch.tensor(list(world.colours.values()))[scenes.colour]
    return paint(cover(scenes), colours, torch.tensor(world.ground).expand_as(colours))


def _distances(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed distance to the border of each of SHAPES around the origin, in pixels, negative inside."""
    circle = (y * y + x * x).sqrt() - RADIUS
    square = torch.maximum(y.abs(), x.abs()) - RADIUS * 0.85
    slope = 5**0.5  # the sides rise by two pixels for each to the inside
    triangle = torch.maximum((2 * x.abs() - y - RADIUS) / slope, y - RADIUS * 0.9)
    return circle, square, triangle
