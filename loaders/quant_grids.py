"""The tables that codes of GGUF's quantised types are looked up in, packed so that one look-up gives many weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, cast

import torch

NL4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the sixteen codes of IQ4_NL and IQ4_XS stand for."""
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the sixteen four-bit floats (OCP Microscaling Formats v1.0), the negative zero a zero."""

P = ParamSpec("P")


def _kept(make: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """Made once for each device, and an ordinary tensor also where the first caller is in inference mode."""
    return cast("Callable[P, torch.Tensor]", lru_cache(maxsize=None)(torch.inference_mode(False)(make)))


@_kept
def pairs(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int16 [3856]: at `low + 256 * high` the int8 values of two codes below 16, the low one first."""
    both = torch.arange(15 * 256 + 16, device="cpu")
    codes = torch.stack((both & 15, both >> 8), -1)
    return _packed(torch.tensor(values, device="cpu")[codes], torch.int16, device)


@_kept
def flags(device: torch.device) -> torch.Tensor:
    """int64 [256]: the bits of a byte as eight bytes 0 or 1, the lowest bit first."""
    return _packed(_bits(256), torch.int64, device)


@_kept
def signs(device: torch.device) -> torch.Tensor:
    """int64 [256]: the bits of a byte as eight int8 signs, the lowest bit first, -1 for one that is set."""
    return _packed(1 - 2 * _bits(256), torch.int64, device)


@_kept
def even_signs(device: torch.device) -> torch.Tensor:
    """int64 [128]: eight int8 signs from seven bits; the eighth makes the number of -1 even."""
    bits = _bits(128)
    bits[:, 7] = bits.sum(-1) & 1
    return _packed(1 - 2 * bits, torch.int64, device)


@_kept
def exponents(device: torch.device) -> torch.Tensor:
    """float32 [256]: half of what an E8M0 byte stands for, 2^(byte - 128); 255 is not a NaN here."""
    byte = torch.arange(256, dtype=torch.int32, device="cpu")
    # from bits, as the first two are denormal
    return torch.where(byte < 2, (1 << 21) << byte.clamp(max=1), (byte - 1) << 23).view(torch.float32).to(device)


@_kept
def minifloats(device: torch.device) -> torch.Tensor:
    """float32 [256]: half of what an unsigned E4M3 byte stands for; its highest bit is ignored, and 127 is zero."""
    byte = torch.arange(256, device="cpu")
    exponent, mantissa = byte >> 3 & 15, (byte & 7).float()
    values = torch.where(exponent == 0, mantissa, (8 + mantissa) * torch.exp2(exponent.float() - 1)) / 1024
    values[127] = 0
    return values.to(device)


@_kept
def grid(name: str, device: torch.device) -> torch.Tensor:
    """The lattice that the type `name` takes several neighbouring weights from at once.

    Returns:
        one integer for each point, whose bytes are the int8 weights: int64 for eight weights, int32 for four.
    """
    points = _points(name)
    return _packed(points, {4: torch.int32, 8: torch.int64}[points.shape[1]], device)


@_kept
def shifted_grid(device: torch.device) -> torch.Tensor:
    """int64 [4096]: the lattice of IQ1_S and IQ1_M in eighths, moved an eighth up, and after it an eighth down."""
    points = 8 * _points("IQ1_S")
    return _packed(torch.cat((points + 1, points - 1)), torch.int64, device)


def _points(name: str) -> torch.Tensor:
    """int8 [points, weights]; the lists are the `gguf` package's."""
    from gguf import quants

    source = getattr(quants, name)
    source.init_grid()
    return torch.from_numpy(source.grid.reshape(source.grid_shape)).to(torch.int8)


def _bits(numbers: int) -> torch.Tensor:
    """int64 [numbers, 8]: the bits of 0, 1, 2 and so on, the lowest first."""
    return torch.arange(numbers, device="cpu").unsqueeze(-1) >> torch.arange(8, device="cpu") & 1


def _packed(table: torch.Tensor, word: torch.dtype, device: torch.device) -> torch.Tensor:
    """Each row of `table` as the int8 values in one word, the first in the lowest byte."""
    return table.to(torch.int8).view(word).flatten().to(device)
