"""Text encoders on the pool: every tensor of a conditioning equals that of plain ComfyUI's own loaders."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.checkpoints.encoders import write_encoders
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.prompts import FAMILIES, INIT, SAMPLER, Case, PoolCase, plain
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.files import scaled_fp8
from safetensors.torch import load_file, save_file

from .test_sampling import FP32

TEXT = "a (red:1.4) fox in the snow, (photograph:0.8)"
LONG = "one two three four five six seven eight nine ten " * 12
"""More than the 77 tokens that CLIP has places for."""
EMBEDDING, LORA, OTHER = "encoders-word", "encoders.safetensors", "encoders-other.safetensors"
FILES = {"clip_l": "encoders-l.safetensors", "clip_g": "encoders-g.safetensors", "t5_base": "encoders-t5.safetensors"}
SLOW_FILES = {"qwen3_06b": "encoders-qwen.safetensors", "scaled": "encoders-qwen-scaled.safetensors"}
CLIP, SAVE, ENCODE, POOL, MODEL = "clip", "save", "encode", INIT, "loader"
WAN = "encoders-wan.safetensors"
FSDP = {"FSDP": True}
STREAMED = {"FSDP": True, "FSDP_CPU_OFFLOAD": True}


@dataclass(frozen=True)
class Encoding:
    """One prompt.

    Attributes:
        files: kinds, one to four.
        type: as ComfyUI's loaders name it.
        nodes: CLIP -> CLIP nodes in order, each with its inputs beside `clip`.
        encode: the encoding node's inputs beside `clip`, by its class.
    """

    files: tuple[str, ...] = ("clip_l",)
    type: str = "stable_diffusion"
    nodes: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    encode: tuple[str, Mapping[str, Any]] = ("CLIPTextEncode", {"text": TEXT})


Run = Callable[..., dict[str, torch.Tensor]]
HOOKS = {
    "hook": {
        "class_type": "CreateHookLora",
        "inputs": {"lora_name": LORA, "strength_model": 0.0, "strength_clip": 0.7},
    },
    "frame": {
        "class_type": "CreateHookKeyframe",
        "inputs": {"strength_mult": 0.4, "start_percent": 0.5},
    },
    "frames": {"class_type": "SetHookKeyframes", "inputs": {"hooks": ["hook", 0], "hook_kf": ["frame", 0]}},
}
"""A LoRA of another strength from the middle of a run on: the prompt is encoded for both halves."""
HOOKED = ("SetClipHooks", {"apply_to_conds": False, "schedule_clip": True, "hooks": ["frames", 0]})
LORA_NODE = ("LoraLoader", {"lora_name": LORA, "strength_model": 0.0, "strength_clip": 0.9})
SKIP = ("CLIPSetLastLayer", {"stop_at_clip_layer": -2})
SDXL = Encoding(("clip_l", "clip_g"), "sdxl")


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer, comfy_root: Path) -> Iterator[None]:
    models = server.models.parent
    folder = models / "text_encoders"
    kinds = {folder / name: kind for kind, name in FILES.items()} | {folder / OTHER: "clip_l"}
    if LARGE and version_of(comfy_root) != "0.3.75":
        kinds[folder / SLOW_FILES["qwen3_06b"]] = "qwen3_06b"
    write_encoders(kinds, comfy_root=comfy_root)
    scaled = folder / SLOW_FILES["scaled"]
    if folder / SLOW_FILES["qwen3_06b"] in kinds:
        write_scaled(folder / SLOW_FILES["qwen3_06b"], scaled)
    # of fewer blocks nothing would be freed by dividing them
    write([Job(family="wan", path=server.models / WAN, size={"layers": 6})], comfy_root=comfy_root)
    for place in ("loras", "embeddings"):
        (models / place).mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    adapter = {}
    for layer in range(0, 12, 3):
        for part, rows, columns in (("self_attn_q_proj", 768, 768), ("mlp_fc1", 3072, 768)):
            name = f"lora_te_text_model_encoder_layers_{layer}_{part}"
            adapter[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 28
            adapter[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 8
    save_file(adapter, models / "loras" / LORA)
    save_file(
        {"emb_params": torch.randn(3, 768, generator=generator)}, models / "embeddings" / f"{EMBEDDING}.safetensors"
    )
    save_file({"some.weight": torch.zeros(4, 4)}, folder / "encoders-none.safetensors")
    yield
    for path in (*kinds, scaled):
        path.unlink(missing_ok=True)


def write_scaled(base: Path, path: Path) -> None:
    """The file in ComfyUI's scaled fp8."""
    made = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in load_file(base).items():
        if "layers." in key and key.endswith(".weight") and value.ndim == 2:
            made[key], made[key.replace(".weight", ".scale_weight")] = scaled_fp8(value)
        else:
            made[key] = value
    save_file(made, path)


@pytest.fixture(scope="module")
def encoded(server: ComfyServer, client: ComfyClient) -> Run:
    """Runs an encoding on plain ComfyUI, or on a pool; its tensors."""
    count = itertools.count()

    def run(encoding: Encoding, where: PoolCase | None = None) -> dict[str, torch.Tensor]:
        name = f"encoded{next(count)}"
        client.run(prompt_of(encoding, where, name), timeout=600)
        return load_file(server.output / f"{name}.safetensors")

    return run


def loader(encoding: Encoding, on_pool: bool) -> dict[str, Any]:
    names = [{**FILES, **SLOW_FILES, "other": OTHER}[kind] for kind in encoding.files]
    numbered = {f"clip_name{number}": name for number, name in enumerate(names, 1)}
    if on_pool:
        return {
            "class_type": "RayCLIPLoader",
            "inputs": {"ray_actors": [MODEL, 0], "type": encoding.type, **numbered},
        }
    if len(names) == 1:
        return {"class_type": "CLIPLoader", "inputs": {"clip_name": names[0], "type": encoding.type}}
    return {"class_type": "DualCLIPLoader", "inputs": {**numbered, "type": encoding.type}}


def prompt_of(encoding: Encoding, where: PoolCase | None, name: str) -> Prompt:
    prompt: Prompt = {CLIP: loader(encoding, where is not None)}
    model: dict[str, Any] = {"class_type": "UNETLoader", "inputs": {"unet_name": WAN, "weight_dtype": "default"}}
    if where is not None:
        prompt[POOL] = {"class_type": "RayInitializer", "inputs": where.initializer()}
        model = {**model, "class_type": "RayUNETLoader"}
        model["inputs"] = {**model["inputs"], "ray_actors_init": [POOL, 0]}
    source = [CLIP, 0]
    for number, (kind, inputs) in enumerate(encoding.nodes):
        given = dict(inputs)
        if kind == "LoraLoader":
            prompt[MODEL], given["model"] = model, [MODEL, 0 if where is None else 1]
        prompt[f"node{number}"] = {"class_type": kind, "inputs": {"clip": source, **given}}
        source = [f"node{number}", 1 if kind == "LoraLoader" else 0]
    if any("frames" in str(inputs) for _, inputs in encoding.nodes):
        prompt |= HOOKS
    if where is not None:
        prompt[MODEL] = model
    kind, inputs = encoding.encode
    prompt[ENCODE] = {"class_type": kind, "inputs": {"clip": source, **inputs}}
    prompt[SAVE] = {"class_type": "RLTestSaveConditioning", "inputs": {"conditioning": [ENCODE, 0], "name": name}}
    return prompt


def compare(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for key, value in expected.items():
        assert value.isfinite().all() and (not key.endswith("cond") or value.std() > 1e-4), key
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert (found[key] - value).abs().max() <= FP32 * value.abs().max(), key


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "encoding,where",
    [
        pytest.param(Encoding(), PoolCase(workers=1), id="clip-l on 1"),
        pytest.param(Encoding(), PoolCase(), id="clip-l on 2"),
        pytest.param(Encoding(), PoolCase(cfg=2), id="clip-l on cfg groups"),
        pytest.param(Encoding(encode=("CLIPTextEncode", {"text": LONG})), PoolCase(), id="long prompt"),
        pytest.param(Encoding(nodes=(SKIP,)), PoolCase(), id="skipped layers"),
        pytest.param(Encoding(nodes=(LORA_NODE,)), PoolCase(), id="lora"),
        pytest.param(Encoding(nodes=(LORA_NODE,)), PoolCase(more=FSDP), id="lora sharded"),
        pytest.param(
            Encoding(nodes=(LORA_NODE, SKIP)), PoolCase(workers=3, more=FSDP), id="lora sharded on 3", marks=SLOW
        ),
        pytest.param(Encoding(nodes=(LORA_NODE,)), PoolCase(more=STREAMED), id="lora streamed"),
        pytest.param(Encoding(nodes=(HOOKED,)), PoolCase(), id="hooks"),
        pytest.param(Encoding(nodes=(HOOKED,)), PoolCase(more=FSDP), id="hooks sharded"),
        pytest.param(
            Encoding(encode=("CLIPTextEncode", {"text": f"a embedding:{EMBEDDING} in the snow"})),
            PoolCase(),
            id="textual inversion",
        ),
        pytest.param(SDXL, PoolCase(), id="sdxl"),
        pytest.param(SDXL, PoolCase(more=FSDP), id="sdxl sharded", marks=SLOW),
        pytest.param(Encoding(("t5_base",), "stable_audio"), PoolCase(), id="t5"),
        pytest.param(Encoding(("t5_base",), "stable_audio"), PoolCase(workers=3, more=FSDP), id="t5 sharded on 3"),
        pytest.param(Encoding(("t5_base",), "stable_audio"), PoolCase(more=STREAMED), id="t5 streamed", marks=SLOW),
        pytest.param(Encoding(("qwen3_06b",)), PoolCase(), id="qwen3", marks=SLOW),
        pytest.param(Encoding(("qwen3_06b",)), PoolCase(more=FSDP), id="qwen3 sharded", marks=SLOW),
        pytest.param(Encoding(("scaled",)), PoolCase(), id="scaled fp8", marks=SLOW),
        pytest.param(Encoding(("scaled",)), PoolCase(more=FSDP), id="scaled fp8 sharded", marks=SLOW),
    ],
)
def test_equals_plain(encoded: Run, comfy_root: Path, encoding: Encoding, where: PoolCase) -> None:
    if SLOW_FILES.keys() & set(encoding.files) and version_of(comfy_root) == "0.3.75":
        pytest.skip("this ComfyUI does not know Qwen3 0.6B")
    compare(encoded(encoding, where), encoded(encoding))


def test_merged_encoders(server: ComfyServer, client: ComfyClient) -> None:
    found = []
    for name, where in (("merged-plain", None), ("merged-pool", PoolCase())):
        prompt = prompt_of(Encoding(), where, name)
        prompt["other"] = loader(Encoding(("other",)), where is not None)
        merge = {"clip1": [CLIP, 0], "clip2": ["other", 0], "ratio": 0.3}
        prompt["merged"] = {"class_type": "CLIPMergeSimple", "inputs": merge}
        prompt[ENCODE]["inputs"]["clip"] = ["merged", 0]
        client.run(prompt, timeout=600)
        found.append(load_file(server.output / f"{name}.safetensors"))
    compare(found[1], found[0])


def test_without_a_number(server: ComfyServer, result: Callable[[Prompt], torch.Tensor]) -> None:
    """Load Model (all GPUs) and text encoders on whatever it chooses, one picture after the other."""
    for text, cfg in ((TEXT, 4.0), (TEXT, 1.0), (LONG, 4.0)):
        case = Case(file="unet.safetensors", inputs=FAMILIES["unet"], cfg=cfg)
        found = []
        for on_pool in (False, True):
            prompt = plain(case)
            if on_pool:
                prompt[MODEL] = {"class_type": "RayModel", "inputs": {"model_name": case.file, "gpus": "0,1"}}
            prompt[CLIP] = loader(Encoding(), on_pool)
            if on_pool:
                prompt[CLIP]["inputs"]["ray_actors"] = [MODEL, 3]
            for name, words in (("positive", text), ("negative", "blurry")):
                prompt[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": [CLIP, 0], "text": words}}
                prompt[SAMPLER]["inputs"][name] = [name, 0]
            found.append(result(prompt))
        expected, ours = found
        assert expected.std() > 1e-3 and (ours - expected).abs().max() <= FP32 * expected.abs().max()


def test_memory_is_the_files(server: ComfyServer, client: ComfyClient) -> None:
    """Workers map the encoder: no page of it is written to, and all of them have the same ones."""
    client.run(prompt_of(Encoding(nodes=(SKIP,)), PoolCase(), "mapped"), timeout=600)
    size = (server.models.parent / "text_encoders" / FILES["clip_l"]).stat().st_size
    told = client.get("/raylight/status", timeout=30)["pool"]
    (loaded,) = (model for model in told["models"] if model["path"].endswith(FILES["clip_l"]))
    assert abs(loaded["bytes"] - size) < size / 50 and "resident" in loaded["weights"]
    for worker in told["workers"]:
        assert mapped_dirty(worker["process"], FILES["clip_l"]) < size / 50


def mapped_dirty(pid: int, name: str) -> int:
    """Bytes of a file's map that a process has pages of its own for."""
    dirty, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(name)
        elif inside and line.startswith("Private_Dirty:"):
            dirty += int(line.split()[1]) * 1024
    return dirty


def test_what_is_none_is_refused(client: ComfyClient) -> None:
    prompt = prompt_of(Encoding(), PoolCase(), "none")
    prompt[CLIP]["inputs"]["clip_name1"] = "encoders-none.safetensors"
    with pytest.raises(PromptError, match=r"does not recognise a text encoder in encoders-none.*Choose a safetensors"):
        client.run(prompt, timeout=600)


@pytest.mark.parametrize(
    "node,inputs,says",
    [
        ("CLIPSave", {"filename_prefix": "clip/saved"}, "on the pool cannot be saved"),
        ("RLTestReachEncoder", {}, "reaches into text encoders that are on the workers.*clip_l"),
    ],
)
def test_nodes_that_need_weights_are_refused(client: ComfyClient, node: str, inputs: dict[str, Any], says: str) -> None:
    prompt = prompt_of(Encoding(), PoolCase(), "reached")
    del prompt[SAVE], prompt[ENCODE]
    prompt[SAVE] = {"class_type": node, "inputs": {"clip": [CLIP, 0], **inputs}}
    with pytest.raises(PromptError, match=says):
        client.run(prompt, timeout=600)
