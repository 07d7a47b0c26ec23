"""The report on a pool as a picture: memory of each worker, where a step's time went, speed-up predicted and seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

from .report import PoolReport, mib

WIDTH, MARGIN, LABEL = 760, 20, 150
BAR, GAP, HEAD = 22, 8, 34
GROUND, INK, FAINT = (24, 26, 32), (230, 232, 238), (58, 62, 74)
COLOURS = {
    "weights on the device": (86, 156, 255),
    "other memory": (122, 128, 150),
    "computing": (98, 196, 130),
    "workers": (98, 196, 130),
    "exchanging": (255, 176, 64),
    "driver": (190, 130, 240),
    "seen": (98, 196, 130),
    "predicted": (122, 128, 150),
}


Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Parts = tuple[tuple[str, float], ...]
"""Name of the colour, and length."""


@dataclass(frozen=True)
class Bar:
    """A row, and what is written behind it."""

    label: str
    parts: Parts
    text: str


def draw(report: PoolReport) -> torch.Tensor:
    """The chart as ComfyUI's IMAGE: (1, height, width, 3), float32 from 0 to 1."""
    sections = _sections(report)
    rows = sum(HEAD + GAP + len(bars) * (BAR + GAP) for _, bars in sections)
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + max(rows, HEAD)), GROUND)
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    y = MARGIN
    if not sections:
        canvas.text((MARGIN, y), "No worker is running", INK, font)
    for title, bars in sections:
        _heading(canvas, font, y, title, [name for bar in bars for name, _ in bar.parts])
        y += HEAD
        longest = max(sum(length for _, length in bar.parts) for bar in bars) or 1.0
        for bar in bars:
            _bar(canvas, font, y, bar, longest)
            y += BAR + GAP
        y += GAP
    return torch.from_numpy(numpy.asarray(image).astype(numpy.float32) / 255)[None]


def _sections(report: PoolReport) -> list[tuple[str, list[Bar]]]:
    sections = []
    if report.workers:
        memory = []
        for worker in report.workers:
            weights = sum(model.resident for model in worker.models)
            taken = worker.device_bytes or worker.host_bytes
            # on a CPU the weights are the mapped file's, and no worker's own
            other = max(0, taken - weights) if worker.device_bytes else taken
            parts: Parts = (("weights on the device", float(weights)), ("other memory", float(other)))
            memory.append(Bar(f"worker {worker.rank}", parts, f"{mib(weights)} + {mib(other)}"))
        sections.append(("Memory of each worker", memory))
    if (run := report.run) is not None:
        parts = (("workers", run.computing),)
        if run.exchanging is not None:
            parts = (("computing", run.computing), ("exchanging", run.exchanging))
        parts = (*parts, ("driver", run.driver))
        sections.append(
            (f"A step of the last run ({run.steps} steps)", [Bar("seconds", parts, f"{run.step:.3f} s per step")])
        )
        gains = [
            Bar(name, ((name, gain),), f"{gain:.2f}")
            for name, gain in (("seen", run.seen), ("predicted", run.predicted))
            if gain
        ]
        if gains:
            sections.append(("Speed-up over one worker", gains))
    return sections


def _heading(
    canvas: ImageDraw.ImageDraw,
    font: Font,
    y: int,
    title: str,
    names: list[str],
) -> None:
    canvas.text((MARGIN, y), title, INK, font)
    x = float(WIDTH - MARGIN)
    several = list(dict.fromkeys(names))
    for name in reversed(several if len(several) > 1 else []):
        x -= canvas.textlength(name, font)
        canvas.text((x, y), name, INK, font)
        canvas.rectangle((x - 18, y + 3, x - 6, y + 15), COLOURS[name])
        x -= 34


def _bar(canvas: ImageDraw.ImageDraw, font: Font, y: int, bar: Bar, longest: float) -> None:
    canvas.text((MARGIN, y + 3), bar.label, INK, font)
    left, room = MARGIN + LABEL, WIDTH - 2 * MARGIN - 2 * LABEL - 20
    canvas.rectangle((left, y, left + room, y + BAR), FAINT)
    x = float(left)
    for name, length in bar.parts:
        end = x + room * length / longest
        if length > 0:
            canvas.rectangle((x, y, end, y + BAR), COLOURS[name])
        x = end
    canvas.text((left + room + 12, y + 3), bar.text, INK, font)
