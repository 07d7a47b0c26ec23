"""GGUF's quantised weights as floats, in torch on any device, bit for bit what the `gguf` package gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..raylight.errors import LoadError, UnsupportedError
from . import quant_layouts as layouts
from .quant_layouts import Parts

CPU_CHUNK = 1 << 19
"""Weights decoded at a time on a CPU: few enough for its caches, enough to hide what starting an operation takes."""
GPU_CHUNK = 1 << 24
"""The same elsewhere, where an operation takes less than starting it; its scratch is a few bytes for each weight."""


def dequantise(
    blocks: torch.Tensor, name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weights that quantised blocks stand for.

    Args:
        blocks: uint8, any shape, on any device: whole blocks, in the order of the weights. Only read.
        name: GGUF's name of the type, a key of `QUANTS`.
        shape: of the result.
        dtype: float32, bfloat16 or float16; these are the float32 values rounded once.

    Returns:
        `shape` in `dtype` on the device of `blocks`. Besides it one chunk's codes are alive at a time, and on a CPU
        its float32 weights.

    Raises:
        UnsupportedError: no such type in `QUANTS`.
        LoadError: the bytes are not whole blocks, or not as many as `shape` takes.
    """
    assert blocks.dtype == torch.uint8, blocks.dtype
    quant = _named(name)
    count, weights = blocks.numel() // quant.nbytes, math.prod(shape)
    if count * quant.nbytes != blocks.numel() or count * quant.weights != weights:
        raise LoadError(
            f"{blocks.numel()} bytes of {name} cannot be a tensor of {' x '.join(map(str, shape))}",
            f"a block of {quant.nbytes} bytes holds {quant.weights} weights, so the {weights} would take "
            f"{weights / quant.weights * quant.nbytes:.10g} bytes",
            "The file is damaged or was not written as GGUF says; get it again.",
        )
    rows = blocks.reshape(count, quant.nbytes)
    out = torch.empty(count, quant.weights, dtype=dtype, device=blocks.device)
    on_cpu = blocks.device.type == "cpu"
    step = (CPU_CHUNK if on_cpu else GPU_CHUNK) // quant.weights
    write = _write_in_place if on_cpu else _write
    scratch = None
    if on_cpu and dtype != torch.float32:
        scratch = out.new_empty(min(step, count), quant.weights, dtype=torch.float32)
    for start in range(0, count, step):
        part = out[start : start + step]
        values = part if scratch is None else scratch[: len(part)]
        write(quant.parts(rows[start : start + step]), values)
        if scratch is not None:
            part.copy_(values)
    return out.view(tuple(shape))


@dataclass(frozen=True)
class Quant:
    """A quantised type.

    Attributes:
        name: GGUF's name of it.
        weights: how many a block holds.
        nbytes: how many bytes a block takes.
        parts: takes blocks (uint8 [blocks, nbytes]) apart.
    """

    name: str
    weights: int
    nbytes: int
    parts: Callable[[torch.Tensor], Parts]

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """float32 [blocks, weights] of blocks, uint8 [blocks, nbytes], all at once."""
        out = torch.empty(len(blocks), self.weights, dtype=torch.float32, device=blocks.device)
        _write(self.parts(blocks), out)
        return out


def _write(parts: Parts, out: torch.Tensor) -> None:
    """The weights of `parts` into `out`, contiguous [blocks, weights] of any dtype, in one operation.

    It may fuse product and sum: where there are offsets the product is exact in float32 (11 bits of d, at most 6 of
    a scale and 5 of a code), so that the sum alone is rounded either way.
    """
    codes, scales, offsets = parts.grouped()
    if offsets is None:
        torch.mul(codes, scales, out=out.view(codes.shape))
    else:
        torch.addcmul(offsets, codes, scales, out=out.view(codes.shape))


def _write_in_place(parts: Parts, out: torch.Tensor) -> None:
    """The same for float32, and faster on a CPU, which converts operands of other dtypes as a whole first."""
    codes, scales, offsets = parts.grouped()
    out = out.view(codes.shape)
    out.copy_(codes)
    out.mul_(scales)
    if offsets is not None:
        out.add_(offsets)


def _named(name: str) -> Quant:
    if name not in QUANTS:
        raise UnsupportedError(
            f"Tensors of the type {name} cannot be read",
            f"Raylight decodes {', '.join(QUANTS)}",
            "Use a file quantised to one of these.",
        )
    return QUANTS[name]


QUANTS: Mapping[str, Quant] = MappingProxyType(
    {
        quant.name: quant
        for quant in (
            Quant("Q4_0", 32, 18, layouts.q4_0),
            Quant("Q4_1", 32, 20, layouts.q4_1),
            Quant("Q5_0", 32, 22, layouts.q5_0),
            Quant("Q5_1", 32, 24, layouts.q5_1),
            Quant("Q8_0", 32, 34, layouts.q8_0),
            Quant("Q2_K", 256, 84, layouts.q2_k),
            Quant("Q3_K", 256, 110, layouts.q3_k),
            Quant("Q4_K", 256, 144, layouts.q4_k),
            Quant("Q5_K", 256, 176, layouts.q5_k),
            Quant("Q6_K", 256, 210, layouts.q6_k),
            Quant("IQ1_S", 256, 50, layouts.iq1_s),
            Quant("IQ1_M", 256, 56, layouts.iq1_m),
            Quant("IQ2_XXS", 256, 66, layouts.iq2_xxs),
            Quant("IQ2_XS", 256, 74, layouts.iq2_xs),
            Quant("IQ2_S", 256, 82, layouts.iq2_s),
            Quant("IQ3_XXS", 256, 98, layouts.iq3_xxs),
            Quant("IQ3_S", 256, 110, layouts.iq3_s),
            Quant("IQ4_NL", 32, 18, layouts.iq4_nl),
            Quant("IQ4_XS", 256, 136, layouts.iq4_xs),
            Quant("TQ1_0", 256, 54, layouts.tq1_0),
            Quant("TQ2_0", 256, 66, layouts.tq2_0),
            Quant("MXFP4", 32, 17, layouts.mxfp4),
            Quant("NVFP4", 64, 36, layouts.nvfp4),
        )
    }
)
"""Every type that can be decoded, by GGUF's name of it."""
