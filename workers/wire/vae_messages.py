"""What crosses between the driver and a worker about a VAE: frozen dataclasses of plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...raylight.config import ModelSpec
from ...raylight.errors import ConfigError
from .arena import ArenaRef, open_arena

Mode = Literal["auto", "seamless", "tiles"]
MODES: tuple[Mode, ...] = ("auto", "seamless", "tiles")
Way = Literal["seamless", "tiles", "own tiles", "whole"]
"""What a mode comes to: strips of rows, ComfyUI's tiles, those that the VAE cuts by itself, or all of it on the first
rank."""


@dataclass(frozen=True, kw_only=True)
class TileSizes:
    """The widgets of ComfyUI's VAEDecodeTiled, in pixels and frames."""

    size: int = 512
    overlap: int = 64
    frames: int = 64
    frame_overlap: int = 8

    def __post_init__(self) -> None:
        if min(self.size, self.frames) < 1 or min(self.overlap, self.frame_overlap) < 0:
            raise ConfigError("A tile size is not possible", str(self))


@dataclass(frozen=True, kw_only=True)
class Block:
    """A tensor in memory of the driver: the bytes of `arena`, or, where it cannot be shared, `inline`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    arena: ArenaRef | None
    inline: bytes = b""

    def open(self) -> torch.Tensor:
        """The tensor itself, or its bytes' own copy where it is inline.

        Raises:
            OSError: the driver's memory cannot be opened.
        """
        count = torch.Size(self.shape).numel() * self.dtype.itemsize
        if self.arena is None:
            assert len(self.inline) == count, self.shape
            return torch.frombuffer(bytearray(self.inline), dtype=self.dtype).view(self.shape)
        return open_arena(self.arena)[:count].view(self.dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True)
class VAEPlan:
    """Asks what can be done with a VAE.

    Attributes:
        encode: whether to encode; `shape` is then a picture's [frames, rows, width, channels].
        shape: else a latent's [batch, channels, (frames,) rows, width].
        test: whether to find out if it may run in strips.
    """

    spec: ModelSpec
    shape: tuple[int, ...]
    encode: bool = False
    test: bool = True


@dataclass(frozen=True, kw_only=True)
class VAEFacts:
    """What one rank says of a VAE.

    Attributes:
        family: class of the model.
        ranks: how many ranks have rows to do, the first ones of the pool; 0 where there are no rows (sound), or none
            that can be cut.
        difference: between this rank's strip and the whole, in the self-test; infinity where it did not run.
        limit: how large that may be.
        refusal: why it did not run, "" where it did.
        batch: pictures, or videos, of which one strip each fits here at a time; 0 for not even one.
        budget: bytes that a VAE that cuts time by size would make at once; 0 for one that does not.
        shape: of the result: [batch, (frames,) rows, width, channels] of pixels, or of a latent as it comes.
        dtype: of the result, as a torch dtype.
        tiles: whether ComfyUI's tiled decode cuts the tiles; some VAEs do that by themselves.
        own: shape of the result where the ranks can share those, like `shape`; () where they cannot.
    """

    family: str
    ranks: int
    difference: float
    limit: float
    refusal: str
    batch: int
    budget: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    tiles: bool = True
    own: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Decodes a latent; every rank gets the same one.

    Attributes:
        output: where the ranks write their pixels, of VAEFacts.shape; None to send them back.
        batch: pictures or videos at a time.
        budget: bytes for VAEs that cut time by size, of the whole picture.
        seed: of the first tile.
        random: the driver's generator states, CPU and accelerator.
    """

    spec: ModelSpec
    way: Way
    latent: Block
    output: Block | None
    ranks: int
    batch: int = 1
    budget: int = 0
    tiles: TileSizes | None = None
    seed: int = 0
    random: tuple[Any, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """Encodes pictures; every rank gets the same request. Fields as in DecodeRequest."""

    spec: ModelSpec
    pixels: Block
    ranks: int
    way: Way = "seamless"
    batch: int = 1
    budget: int = 0
    random: tuple[Any, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class PartReply:
    """What a rank made of its part.

    Attributes:
        rows: first and last + 1 of the rows that it wrote or sends; (0, 0) for none.
        part: the rows, where they were not written to shared memory.
        drew: whether tiles drew random numbers.
        seconds: in the work, and `waiting`, the part of them inside collectives.
    """

    rows: tuple[int, int]
    part: Block | None = None
    drew: bool = False
    seconds: float = 0.0
    waiting: float = 0.0
