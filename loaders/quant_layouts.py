"""The layouts of GGUF's quantised blocks: what of their bytes is a code, a scale or an offset.

They are those of the block structs in ggml's ggml-common.h; a field of several bytes is little endian. Each function
named as a type takes blocks, uint8 [blocks, bytes per block] on any device, apart; its docstring lists the fields in
their order, where d is a float16 that all scales are multiples of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import quant_grids


class Parts(NamedTuple):
    """What blocks hold: a weight is the scale of its group times its code, plus the offset of its group.

    Attributes:
        codes: uint8 or int8 [blocks, weights].
        scales: float32 [blocks, groups], a group being weights / groups neighbours.
        offsets: float32 [blocks, groups], or None for no offsets.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None

    def grouped(self) -> Parts:
        """The same with groups as a dim: codes [blocks, groups, weights of a group], the others [blocks, groups, 1]."""
        return Parts(
            self.codes.view(*self.scales.shape, -1),
            self.scales.unsqueeze(-1),
            None if self.offsets is None else self.offsets.unsqueeze(-1),
        )


def q4_0(b: torch.Tensor) -> Parts:
    """d, 32 nibbles."""
    return Parts(_split(_field(b, 2, 18), 16, 4).view(torch.int8).sub_(8), _halves(b, 0, 2))


def q4_1(b: torch.Tensor) -> Parts:
    """d, m, 32 nibbles."""
    d, m = _halves(b, 0, 4).split(1, -1)
    return Parts(_split(_field(b, 4, 20), 16, 4), d, m)


def _five_bits(b: torch.Tensor, start: int) -> torch.Tensor:
    """uint8 [blocks, 32]: from `start` on 32 fifth bits, then 32 nibbles."""
    high = _look_up(quant_grids.flags(b.device), _field(b, start, start + 4)).view(torch.uint8) << 4
    return _split(_field(b, start + 4, start + 20), 16, 4).bitwise_or_(high)


def q5_0(b: torch.Tensor) -> Parts:
    """d, 32 high bits, 32 nibbles."""
    return Parts(_five_bits(b, 2).view(torch.int8).sub_(16), _halves(b, 0, 2))


def q5_1(b: torch.Tensor) -> Parts:
    """d, m, 32 high bits, 32 nibbles."""
    d, m = _halves(b, 0, 4).split(1, -1)
    return Parts(_five_bits(b, 4), d, m)


def q8_0(b: torch.Tensor) -> Parts:
    """d, 32 int8."""
    return Parts(b[:, 2:].view(torch.int8), _halves(b, 0, 2))


def q2_k(b: torch.Tensor) -> Parts:
    """16 bytes with the scale and minimum of a group, 256 two-bit codes, d, and d of the minimums."""
    d, m = _halves(b, 80, 84).split(1, -1)
    groups = _field(b, 0, 16)
    return Parts(_split(_field(b, 16, 80), 32, 2), d * (groups & 15), -m * (groups >> 4))


def q3_k(b: torch.Tensor) -> Parts:
    """256 third bits, 256 two-bit codes, 16 scales' nibbles and 16 scales' high bits in three words, d."""
    codes = _split(_field(b, 32, 96), 32, 2).bitwise_or_(_split(_field(b, 0, 32), 32, 1) << 2)
    words = _field(b, 96, 108, torch.int32)
    low = torch.cat((words[:, :2], words[:, :2] >> 4), -1) & 0x0F0F0F0F
    high = _apart(words[:, 2], 2, 4, 0x03030303)
    scales = (low | high << 4).view(torch.int8).sub_(32)
    return Parts(codes.view(torch.int8).sub_(4), _halves(b, 108, 110) * scales)


def _scales_and_minimums(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d, d of the minimums, and 12 bytes of eight six-bit scales and minimums, four to a word (Q4_K, Q5_K).

    The first word has the first four scales, the second the first four minimums, both with two bits of the last
    four on top; the third has the other four bits, the scales' low and the minimums' high.
    """
    words = _field(b, 4, 16, torch.int32)
    low = words[:, :2]
    last = words[:, 2:]
    rest = torch.cat((last, last >> 4), -1) & 0x0F0F0F0F | low >> 2 & 0x30303030
    six = torch.stack((low & 0x3F3F3F3F, rest), -1).view(torch.uint8)
    scales, minimums = (_halves(b, 0, 4).unsqueeze(-1) * six).unbind(1)
    return scales, -minimums


def q4_k(b: torch.Tensor) -> Parts:
    """Scales and minimums, 256 nibbles."""
    return Parts(_split(_field(b, 16, 144), 32, 4), *_scales_and_minimums(b))


def q5_k(b: torch.Tensor) -> Parts:
    """Scales and minimums, 256 fifth bits, 256 nibbles."""
    codes = _split(_field(b, 48, 176), 32, 4).bitwise_or_(_split(_field(b, 16, 48), 32, 1) << 4)
    return Parts(codes, *_scales_and_minimums(b))


def q6_k(b: torch.Tensor) -> Parts:
    """256 nibbles, 256 pairs of high bits, 16 int8 scales, d."""
    codes = _split(_field(b, 0, 128), 64, 4).bitwise_or_(_split(_field(b, 128, 192), 32, 2) << 4)
    return Parts(codes.view(torch.int8).sub_(32), _halves(b, 208, 210) * b[:, 192:208].view(torch.int8))


def iq4_nl(b: torch.Tensor) -> Parts:
    """d, 32 nibbles."""
    return Parts(_nonlinear(_split(_field(b, 2, 18), 16, 4), quant_grids.NL4), _halves(b, 0, 2))


def iq4_xs(b: torch.Tensor) -> Parts:
    """d, 8 scales' pairs of high bits, 8 scales' nibbles, 256 nibbles."""
    scales = _nibbles(_field(b, 4, 8)) | _apart(_field(b, 2, 4), 2, 4).flatten(1) << 4
    codes = _nonlinear(_split(_field(b, 8, 136), 16, 4), quant_grids.NL4)
    return Parts(codes, _halves(b, 0, 2) * scales.view(torch.int8).sub_(32))


def mxfp4(b: torch.Tensor) -> Parts:
    """An exponent, 32 nibbles."""
    scales = quant_grids.exponents(b.device).index_select(0, b[:, 0].int()).unsqueeze(-1)
    return Parts(_nonlinear(_split(_field(b, 1, 17), 16, 4), quant_grids.E2M1), scales)


def nvfp4(b: torch.Tensor) -> Parts:
    """4 scales, 64 nibbles."""
    scales = quant_grids.minifloats(b.device).index_select(0, b[:, :4].flatten().int()).view(-1, 4)
    return Parts(_nonlinear(_split(_field(b, 4, 36), 8, 4), quant_grids.E2M1), scales)


def tq1_0(b: torch.Tensor) -> Parts:
    """48 bytes of five ternary digits, 4 bytes of four, d."""
    digits, powers = _field(b, 0, 52), []
    for _ in range(5):
        powers.append(digits)
        digits = digits * 3  # of the fraction that a byte is of 256; the digit before the point falls off
    by_power = torch.stack(powers, 1)
    parts = by_power[..., :32], by_power[..., 32:48], by_power[:, :4, 48:]
    fractions = torch.cat([part.flatten(1) for part in parts], -1)
    return Parts((fractions.short() * 3 >> 8).to(torch.int8) - 1, _halves(b, 52, 54))


def tq2_0(b: torch.Tensor) -> Parts:
    """256 two-bit codes, d."""
    return Parts(_split(_field(b, 0, 64), 32, 2).view(torch.int8).sub_(1), _halves(b, 64, 66))


def _lattice(name: str, index: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """int8: points of the lattice of `name`, times signs."""
    return _look_up(quant_grids.grid(name, index.device), index).mul_(signs)


def _even_signs(index: torch.Tensor) -> torch.Tensor:
    return _look_up(quant_grids.even_signs(index.device), index)


def _signs(index: torch.Tensor) -> torch.Tensor:
    return _look_up(quant_grids.signs(index.device), index)


def _and_a_half(d: torch.Tensor, scales: torch.Tensor, part: float) -> torch.Tensor:
    return d * (0.5 + scales) * part


def iq2_xxs(b: torch.Tensor) -> Parts:
    """d, then for each 32 weights 4 points and a word of 4 seven-bit signs and a scale."""
    data = _field(b, 2, 66).view(-1, 8, 8)
    words = data.view(torch.int32)[..., 1]
    codes = _lattice("IQ2_XXS", data[..., :4].flatten(1), _even_signs(_apart(words, 7, 4)))
    return Parts(codes, _and_a_half(_halves(b, 0, 2), words >> 28 & 15, 0.25))


def iq2_xs(b: torch.Tensor) -> Parts:
    """d, 32 words of a nine-bit point and seven-bit signs, 16 nibbles of scales."""
    words = _field(b, 2, 66, torch.int16)
    codes = _lattice("IQ2_XS", words & 511, _even_signs(words >> 9 & 127))
    return Parts(codes, _and_a_half(_halves(b, 0, 2), _nibbles(_field(b, 66, 74)), 0.25))


def iq2_s(b: torch.Tensor) -> Parts:
    """d, 32 points, 32 signs, 32 points' pairs of high bits, 16 nibbles of scales."""
    high = _apart(_field(b, 66, 74), 2, 4).flatten(1).int() << 8
    codes = _lattice("IQ2_S", _field(b, 2, 34) | high, _signs(_field(b, 34, 66)))
    return Parts(codes, _and_a_half(_halves(b, 0, 2), _nibbles(_field(b, 74, 82)), 0.25))


def iq3_xxs(b: torch.Tensor) -> Parts:
    """d, 64 points, 8 words of 4 seven-bit signs and a scale."""
    words = _field(b, 66, 98, torch.int32)
    codes = _lattice("IQ3_XXS", _field(b, 2, 66), _even_signs(_apart(words, 7, 4)))
    return Parts(codes, _and_a_half(_halves(b, 0, 2), words >> 28 & 15, 0.5))


def iq3_s(b: torch.Tensor) -> Parts:
    """d, 64 points, 64 points' high bits, 32 signs, 8 nibbles of scales."""
    high = _look_up(quant_grids.flags(b.device), _field(b, 66, 74)).int() << 8
    codes = _lattice("IQ3_S", _field(b, 2, 66) | high, _signs(_field(b, 74, 106)))
    return Parts(codes, _halves(b, 0, 2) * (1 + 2 * _nibbles(_field(b, 106, 110))))


def iq1_s(b: torch.Tensor) -> Parts:
    """d, 32 points, 8 words of 4 points' three high bits, a scale and which way the points are moved."""
    words = _field(b, 34, 50, torch.int16)
    index = _field(b, 2, 34) | (_apart(words, 3, 4).int() << 8 | (words < 0).unsqueeze(-1) << 11).flatten(1)
    codes = _look_up(quant_grids.shifted_grid(b.device), index)
    return Parts(codes, _halves(b, 0, 2) / 8 * (1 + 2 * (words >> 12 & 7)))


def iq1_m(b: torch.Tensor) -> Parts:
    """32 points, 32 points' nibbles (three high bits and which way it is moved), 4 words of scales.

    A word has 4 scales of three bits and on top a nibble of d, the lowest first.
    """
    index = _field(b, 0, 32) | _nibbles(_field(b, 32, 48)).int() << 8
    codes = _look_up(quant_grids.shifted_grid(b.device), index)
    words = _field(b, 48, 56, torch.int16)
    tops = _field(b, 48, 56)[:, 1::2]
    d = (tops[:, ::2] >> 4 | tops[:, 1::2] & 0xF0).view(torch.float16).float()
    return Parts(codes, d / 8 * (1 + 2 * _apart(words, 3, 4).flatten(1)))


def _field(blocks: torch.Tensor, start: int, stop: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Bytes start to stop of every block, as `dtype`; always a copy, so that they are aligned."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def _halves(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """float32 [blocks, numbers]: the float16 numbers at bytes start to stop."""
    return _field(blocks, start, stop, torch.float16).float()


def _split(data: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """Bytes cut into fields of `bits` bits: of each `run` of bytes all lowest fields, then all second ones, and so on.

    Args:
        data: uint8 [blocks, bytes] from `_field`.
        run: how many bytes, a multiple of eight.
        bits: 1, 2 or 4.

    Returns:
        uint8 [blocks, bytes * 8 / bits].
    """
    words = data.view(torch.int64).view(len(data), -1, run // 8)
    lows = range(0, 8, bits)
    if bits == 1:
        fields = words.unsqueeze(2) >> torch.arange(8, device=data.device).unsqueeze(-1)
    else:  # on a CPU this is faster than one operation that broadcasts, while the fields are few
        fields = words.new_empty(*words.shape[:2], len(lows), run // 8)
        for index, low in enumerate(lows):
            torch.bitwise_right_shift(words, low, out=fields[:, :, index])
    mask = int.from_bytes(8 * bytes([(1 << bits) - 1]), "little")
    return fields.bitwise_and_(mask).view(torch.uint8).flatten(1)


def _apart(data: torch.Tensor, bits: int, count: int, mask: int | None = None) -> torch.Tensor:
    """Fields of `bits` bits of each integer, the lowest first, along a new last dim.

    Args:
        data: an integer tensor.
        bits: how wide a field is.
        count: how many fields.
        mask: what a field is cut out with, where an integer is several with fields of their own.
    """
    shifts = torch.arange(0, bits * count, bits, dtype=data.dtype, device=data.device)
    return (data.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1 if mask is None else mask)


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 2 * bytes]: of each byte the low nibble, then the high one."""
    return _apart(data, 4, 2).flatten(1)


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The words of `table` at each index, as their bytes: int8 [blocks, bytes]."""
    return table.index_select(0, index.flatten().int()).view(torch.int8).view(len(index), -1)


def _nonlinear(codes: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """int8: the values that codes below 16 stand for."""
    return _look_up(quant_grids.pairs(values, codes.device), codes.view(torch.int16))
