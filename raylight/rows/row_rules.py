"""Makes an unmodified model of pictures work on a strip of rows: a TorchFunctionMode with a rule per kind of call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ..errors import UnsupportedError
from .strips import ROWS, Rows, Strips

Rule = Callable[..., Any]

COPIED_BYTES = 64 << 20
"""Of an activation that a convolution copies, with its neighbours' rows: a fast device does that in 40 us, and its
host takes longer to start another convolution of a few rows."""
TIME = 2
"""The dim of frames in a video's activations: [batch, channels, frames, rows, width]."""
MIXING = (
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
    F.affine_grid,
    F.fold,
    F.grid_sample,
    F.instance_norm,
    F.local_response_norm,
    F.lp_pool2d,
    F.unfold,
    torch.bernoulli,
    torch.fft.fft2,
    torch.fft.fftn,
    torch.flip,
    torch.group_norm,
    torch.instance_norm,
    torch.native_group_norm,
    torch.normal,
    torch.poisson,
    torch.randint,
    torch.randperm,
    torch.Tensor.bernoulli_,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
)
"""Calls that mix rows, or draw for them, in ways that no rule covers."""


class RowParallel(TorchFunctionMode):
    """Sees every torch call of a model, after ComfyUI has cast weights, joined caches of time and padded.

    A convolution is known by its call, not by its module. What no rule names is taken to leave rows alone; a
    self-test of the model finds out whether that is so. All ranks must make the same calls, and draw from equal
    random states. The mode belongs to the thread that enters it.

    Args:
        copied_bytes: see COPIED_BYTES; above it, rows that see a neighbour's are computed anew instead.
    """

    def __init__(self, rows: Rows, *, copied_bytes: int = COPIED_BYTES) -> None:
        super().__init__()
        self._rows = rows
        self._copied_bytes = copied_bytes
        self._off = False
        self._strips: Strips = rows.strips
        self._joined: Callable[[], torch.Tensor | None] = lambda: None
        self._roomy: set[torch.Size] = set()
        transposed: dict[Any, Rule] = dict.fromkeys((torch.conv_transpose2d, torch.conv_transpose3d), self._transposed)
        pools: dict[Any, Rule] = dict.fromkeys(
            (F.avg_pool2d, F.avg_pool3d, torch.nn.functional.max_pool2d, F.max_pool3d), self._pool
        )
        self._rules: dict[Any, Rule] = {
            **dict.fromkeys(MIXING, self._refuse),
            **transposed,
            **pools,
            torch.conv2d: self._conv,
            torch.conv3d: self._conv,
            torch.cudnn_convolution: self._cudnn,
            torch.cat: self._cat,
            F.pad: self._pad,
            F.group_norm: self._norm,
            F.layer_norm: self._layer_norm,
            F.batch_norm: self._batch_norm,
            F.interpolate: self._interpolate,
            torch.randn: self._random,
            torch.rand: self._random,
            torch.randn_like: functools.partial(self._random_like, torch.randn),
            torch.rand_like: functools.partial(self._random_like, torch.rand),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = None if self._off else self._rules.get(func)
        # inside, the mode itself is off
        return rule(func, *args, **(kwargs or {})) if rule else func(*args, **(kwargs or {}))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No rules inside, and no look at each call: for code that works on whole pictures."""
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)
            try:
                yield
            finally:
                self.__enter__()
            return
        # someone else's is inside, and only the innermost can be left
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def _refuse(self, func: Any, *args: Any, why: str = "it mixes rows", **kwargs: Any) -> Any:
        raise UnsupportedError(
            f"{self._rows.model} calls {getattr(func, '__name__', func)}, which cannot be divided over workers by rows",
            why,
            self._rows.remedy,
        )

    def _conv(  # noqa: PLR0917, torch.conv2d's signature
        self,
        func: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        """A convolution that pads itself gets neighbours' rows for its padding.

        With `rest` = 2 padding - span + stride of 0 to stride - 1, where span is the kernel's height, the rows of
        a picture of a multiple of `stride` rows come out as rows / stride; of another number, only where the rest
        makes it round up. Where it pads nothing, the caller has (rule `_pad`), or windows do not overlap.
        """
        step, span = _of_rows(stride), _of_rows(dilation) * (weight.shape[ROWS] - 1) + 1
        if isinstance(padding, str):
            if span > 1:
                self._refuse(func, why=f"padding is {padding!r}")
            return func(input, weight, bias, stride, padding, dilation, groups)
        pad = _of_rows(padding)
        if pad == 0:
            return func(input, weight, bias, stride, padding, dilation, groups)
        rest = 2 * pad - span + step
        if not 0 <= rest < step:
            self._refuse(func, why=f"a kernel over {span} rows with padding {pad} and stride {step} changes them")
        if step > 1:
            self._only_multiples(func, input, step, rounds_up=rest == step - 1)
        below, inside = max(0, span - step - pad), _with_rows(padding, weight.ndim - 2, 0)

        def bare(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = func(x, weight, bias, stride, inside, dilation, groups)
            return result

        if pad == 1 == step and span == 3 and input is self._joined():
            if input.storage_offset():
                return bare(self._with_neighbours(input))
            self._roomy.add(_but_frames(input))
        small = input.nbytes <= self._copied_bytes
        if step > 1 or small or input.shape[ROWS] < span:
            # one copy, with the convolution's own zeros at the picture's edges
            return bare(self._rows.extend(input, above=pad, below=below, edge=pad))
        # no copy: a strip by itself while neighbours' rows come, then what sees them anew, at both edges at once
        whole = functools.partial(func, input, weight, bias, stride, padding, dilation, groups)
        out, (top, bottom) = self._rows.beside(input, whole, above=pad, below=below)
        own, height = span - 1, input.shape[ROWS]
        seams = [] if top is None else [top, input.narrow(ROWS, 0, own)]
        seams += [] if bottom is None else [input.narrow(ROWS, height - own, own), bottom]
        if seams:
            anew = bare(torch.cat(seams, ROWS))
            if top is not None:
                out.narrow(ROWS, 0, pad).copy_(anew.narrow(ROWS, 0, pad))
            if bottom is not None:
                out.narrow(ROWS, height - below, below).copy_(anew.narrow(ROWS, anew.shape[ROWS] - below, below))
        return out

    def _cat(self, func: Any, tensors: Sequence[torch.Tensor], dim: int = 0, **kwargs: Any) -> torch.Tensor:
        """Frames joined with those kept from before.

        They are copied here anyway. If what is joined so goes to a convolution over rows, as was seen before, they are
        copied to where there is room for a neighbour's row above and below: the convolution then needs neither another
        copy nor a second run over the edges.
        """
        first = tensors[0]
        if kwargs or dim != TIME or first.ndim != 5 or any(t.dtype != first.dtype for t in tensors):
            return func(tensors, dim, **kwargs)
        joined: torch.Tensor
        if _but_frames(first) in self._roomy:
            frames, (height, width) = sum(t.shape[TIME] for t in tensors), first.shape[ROWS:]
            room = first.new_empty(*first.shape[:TIME], frames, height + 2, width)
            joined = func(tensors, dim, out=room.narrow(ROWS, 1, height))
        else:
            joined = func(tensors, dim)
        self._joined = weakref.ref(joined)
        return joined

    def _with_neighbours(self, joined: torch.Tensor) -> torch.Tensor:
        """What `_cat` has joined, one row into its memory, between neighbours' rows; zeros at the picture's edges."""
        shape = list(joined.shape)
        shape[ROWS] += 2
        room = joined.as_strided(shape, joined.stride(), 0)
        for row, beside in zip((0, -1), self._rows.start_neighbours(joined, above=1, below=1)(), strict=True):
            edge = room.select(ROWS, row)
            if beside is None:
                edge.zero_()
            else:
                edge.copy_(beside.squeeze(ROWS))
        return room

    def _cudnn(  # noqa: PLR0917, torch.cudnn_convolution's signature
        self,
        func: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        padding: Any,
        stride: Any,
        dilation: Any,
        groups: int,
        **more: Any,
    ) -> torch.Tensor:
        """ComfyUI's way around a slow Conv3d of some cuDNN versions: the arguments in another order."""

        def call(x: Any, w: Any, bias: Any, *geometry: Any) -> Any:
            stride, padding, dilation, groups = geometry
            return func(x, w, padding, stride, dilation, groups, **more)

        return self._conv(call, input, weight, None, stride, padding, dilation, groups)

    def _transposed(  # noqa: PLR0917, torch.conv_transpose2d's signature
        self,
        func: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> torch.Tensor:
        """A transposed convolution that makes `stride` rows of each gets the rows it overlaps; surplus is cut off."""
        step, pad, span = _of_rows(stride), _of_rows(padding), weight.shape[ROWS]
        if span - step != 2 * pad or _of_rows(dilation) != 1 or _of_rows(output_padding):
            self._refuse(func, why=f"a kernel of {span} rows with stride {step} and padding {pad} changes them")
        if pad == 0:
            return func(input, weight, bias, stride, padding, output_padding, groups, dilation)
        more = -(-pad // step)
        x = self._rows.extend(input, above=more, below=more)
        out = func(x, weight, bias, stride, padding, output_padding, groups, dilation)
        surplus = 0 if self._rows.top else more * step
        return out.narrow(ROWS, surplus, input.shape[ROWS] * step)

    def _pad(
        self, func: Any, input: torch.Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> torch.Tensor:
        """Padding in height is neighbours' rows inside, and the mode's own rows at the picture's edges."""
        above, below = pad[2:4] if len(pad) >= 4 else (0, 0)
        if not (above or below):
            return func(input, pad, mode, value)
        if min(above, below) < 0 or mode == "circular":
            self._refuse(func, why=f"mode {mode} with {above} and {below} rows")
        rows = self._rows
        if mode == "constant":
            # one copy: what is padded, and then the neighbours' rows where they belong
            padded = functools.partial(func, input, pad, mode, value)
            out, (top, bottom) = rows.beside(input, padded, above=above, below=below)
            beside = (*pad[:2], 0, 0, *pad[4:])
            for strip, first in ((top, 0), (bottom, above + input.shape[ROWS])):
                if strip is not None:
                    out.narrow(ROWS, first, strip.shape[ROWS]).copy_(func(strip, beside, mode, value))
            return out
        x = rows.extend(input, above=above, below=below)
        rest = (*pad[:2], above if rows.top else 0, below if rows.bottom else 0, *pad[4:])
        return func(x, rest, mode, value) if any(rest) else x

    def _norm(self, func: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Group norm with the statistics of all ranks' rows."""
        names = ("num_groups", "weight", "bias", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return self._rows.group_norm(input, given.pop("num_groups"), **given)

    def _layer_norm(self, func: Any, input: torch.Tensor, normalized_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """Local over channels only."""
        if len(normalized_shape) > 1:
            self._refuse(func, why=f"over {tuple(normalized_shape)}")
        return func(input, normalized_shape, *args, **kwargs)

    def _batch_norm(self, func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Local with given statistics."""
        if kwargs.get("training", args[5] if len(args) > 5 else False):
            self._refuse(func, why="with statistics of the batch")
        result: torch.Tensor = func(*args, **kwargs)
        return result

    def _pool(self, func: Any, input: torch.Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Local where windows do not overlap; strips are a multiple of them, or the result is short."""
        names = ("stride", "padding")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        size = _of_rows(kernel_size)
        stride = _of_rows(given.get("stride") or kernel_size)
        if size != stride or _of_rows(given.get("padding", 0)):
            self._refuse(func, why=f"windows of {size} rows, {stride} apart")
        if size > 1 and self._strips.halvings:
            self._only_multiples(func, input, size, rounds_up=False)
        return func(input, kernel_size, *args, **kwargs)

    def _only_multiples(self, func: Any, input: torch.Tensor, step: int, *, rounds_up: bool) -> None:
        """Refuse to make one row of each `step` where strips are no multiple of it.

        Args:
            rounds_up: the last strip may be none where its rows are counted so.
        """
        heights = self._strips.heights(input.shape[ROWS])
        last = 0 if rounds_up and self._strips.halvings else heights[-1] % step
        if last or any(height % step for height in heights[:-1]):
            self._refuse(func, why=f"stride {step} over strips of {', '.join(map(str, heights))} rows")

    def _interpolate(self, func: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Local where each row becomes the same number of equal rows.

        From h to 2 h - 1 rows, "nearest" takes row i // 2 for row i as it does to 2 h: of all rows, and of the last
        strip's alone.
        """
        names = ("size", "scale_factor", "mode")
        given = {"mode": "nearest", **dict(zip(names, args, strict=False)), **kwargs}
        size, scale = given.get("size"), given.get("scale_factor")
        ratio = _of_rows(size) / input.shape[ROWS] if size is not None else float(_of_rows(scale))
        if self._strips.halvings:
            doubled = size is not None and _of_rows(size) == self._strips.doubled(input.shape[ROWS])
            local = doubled and given["mode"] == "nearest"
        else:
            local = given["mode"] in ("nearest", "nearest-exact") and ratio == int(ratio)
        if not local:
            self._refuse(func, why=f"mode {given['mode']} to {ratio:g} times the rows")
        return func(input, *args, **kwargs)

    def _random(self, func: Any, *size: Any, **kwargs: Any) -> torch.Tensor:
        """Draw for all rows, keep the own: every rank draws the same, as one process would."""
        shape = list(kwargs.pop("size", None) or (size if not size or isinstance(size[0], int) else size[0]))
        if len(shape) < 2:
            return func(shape, **kwargs)
        shape[ROWS] = sum(self._strips.heights(shape[ROWS]))
        return self._strips.own(func(shape, **kwargs)).contiguous()

    def _random_like(self, draw: Any, func: Any, input: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("memory_format", None)
        return self._random(draw, input.shape, **{"dtype": input.dtype, "device": input.device, **kwargs})


def _but_frames(x: torch.Tensor) -> torch.Size:
    """The shape of a video's activation, whatever its number of frames."""
    return x.shape[:TIME] + x.shape[ROWS:]


def _of_rows(value: Any) -> Any:
    """The part for rows of an argument given once or for every dim."""
    if isinstance(value, (int, float)):
        return value
    return value[0] if len(value) == 1 else value[ROWS]


def _with_rows(value: Any, dims: int, rows: int) -> list[int]:
    """An argument for every dim, with another part for rows."""
    result = [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)
    result[ROWS] = rows
    return result
