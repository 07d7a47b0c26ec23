"""Draws the icon and the banner that the registry shows: rays from one light through as many workers.

python benchmarks/brand.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).resolve().parents[1] / "assets"
GROUND, INK = (17, 19, 28), (236, 238, 245)
RAYS = ((240, 82, 82), (255, 176, 64), (255, 214, 80), (98, 196, 130), (86, 156, 255), (170, 120, 245))
SMOOTH = 4
"""Pixels drawn for each that is kept."""


def rays(canvas: ImageDraw.ImageDraw, *, left: float, top: float, side: float) -> None:
    """A light at the left, a ray to each worker at the right."""
    x, y = left + 0.16 * side, top + 0.5 * side
    end, size = left + 0.78 * side, 0.055 * side
    for number, colour in enumerate(RAYS):
        to = top + side * (0.16 + 0.68 * number / (len(RAYS) - 1))
        canvas.line((x, y, end + size, to), colour, round(0.028 * side))
        canvas.rounded_rectangle((end, to - size, end + 2 * size, to + size), 0.4 * size, colour)
    canvas.ellipse((x - 0.1 * side, y - 0.1 * side, x + 0.1 * side, y + 0.1 * side), INK)


def icon(side: int = 400) -> Image.Image:
    """A square with round corners."""
    image = Image.new("RGBA", (side * SMOOTH, side * SMOOTH))
    canvas = ImageDraw.Draw(image)
    canvas.rounded_rectangle((0, 0, side * SMOOTH - 1, side * SMOOTH - 1), 0.16 * side * SMOOTH, GROUND)
    rays(canvas, left=0, top=0, side=side * SMOOTH)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def banner(width: int = 1344, height: int = 576) -> Image.Image:
    """Of the registry's 21 : 9."""
    image = Image.new("RGB", (width * SMOOTH, height * SMOOTH), GROUND)
    canvas = ImageDraw.Draw(image)
    rays(canvas, left=0.02 * width * SMOOTH, top=0.05 * height * SMOOTH, side=0.9 * height * SMOOTH)
    x = 0.44 * width * SMOOTH
    for text, size, y in (
        ("Raylight", 120, 0.3),
        ("one picture or video on several GPUs,", 42, 0.56),
        ("inside ComfyUI", 42, 0.66),
    ):
        canvas.text((x, y * height * SMOOTH), text, INK, ImageFont.load_default(size * SMOOTH))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    """Write both."""
    ASSETS.mkdir(exist_ok=True)
    icon().save(ASSETS / "icon.png", optimize=True)
    banner().save(ASSETS / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
