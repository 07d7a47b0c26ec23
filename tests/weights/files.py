"""The same small model in every kind of file: dtypes, prefixes, ComfyUI's quantised layouts, GGUF."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

State = dict[str, Any]
PREFIX = "model.diffusion_model."
FP8_MAX = 448.0
SMALL = 0.5
"""Larger weights would overflow where a small model computes in float16."""

SAFETENSORS: dict[str, Callable[[State], tuple[State, dict[str, str]]]] = {}
"""Makes a state dict and metadata of float32 weights, by the name of the variant."""


def variant(function: Callable[[State], tuple[State, dict[str, str]]]) -> Callable[..., Any]:
    SAFETENSORS[function.__name__] = function
    return function


@variant
def fp32(state: State) -> tuple[State, dict[str, str]]:
    return state, {}


@variant
def bf16(state: State) -> tuple[State, dict[str, str]]:
    return cast(state, "bfloat16"), {}


@variant
def fp16(state: State) -> tuple[State, dict[str, str]]:
    return cast(state, "float16"), {}


@variant
def fp8(state: State) -> tuple[State, dict[str, str]]:
    return cast(state, "float8_e4m3fn"), {}


@variant
def mixed(state: State) -> tuple[State, dict[str, str]]:
    """As most published files are: large weights in bfloat16, norms and biases in float32."""
    narrow = cast(state, "bfloat16")
    return {key: narrow[key] if value.ndim > 1 else value for key, value in state.items()}, {}


@variant
def prefixed(state: State) -> tuple[State, dict[str, str]]:
    """The diffusion model of an all-in-one checkpoint."""
    import torch

    other = {"first_stage_model.decoder.conv.weight": torch.ones(4, 4), "cond_stage_model.logit_scale": torch.ones(())}
    return {PREFIX + key: value for key, value in cast(state, "bfloat16").items()} | other, {}


@variant
def misaligned(state: State) -> tuple[State, dict[str, str]]:
    """A tensor of one byte in front: no other starts where its dtype wants it to."""
    return state, {"misaligned": "yes"}


@variant
def scaled(state: State) -> tuple[State, dict[str, str]]:
    """ComfyUI's scaled fp8: `scale_weight` beside every weight, and a marker."""
    import torch

    made: State = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in state.items():
        if is_linear(key, value):
            made[key], made[key.replace(".weight", ".scale_weight")] = scaled_fp8(value)
        else:
            made[key] = value.to(torch.bfloat16)
    return made, {}


@variant
def layers(state: State) -> tuple[State, dict[str, str]]:
    """Mixed precision by metadata, with some layers unquantised."""
    import torch

    made: State = {}
    configured = {}
    for key, value in state.items():
        if is_linear(key, value) and ".ffn." in key:
            layer = key.removesuffix(".weight")
            made[key], made[layer + ".weight_scale"] = scaled_fp8(value)
            configured[layer] = {"format": "float8_e4m3fn"}
        else:
            made[key] = value.to(torch.bfloat16)
    return made, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": configured})}


@variant
def comfy_quant(state: State) -> tuple[State, dict[str, str]]:
    """The same by a tensor beside every layer, which ComfyUI 0.3.75 does not know."""
    import torch

    made, metadata = layers(state)
    for layer, config in json.loads(metadata["_quantization_metadata"])["layers"].items():
        made[layer + ".comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    return made, {}


@dataclass(frozen=True)
class Kitchen:
    """A layout of the package comfy_kitchen, in which newer ComfyUIs keep weights.

    Attributes:
        format: ComfyUI's name of it.
        layout: the package's.
        options: of quantising.
        config: what a layer's `comfy_quant` says beside the format.
    """

    format: str
    layout: str
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


GROUP = {"convrot_groupsize": 64}
"""Columns that are rotated together: a small model's layers have fewer than the default takes."""
KITCHEN = {
    "int8": Kitchen("int8_tensorwise", "TensorWiseINT8Layout"),
    "int8_convrot": Kitchen(
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, **GROUP},
        {"convrot": True, **GROUP},
    ),
    "w4a4": Kitchen("convrot_w4a4", "TensorCoreConvRotW4A4Layout", GROUP, GROUP),
    "w4a8": Kitchen("asym_w4a8_int8", "AsymW4A8Int8Layout", GROUP, GROUP),
    "nvfp4": Kitchen("nvfp4", "TensorCoreNVFP4Layout"),
    "mxfp8": Kitchen("mxfp8", "TensorCoreMXFP8Layout"),
}


def by_kitchen(kind: Kitchen, state: State) -> tuple[State, dict[str, str]]:
    """The linear layers that `layers` has in fp8, as the package quantises them."""
    import comfy_kitchen.tensor
    import torch

    layout = getattr(comfy_kitchen.tensor, kind.layout, None)
    if layout is None:
        raise ImportError(f"this comfy_kitchen has no {kind.layout}")
    config = {"format": kind.format, **kind.config}
    made: State = {}
    for key, value in state.items():
        if is_linear(key, value) and ".ffn." in key:
            tensors = layout.state_dict_tensors(*layout.quantize(value.to(torch.bfloat16), **kind.options))
            # as published files have them: dtypes that not every reader knows are bytes there
            made |= {key + name: viewable(tensor) for name, tensor in tensors.items()}
            name = key.replace(".weight", ".comfy_quant")
            made[name] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
        else:
            made[key] = value.to(torch.bfloat16)
    return made, {}


for _name, _kind in KITCHEN.items():
    SAFETENSORS[_name] = functools.partial(by_kitchen, _kind)


def viewable(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor


def absent(name: str) -> str:
    """Why the ComfyUI of this process cannot have a variant; "" where it can."""
    import comfy.quant_ops
    import comfy.utils

    if name in (*KITCHEN, "comfy_quant") and not hasattr(comfy.utils, "convert_old_quants"):
        return "this ComfyUI refuses the layout"
    if name in KITCHEN and KITCHEN[name].format not in comfy.quant_ops.QUANT_ALGOS:
        return "this ComfyUI does not know the format"
    if name in KITCHEN and importlib.util.find_spec("comfy_kitchen") is None:
        return "comfy_kitchen is not installed"
    return ""


def cast(state: State, dtype: str) -> State:
    import torch

    return {key: value.to(getattr(torch, dtype)) for key, value in state.items()}


def is_linear(key: str, value: torch.Tensor) -> bool:
    return "blocks." in key and key.endswith(".weight") and value.ndim == 2 and "norm" not in key


def scaled_fp8(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    scale = value.abs().max().float() / FP8_MAX
    return (value.float() / scale).to(torch.float8_e4m3fn), scale.clone()


def write_variant(base: Path, path: Path, name: str) -> Path:
    """Write the weights of `base` as the variant `name`."""
    from safetensors.torch import load_file, save_file

    state, metadata = SAFETENSORS[name](load_file(base))
    shift = metadata.pop("misaligned", "")
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata or None)
    if shift:
        _misalign(path)
    return path


def _misalign(path: Path) -> None:
    """Pad the header with one space, which the format allows: every tensor moves by a byte."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length].rstrip(b" ") + b" "
    while (8 + len(head)) % 2 == 0:
        head += b" "
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])


def write_gguf(
    base: Path,
    path: Path,
    kind: str,
    *,
    strings: Iterable[tuple[str, str]] = (),
    prefix: str = "",
    quantised: Callable[[str, torch.Tensor], bool] | None = None,
    stored: Callable[[str, torch.Tensor], tuple[int, ...] | None] = lambda *_: None,
    noted: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[Path, State]:
    """Write the weights of `base` as GGUF, matrices quantised as `kind`, and return what they dequantise to.

    Args:
        quantised: says which matrices are, by default the linear layers of blocks.
        stored: the dims that a tensor has in the file without a note of its own ones, None for what is usual.
        noted: prefix of the names of tensors in notes of their shapes, by default `prefix`.
        part: which part of the model to write, from 0, of how many.

    Types that the gguf package cannot quantise get random blocks of small weights.
    """
    import gguf
    import numpy
    import torch
    from gguf.constants import GGML_QUANT_SIZES
    from safetensors.torch import load_file

    quant = gguf.GGMLQuantizationType[kind]
    weights, nbytes = GGML_QUANT_SIZES[quant]
    writer = gguf.GGUFWriter(path, "wan", use_temp_file=False)
    for key, text in strings:
        writer.add_string(key, text)
    whole: State = {}
    generator = numpy.random.default_rng(0)
    model = load_file(base)
    if part[1] > 1:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
        writer.add_int32("split.tensors.count", len(model))
    for number, (key, value) in enumerate(model.items()):
        array = value.float().numpy()
        here = number * part[1] // len(model) == part[0]
        if value.ndim == 2 and value.shape[1] % weights == 0 and (quantised or is_linear)(key, value):
            blocks = _quantise(array, quant, nbytes, generator)
            dims = stored(key, value)
            stored_blocks = blocks if dims is None else blocks.reshape(*dims[:-1], -1)
            if here:
                writer.add_tensor(prefix + key, stored_blocks, raw_dtype=quant)
            with numpy.errstate(all="ignore"):
                array = gguf.quants.dequantize(blocks, quant).reshape(array.shape)
        elif here and (dims := stored(key, value)) is not None:
            writer.add_tensor(prefix + key, array.reshape(dims))
        elif here and value.ndim > 4:  # GGUF has four dims
            flat = array.reshape(array.shape[0], -1)
            writer.add_tensor(prefix + key, flat)
            name = (prefix if noted is None else noted) + key
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(map(int, array.shape)))
        elif here:
            writer.add_tensor(prefix + key, array)
        whole[key] = torch.from_numpy(numpy.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, whole


def _quantise(array: Any, quant: Any, nbytes: int, generator: Any) -> Any:
    import gguf
    import numpy
    from gguf.constants import GGML_QUANT_SIZES

    try:
        return gguf.quants.quantize(array, quant)
    except NotImplementedError:
        weights, _ = GGML_QUANT_SIZES[quant]
        rows, columns = array.shape
        blocks = generator.integers(0, 256, (rows, columns // weights * nbytes), dtype=numpy.uint8)
        with numpy.errstate(all="ignore"):
            whole = gguf.quants.dequantize(blocks, quant)
        # any bits are blocks, but most make scales that no model has: take the rows that would do
        with numpy.errstate(all="ignore"):
            good = numpy.flatnonzero(numpy.isfinite(whole).all(1) & (abs(whole).max(1) < SMALL))
        return blocks[good[numpy.arange(rows) % len(good)]] if len(good) else blocks * 0


def split(path: Path, count: int, *, index: bool) -> list[Path]:
    """Write a safetensors file in parts, with an index beside them or without, and return the parts."""
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    names = list(state)
    parts = [path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.safetensors") for number in range(count)]
    places: dict[str, str] = {}
    for number, part in enumerate(parts):
        chosen = names[number * len(names) // count : (number + 1) * len(names) // count]
        save_file({name: state[name] for name in chosen}, part, {"format": "pt"})
        places |= dict.fromkeys(chosen, part.name)
    if index:
        whole = {"metadata": {"total_size": path.stat().st_size}, "weight_map": places}
        path.with_name(f"{path.stem}.safetensors.index.json").write_text(json.dumps(whole), encoding="utf-8")
    return parts
