"""GGUF weights inside ComfyUI's models: blocks stay as stored and are dequantised where a layer computes."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.ops
import torch

from ...loaders.quants import dequantise
from ...loaders.source import Source
from ...raylight.config import ModelSpec

DEQUANTISED = (torch.float32, torch.bfloat16, torch.float16)
"""What blocks can be dequantised to at once."""


class Blocks(torch.Tensor):
    """Quantised blocks with the shape of the weight they stand for, so that ComfyUI's detection sees that.

    Only layers of `operations` keep the blocks; every other use dequantises them (a private copy). What takes a view,
    or writes, gets a plain tensor that stays: blocks that were written into are that from then on. Make them outside
    of inference mode.

    Attributes:
        raw: the blocks, flat uint8.
        quant: GGUF's name of their layout.
    """

    raw: torch.Tensor
    quant: str
    _plain: torch.Tensor | None

    @staticmethod
    def __new__(cls, raw: torch.Tensor, quant: str, shape: tuple[int, ...], dtype: torch.dtype) -> Blocks:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=raw.device)
        made.raw = raw
        made.quant = quant
        made._plain = None
        return made

    @property
    def written(self) -> bool:
        """Whether something wrote into them, or into a view of them."""
        return self._version > 0

    def whole(self, *, keep: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight itself.

        Args:
            keep: the result is this tensor's own from now on, for views and writes.
            dtype: of the result where there is none of its own yet; by default what this says it is.
        """
        plain = self._plain
        if plain is None:
            plain = dequantise(self.raw, self.quant, tuple(self.shape), dtype=dtype or self.dtype)
            self._plain = plain if keep else None
        return plain

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Blocks({self.quant}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], Blocks) and args[0].dtype in DEQUANTISED:
            # rounded once, whatever this says it is
            return func(args[0], args[1].whole(dtype=args[0].dtype), *args[2:], **kwargs)
        aliased = {argument.name for argument in func._schema.arguments if argument.alias_info is not None}
        names = [argument.name for argument in func._schema.arguments]
        given = [_whole(value, keep=name in aliased) for name, value in zip(names, args, strict=False)]
        return func(*given, **{name: _whole(value, keep=name in aliased) for name, value in kwargs.items()})


def _whole(value: Any, *, keep: bool) -> Any:
    if isinstance(value, Blocks):
        return value.whole(keep=keep)
    if isinstance(value, dict):
        return {key: _whole(item, keep=keep) for key, item in value.items()}
    return type(value)(_whole(item, keep=keep) for item in value) if isinstance(value, (list, tuple)) else value


def state_dict(source: Source, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A GGUF file's tensors for ComfyUI's loader.

    Args:
        dtype: what plain ComfyUI keeps the weights in, and so what is made of quantised ones that it joins or changes.
    """
    said = dtype if dtype in DEQUANTISED else torch.float32
    return {
        name: Blocks(source.tensors[name], entry.quant, entry.shape, said) if entry.quant else source.tensors[name]
        for name, entry in source.header.entries.items()
    }


class BlockPatch:
    """A weight function that adds patches to a dequantised weight, for the length of one use of it.

    The same arithmetic as merging them into the weight once; a low-rank product costs less than the layer
    itself as soon as there are more tokens than the rank.

    Args:
        patches: ComfyUI's patches of the weight.
        dtype: what they are computed in.
    """

    def __init__(self, key: str, patches: list[Any], dtype: torch.dtype | None) -> None:
        self._key = key
        self._patches = patches
        self._dtype = dtype

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        dtype = self._dtype or weight.dtype
        out = comfy.lora.calculate_weight(
            self._patches, weight.to(dtype, copy=True), self._key, intermediate_dtype=dtype
        )
        return out.to(weight.dtype)


def operations(spec: ModelSpec) -> Any:
    """ComfyUI's casting operations with a Linear that computes from blocks.

    Args:
        spec: its `dequant_dtype` and `patch_dtype` hold for these layers.
    """
    rounded = getattr(torch, spec.dequant_dtype) if spec.dequant_dtype else None

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            """A Linear whose weight may be blocks; `quant` is their layout, "" for a plain weight."""

            quant = ""
            whole_shape: tuple[int, ...] = ()
            weight: torch.nn.Parameter

            def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
                key = prefix + "weight"
                value = state_dict.get(key)
                if not isinstance(value, Blocks) or value.written or value.shape != self.weight.shape:
                    super()._load_from_state_dict(state_dict, prefix, *rest)
                    return
                self.weight = torch.nn.Parameter(value.raw, requires_grad=False)
                self.quant, self.whole_shape = value.quant, tuple(value.shape)
                others = {name: item for name, item in state_dict.items() if name != key}
                super()._load_from_state_dict(others, prefix, *rest)
                missing_keys = rest[2]
                if key in missing_keys:
                    missing_keys.remove(key)

            def whole(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
                """The dequantised weight without patches."""
                weight = dequantise(self.weight.to(device), self.quant, self.whole_shape, dtype=rounded or dtype)
                return weight.to(dtype)

            def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if not self.quant:
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                weight = self.whole(input.device, input.dtype)
                for function in self.weight_function:
                    weight = function(weight)
                bias = None if self.bias is None else self.bias.to(device=input.device, dtype=input.dtype, copy=True)
                for function in self.bias_function:
                    bias = function(bias)
                return torch.nn.functional.linear(input, weight, bias)

    return Operations


def expand(layer: Any, dtype: torch.dtype) -> None:
    """Have a layer of `operations` hold its weight dequantised, where it holds blocks."""
    if getattr(layer, "quant", ""):
        whole = layer.whole(torch.device("cpu"), dtype)
        layer.weight = torch.nn.Parameter(whole, requires_grad=False)
        layer.quant = ""
