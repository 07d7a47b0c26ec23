"""Models of real shape with random weights: their files, and what a call of them takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ranks import enter

Draw = Callable[..., Any]
"""Makes a tensor of a shape."""


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        recipe: key of `tests.host.checkpoints.recipes.RECIPES`.
        layers: how many it has.
        size: the recipe's sizes for so many layers.
        extent: frames, height and width of a usual video or picture, in pixels.
        inputs: arguments of a call, from a function that draws tensors, frames, height and width: the latent, a
            timestep, a text, and others.
        condition: what a sampler's conditioning has beside the text.
        once: keyword arguments of a call that a sampler makes once in a run, from frames, height and width.
    """

    recipe: str
    layers: int
    size: Callable[[int], Mapping[str, int]]
    extent: tuple[int, int, int]
    inputs: Callable[[Draw, int, int, int], tuple[Any, ...]]
    condition: Callable[[Draw], Mapping[str, Any]] = lambda draw: {}
    once: Callable[[int, int, int], Mapping[str, Any]] = lambda frames, height, width: {}


def constant(draw: Draw, value: float) -> Any:
    """[1] of a value, where and as what `draw` makes tensors."""
    return draw(1) * 0 + value


def wan(draw: Draw, frames: int, height: int, width: int) -> tuple[Any, ...]:
    return draw(1, 16, (frames + 3) // 4, height // 8, width // 8), constant(draw, 500.0), draw(1, 512, 4096)


def flux(draw: Draw, frames: int, height: int, width: int) -> tuple[Any, ...]:
    guidance = constant(draw, 3.5)
    return draw(1, 16, height // 8, width // 8), constant(draw, 0.5), draw(1, 512, 4096), draw(1, 768), guidance


def zimage(draw: Draw, frames: int, height: int, width: int) -> tuple[Any, ...]:
    return draw(1, 16, height // 8, width // 8), constant(draw, 0.5), draw(1, 160, 2560), 160


def ltxv(draw: Draw, frames: int, height: int, width: int) -> tuple[Any, ...]:
    return (
        draw(1, 128, (frames + 7) // 8, height // 32, width // 32),
        constant(draw, 0.5)[None],
        draw(1, 256, 4096),
        None,
    )


def ltx2(draw: Draw, frames: int, height: int, width: int) -> tuple[Any, ...]:
    sound = draw(1, 8, frames, 16)  # 25 of its latents a second, like the frames
    video, t, *_ = ltxv(draw, frames, height, width)
    return [video, sound], t, draw(1, 256, 2 * 3840), None


def h3(draw: Draw, frames: int, height: int, width: int) -> tuple[Any, ...]:
    latent, sound = h3_lengths(frames)
    latents = [draw(1, 24, latent, height // 16, width // 16), draw(1, 32, 2, sound)]
    # the text is refined, as a sampler's step passes it
    return latents, constant(draw, 700.0), draw(1, H3_TEXT, H3_WIDTH)


def h3_lengths(frames: int) -> tuple[int, int]:
    """Latent frames of video, and of its sound."""
    # each 17 frames have 5 latent ones, the first of them for one frame and the others for four
    more = frames % 17
    return 5 * (frames // 17) + (1 + -(-(more - 1) // 4) if more else 0), -(-frames * 40 // 24)


def h3_layout(frames: int, height: int, width: int) -> dict[str, Any]:
    from comfy.ldm.minimax.model import PackedLayout

    latent, sound = h3_lengths(frames)
    return {"minimax_payload": {"layout": PackedLayout(H3_TEXT, latent, height // 16, width // 16, sound)}}


def sdxl(draw: Draw, frames: int, height: int, width: int) -> tuple[Any, ...]:
    # both conditions of a picture, as ComfyUI batches them
    return draw(2, 4, height // 8, width // 8), constant(draw, 500.0).repeat(2), draw(2, 77, 2048), draw(2, 2816)


def pooled(width: int) -> Callable[[Draw], Mapping[str, Any]]:
    return lambda draw: {"pooled_output": draw(1, width)}


H3_WIDTH, H3_TEXT = 5376, 256

MODELS: Mapping[str, Model] = {
    "small": Model("wan", 4, lambda n: {"dim": 256, "ffn": 512, "layers": n}, (5, 64, 64), wan),
    "wan14b": Model("wan", 40, lambda n: {"dim": 5120, "ffn": 13824, "layers": n}, (81, 480, 832), wan),
    "wan1.3b": Model("wan", 30, lambda n: {"dim": 1536, "ffn": 8960, "layers": n}, (81, 480, 832), wan),
    "flux": Model(
        "flux", 19, lambda n: {"dim": 3072, "double": n, "single": 2 * n}, (1, 1024, 1024), flux, pooled(768)
    ),
    "zimage": Model("zimage", 30, lambda n: {"layers": n, "context": 2560}, (1, 1024, 1024), zimage),
    "ltxv": Model("ltxv", 48, lambda n: {"dim": 4096, "layers": n}, (121, 704, 1280), ltxv),
    "h3": Model(
        "h3",
        50,
        lambda n: {
            "dim": H3_WIDTH,
            "heads": 56,
            "ffn": 14336,
            "layers": n,
            "context": 5120,
            "frequencies": 256,
            "time": 2688,
        },
        (124, 768, 1344),
        h3,
        once=h3_layout,
    ),
    "sdxl": Model("sdxl_base", 1, lambda n: {}, (1, 1024, 1024), sdxl, pooled(1280)),
    "ltx2": Model("ltx2", 48, lambda n: {"dim": 4096, "layers": n}, (121, 704, 1280), ltx2),
}
"""Flux.1 dev's layers are its double blocks; it has twice as many single ones. SDXL has no number of layers. The
small one is for trying the scripts."""
GGUF = ("Q8_0", "Q4_K")


@dataclass(frozen=True)
class Choice:
    """A model as a command line names it: `name[:layers[:kind]]`, as in wan14b:8:Q4_K.

    Attributes:
        layers: how many, or all of them.
        kind: bf16, a variant of `tests.weights.files` (fp8, scaled) or a type of GGUF.
    """

    name: str
    layers: int
    kind: str

    @classmethod
    def parse(cls, text: str) -> Choice:
        name, layers, kind = (*text.split(":"), "", "")[:3]
        return cls(name, int(layers or MODELS[name].layers), kind or "bf16")

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    def __str__(self) -> str:
        part = "" if self.layers == self.model.layers else f", {self.layers} of {self.model.layers} layers"
        return f"{self.name}, {self.kind}{part}"

    def path(self, folder: Path) -> Path:
        """Where its checkpoint is."""
        suffix = "gguf" if self.kind in GGUF else "safetensors"
        return folder / f"{self.name}-{self.layers}-{self.kind}.{suffix}"

    def file(self, comfy: Path, folder: Path) -> Path:
        """Its checkpoint, made by a process of its own where it is not there; the pages are in the page cache."""
        path = self.path(folder)
        if not path.is_file():
            named = f"{self.name}:{self.layers}:{self.kind}"
            subprocess.run([sys.executable, __file__, str(comfy), str(folder), named], check=True)
        warm(path)
        return path

    def write(self, folder: Path) -> None:
        """Make the file, in a process that has entered ComfyUI."""
        from comfy_raylight.tests.host.checkpoints import Job
        from comfy_raylight.tests.host.checkpoints.make import make
        from comfy_raylight.tests.weights.files import write_gguf, write_variant

        path = self.path(folder)
        partial = path.with_name(f"partial-{path.name}")
        if self.kind == "bf16":
            size = self.model.size(self.layers)
            make(Job(family=self.model.recipe, path=partial, dtype="bfloat16", size=size))
        else:
            base = replace(self, kind="bf16")
            if not base.path(folder).is_file():
                base.write(folder)
            write = write_gguf if self.kind in GGUF else write_variant
            write(base.path(folder), partial, self.kind)
        partial.replace(path)


def warm(file: Path) -> None:
    """Have a file's pages in the page cache."""
    with file.open("rb", buffering=0) as reader:
        buffer = bytearray(1 << 24)
        while reader.readinto(buffer):
            pass


if __name__ == "__main__":
    _, root, into, named = sys.argv
    enter(root)
    Choice.parse(named).write(Path(into))
