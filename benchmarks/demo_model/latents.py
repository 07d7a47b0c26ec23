"""A video as Wan's latent, by a linear map: what the demo's model learns to make, and its VAE to turn into pixels.

Three of sixteen directions are those that ComfyUI's preview shows as red, green and blue, and hold the mean colour of a
patch of 4 x 8 x 8 pixels: the preview shows what will be there. The thirteen others hold the most frequent differences
of brightness inside a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .world import NIGHT, Scenes, painted

TIME, SPACE = 4, 8
CHANNELS = 16
FITTED = 96
"""Side of the pictures that the map is fitted to; it is the same for all sizes."""


@dataclass(frozen=True)
class Basis:
    """The map to normalised latents.

    Attributes:
        colour: (3, 16), what mean red, green and blue from -1 to 1 add.
        offset: (16,), the latent of mid grey.
        detail: (256, 16), what differences of brightness in a patch add.
    """

    colour: Tensor
    offset: Tensor
    detail: Tensor

    @staticmethod
    def fit(factors: Tensor, bias: Tensor, *, scenes: int = 256) -> Basis:
        """The basis for ComfyUI's preview factors (16, 3) and bias (3,)."""
        colour = torch.linalg.pinv(factors)
        frame, _ = torch.linalg.qr(torch.cat([factors, torch.eye(CHANNELS)], dim=1))
        others = frame[:, 3:]  # shown as no colour
        generator = torch.Generator().manual_seed(0)
        _, differences = _patches(painted(Scenes.draw(scenes, generator, side=FITTED), NIGHT))
        rows = differences.reshape(-1, TIME * SPACE * SPACE)
        rows = rows[rows.abs().amax(dim=1) > 0.05]
        values, vectors = torch.linalg.eigh((rows.T @ rows / len(rows)).double())
        main = vectors[:, -others.shape[1] :].flip(1).float()
        spread = values[-others.shape[1] :].flip(0).float().sqrt()
        detail = (main / spread) @ others.T
        return Basis(colour, -bias @ colour, detail)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (scenes, 16, n + 1, height / 8, width / 8) of pictures from -1 to 1, of 4 n + 1 frames.

        Args:
            pictures: (scenes, 3, frames, height, width).
        """
        mean, differences = _patches(pictures)
        latent = mean @ self.colour + self.offset + differences.flatten(4) @ self.detail
        return latent.movedim(-1, 1)


def _patches(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colours (scenes, time, rows, columns, 3), and brightness less its mean (..., 4, 8, 8), of the patches.

    The first frame is a patch by itself, as in Wan's VAE: it counts four times.
    """
    whole = torch.cat([pictures[:, :, :1].expand(-1, -1, TIME - 1, -1, -1), pictures], dim=2)
    split = whole.unflatten(2, (-1, TIME)).unflatten(4, (-1, SPACE)).unflatten(6, (-1, SPACE))
    split = split.permute(0, 2, 4, 6, 1, 3, 5, 7)
    mean = split.mean(dim=(-1, -2, -3))
    brightness = (split - mean[..., None, None, None]).sum(dim=4)
    return mean, brightness
