"""GGUF's quantised types: the same bits as the `gguf` package, whatever the bytes, the dtype and the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from comfy_raylight.loaders import quant_grids
from comfy_raylight.loaders.quants import CPU_CHUNK, GPU_CHUNK, QUANTS, dequantise
from comfy_raylight.raylight.errors import LoadError, UnsupportedError
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOATS = {"F32", "F16", "BF16"}
"""GGUF's names of what torch has a dtype for."""
every_type = pytest.mark.parametrize("name", QUANTS)


def random_blocks(name: str, count: int) -> torch.Tensor:
    """Any bytes at all: scales that are infinite, not a number or denormal among them."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, QUANTS[name].nbytes), dtype=torch.uint8, generator=generator)


def reference(blocks: torch.Tensor, name: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(quants.dequantize(blocks.numpy().reshape(1, -1), GGMLQuantizationType[name]))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values bit for bit, one NaN being as good as another."""
    bits = {2: torch.int16, 4: torch.int32}[one.itemsize]
    assert one.dtype == other.dtype and one.numel() == other.numel()
    one, other = one.cpu().flatten(), other.cpu().flatten()
    return bool(((one.view(bits) == other.view(bits)) | (one.isnan() & other.isnan())).all())


@every_type
@pytest.mark.parametrize("device", DEVICES)
def test_random_bytes(name: str, device: str) -> None:
    """More than a chunk of them, and not a whole number of chunks."""
    count = CPU_CHUNK // QUANTS[name].weights + 37
    blocks = random_blocks(name, count)
    weights = dequantise(blocks.to(device), name, (count, QUANTS[name].weights))
    assert weights.device.type == device and weights.dtype == torch.float32
    assert same_bits(weights, reference(blocks, name))


@every_type
@pytest.mark.parametrize("device", DEVICES)
def test_constant_bytes(name: str, device: str) -> None:
    """Zeros of both signs, and every value of a scale or a table that is a byte."""
    blocks = torch.arange(256, dtype=torch.uint8).unsqueeze(-1).repeat(1, QUANTS[name].nbytes)
    weights = dequantise(blocks.to(device), name, (256, QUANTS[name].weights))
    assert same_bits(weights, reference(blocks, name))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_quantised_data(name: str) -> None:
    """Of the types that the package can quantise to."""
    data = np.random.default_rng(0).standard_normal((16, 512), np.float32)
    blocks = torch.from_numpy(quants.quantize(data, GGMLQuantizationType[name]))
    weights = dequantise(blocks, name, data.shape)
    assert same_bits(weights, reference(blocks, name))
    largest = 2.0 if name.startswith("TQ") else 1.0  # three values, or at least sixteen
    assert (weights - torch.from_numpy(data)).abs().max() < largest


@every_type
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    blocks = random_blocks(name, 300)
    shape = (300, QUANTS[name].weights)
    assert same_bits(dequantise(blocks, name, shape, dtype=dtype), dequantise(blocks, name, shape).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_chunks_in_another_dtype(name: str, device: str) -> None:
    """One scratch serves all chunks, the last and shorter one too."""
    count = 2 * (CPU_CHUNK if device == "cpu" else GPU_CHUNK) // QUANTS[name].weights + 1
    blocks = random_blocks(name, count)
    weights = dequantise(blocks.to(device), name, (count * QUANTS[name].weights,), dtype=torch.bfloat16)
    assert same_bits(weights, reference(blocks, name).bfloat16())


@every_type
def test_one_block(name: str) -> None:
    blocks = random_blocks(name, 1)
    assert same_bits(QUANTS[name].decode(blocks), reference(blocks, name))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@every_type
def test_bytes_that_are_read_only_and_not_aligned(name: str) -> None:
    blocks = random_blocks(name, 5)
    data = b"x" + blocks.numpy().tobytes()
    kept = bytes(bytearray(data))
    mapped = torch.frombuffer(data, dtype=torch.uint8, offset=1)
    assert same_bits(dequantise(mapped, name, (5, QUANTS[name].weights)), reference(blocks, name))
    assert data == kept


@every_type
def test_in_inference_mode(name: str) -> None:
    blocks = random_blocks(name, 3)
    with torch.inference_mode():
        weights = dequantise(blocks, name, (3, QUANTS[name].weights), dtype=torch.bfloat16)
    assert same_bits(weights.float(), reference(blocks, name).bfloat16().float())


def test_tables_made_in_inference_mode_are_ordinary() -> None:
    with torch.inference_mode():  # by this name of the device no other test asks
        table = quant_grids.grid("IQ3_S", torch.device("cpu", 0))
    assert not table.is_inference()


def test_every_type_of_the_package() -> None:
    decoded = set()
    for kind, (_, nbytes) in GGML_QUANT_SIZES.items():
        try:
            quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        decoded.add(kind.name)
    assert set(QUANTS) == decoded - FLOATS


@every_type
def test_sizes_of_blocks(name: str) -> None:
    quant = QUANTS[name]
    assert quant.name == name
    assert (quant.weights, quant.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("shape", [(64,), (2, 32), (1, 1, 4, 2, 8)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """Any that has as many weights, also where a row is not whole blocks; and the bytes may come in any."""
    blocks = random_blocks("Q8_0", 2)
    weights = dequantise(blocks.view(4, 17), "Q8_0", shape)
    assert weights.shape == shape and same_bits(weights, reference(blocks, "Q8_0"))


def test_bytes_that_are_not_contiguous() -> None:
    blocks = random_blocks("Q6_K", 8)
    assert same_bits(dequantise(blocks[::2], "Q6_K", (4, 256)), reference(blocks[::2].clone(), "Q6_K"))


def test_no_weights() -> None:
    assert dequantise(torch.empty(0, dtype=torch.uint8), "Q4_K", (0, 256), dtype=torch.float16).shape == (0, 256)


@pytest.mark.parametrize(
    "nbytes, shape",
    [(34, (2, 32)), (68, (32,)), (33, (32,)), (35, (32,)), (0, (32,)), (34, ())],
    ids=["too few", "too many", "part of a block", "and a byte", "none", "a number"],
)
def test_bytes_that_do_not_fit(nbytes: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(LoadError, match=rf"^{nbytes} bytes of Q8_0 .*the {math.prod(shape)} would take"):
        dequantise(torch.zeros(nbytes, dtype=torch.uint8), "Q8_0", shape)


def test_types_that_cannot_be_decoded() -> None:
    with pytest.raises(UnsupportedError, match="Q8_K.*Q4_0, Q4_1.*NVFP4"):
        dequantise(torch.zeros(292, dtype=torch.uint8), "Q8_K", (256,))


def test_the_types_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        QUANTS["Q8_K"] = QUANTS["Q8_0"]  # type: ignore[index]
