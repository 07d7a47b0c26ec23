"""Puts the demo's files into a ComfyUI: those of examples/comfyui, and a text encoder and a GGUF file made here.

    python custom_nodes/raylight/examples/install_demo.py [FOLDER]

FOLDER is the one that has ComfyUI's `models`; without it, that of the ComfyUI in whose custom_nodes the pack is. The
pack's requirements are to be installed in the Python that runs this.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DEMO = Path(__file__).absolute().parent / "comfyui"
ENCODER = Path("models", "text_encoders", "raylight_demo_words.safetensors")
MODEL = Path("models", "diffusion_models", "raylight_demo.safetensors")
GGUF = MODEL.with_name("raylight_demo_Q8_0.gguf")
WORDS: Mapping[str, int] = {
    "red": 736,
    "green": 1901,
    "blue": 1746,
    "yellow": 4481,
    "circle": 7117,
    "square": 3999,
    "triangle": 14615,
    "left": 1823,
    "right": 1155,
    "up": 705,
    "down": 1136,
}
"""What the demo's model has learned, with each word's number in the vocabulary of CLIP."""
VOCABULARY, WIDTH, HIDDEN, LAYERS = 49408, 768, 3072, 12
"""The size of CLIP-L, which every ComfyUI can load; it takes no other."""
LENGTH = 16
"""Tokens of a prompt, of which the first and the last mean nothing."""
ONE, MINUS = 0x38, 0xB8
"""Of safetensors' F8_E4M3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the folder that has ComfyUI's models")
    folder = parser.parse_args().folder or DEMO.parents[3]
    if not (folder / "models").is_dir():
        sys.exit(f"There is no folder models in {folder}: name the one that has it.")
    for path in install(folder):
        print(path)


def install(folder: Path) -> list[Path]:
    """Copy and make the demo's files below `folder`, over those that are there; their paths."""
    paths = []
    for path in sorted(path for path in DEMO.rglob("*") if path.is_file()):
        paths.append(folder / path.relative_to(DEMO))
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, paths[-1])
    write_encoder(folder / ENCODER)
    write_gguf(DEMO / MODEL, folder / GGUF)
    return [*paths, folder / ENCODER, folder / GGUF]


def write_gguf(model: Path, path: Path) -> None:
    """The model again, its matrices in blocks of 8 bits, the embeddings too: they are most of so small a model."""
    import gguf
    from safetensors.numpy import load_file

    kind = gguf.GGMLQuantizationType.Q8_0
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "wan", use_temp_file=False)
    for name, weight in load_file(model).items():
        values = weight.astype("float32")
        if values.ndim == 2 and name.endswith(".weight"):
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        elif values.ndim > 4:  # GGUF has four dims
            writer.add_tensor(name, values.reshape(values.shape[0], -1))
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def write_encoder(path: Path) -> None:
    """A CLIP-L that hears `WORDS` and nothing else.

    Its layers are zeros and add nothing, so what comes out for a word is the word's row of the table. The file has 123
    MB, since CLIP-L has no other size; it is made here because it is zeros, which most file systems do not store.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors():
        begin, end = end, end + math.prod(shape)
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    table = header["text_model.embeddings.token_embedding.weight"]["data_offsets"][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for (_, token), signs in zip(WORDS.items(), vectors(), strict=True):
            file.seek(start + table + token * WIDTH)
            file.write(bytes(ONE if sign > 0 else MINUS for sign in signs))
        file.truncate(start + end)
    partial.replace(path)


def tensors() -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of CLIP-L."""

    def layer(name: str, rows: int, columns: int) -> Iterator[tuple[str, list[int]]]:
        yield f"{name}.weight", [rows, columns] if columns else [rows]
        yield f"{name}.bias", [rows]

    yield "text_model.embeddings.token_embedding.weight", [VOCABULARY, WIDTH]
    yield "text_model.embeddings.position_embedding.weight", [LENGTH, WIDTH]
    for number in range(LAYERS):
        block = f"text_model.encoder.layers.{number}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from layer(f"{block}.{norm}", WIDTH, 0)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from layer(f"{block}.self_attn.{part}", WIDTH, WIDTH)
        yield from layer(f"{block}.mlp.fc1", HIDDEN, WIDTH)
        yield from layer(f"{block}.mlp.fc2", WIDTH, HIDDEN)
    yield from layer("text_model.final_layer_norm", WIDTH, 0)
    yield "text_projection.weight", [WIDTH, WIDTH]


def vectors() -> list[list[int]]:
    """What the encoder makes of each of `WORDS`: `WIDTH` signs, so that half of them differ between any two words."""
    return [[(-1) ** (code & place).bit_count() for place in range(WIDTH)] for code in range(1, len(WORDS) + 1)]


if __name__ == "__main__":
    main()
