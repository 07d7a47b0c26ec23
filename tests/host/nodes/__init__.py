"""Nodes for tests: conditioning and latents without text encoders or VAEs, and results as files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import torch
from safetensors.torch import save_file

CATEGORY = "raylight/test"
BIG = 0xFFFFFFFFFFFFFFFF


def made(value: Any, generator: torch.Generator) -> Any:
    """What a description stands for; anything that is none stands for itself.

    Descriptions are dicts with one key: `randn` (a shape), `ints` (the limit, then a shape), `mask` (tokens, then
    how many of them count) and `object` (its attributes). They may stand inside of lists and other dicts.
    """
    match value:
        case {"randn": shape}:
            return torch.randn(shape, generator=generator)
        case {"ints": [limit, *shape]}:
            return torch.randint(limit, shape, generator=generator)
        case {"mask": [tokens, valid]}:
            return (torch.arange(tokens) < valid).long()[None]
        case {"object": attributes}:
            return SimpleNamespace(**{name: made(each, generator) for name, each in attributes.items()})
        case list():
            return [made(each, generator) for each in value]
        case dict():
            return {name: made(each, generator) for name, each in value.items()}
        case _:
            return value


class RLTestConditioning:
    """Random conditioning with the parts a family needs."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": ("INT", {"default": 1, "min": 0, "max": BIG}),
                "tokens": ("INT", {"default": 32, "min": 1, "max": 65536}),
                "width": ("INT", {"default": 4096, "min": 1, "max": 65536}),
                "pooled": ("INT", {"default": 0, "min": 0, "max": 65536}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0}),
                "attention_mask": ("BOOLEAN", {"default": False}),
            },
            "optional": {"extras": ("STRING", {"default": "{}", "tooltip": "more parts as JSON, see `made`"})},
        }

    def make(
        self,
        *,
        seed: int,
        tokens: int,
        width: int,
        pooled: int,
        guidance: float,
        attention_mask: bool,
        extras: str = "{}",
    ) -> tuple[list[Any]]:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=generator)
        options: dict[str, Any] = {}
        if pooled:
            options["pooled_output"] = torch.randn(1, pooled, generator=generator)
        if guidance >= 0:
            options["guidance"] = guidance
        if attention_mask:
            options["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        options.update({name: made(value, generator) for name, value in json.loads(extras).items()})
        return ([[context, options]],)


class RLTestLatent:
    """An empty or random latent, with frames (5-D) or without (4-D); height and width are the latent's own.

    `shape` replaces all of them: the dims after the batch, separated by commas, and several latents by semicolons.
    The first `kept` frames are masked, so that sampling keeps them; of sound beside a video the first parts in time.
    """

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 16, "min": 1, "max": 4096}
        return {
            "required": {
                "channels": ("INT", {"default": 16, "min": 1, "max": 4096}),
                "frames": ("INT", {"default": 0, "min": 0, "max": 4096}),
                "height": ("INT", size),
                "width": ("INT", size),
                "batch": ("INT", {"default": 1, "min": 1, "max": 64}),
                "seed": ("INT", {"default": 1, "min": 0, "max": BIG}),
                "empty": ("BOOLEAN", {"default": True}),
            },
            "optional": {"shape": ("STRING", {"default": ""}), "kept": ("INT", {"default": 0, "min": 0, "max": 4096})},
        }

    def make(
        self,
        *,
        channels: int,
        frames: int,
        height: int,
        width: int,
        batch: int,
        seed: int,
        empty: bool,
        shape: str = "",
        kept: int = 0,
    ) -> tuple[dict[str, Any]]:
        sizes = [(channels, *((frames,) if frames else ()), height, width)]
        if shape:
            sizes = [tuple(int(number) for number in part.split(",")) for part in shape.split(";")]
        generator = torch.Generator().manual_seed(seed)
        latents = [torch.zeros(batch, *size) for size in sizes]
        if not empty:
            latents = [torch.randn(latent.shape, generator=generator) for latent in latents]
        result = {"samples": _nested(latents) if len(latents) > 1 else latents[0]}
        if kept:
            masks = [torch.ones(batch, 1, *size[1:]) for size in sizes]
            masks[0][:, :, :kept] = 0
            for mask in masks[1:]:
                mask[..., :kept] = 0
            result["noise_mask"] = _nested(masks) if len(masks) > 1 else masks[0]
        return (result,)


def _nested(latents: list[torch.Tensor]) -> Any:
    from comfy.nested_tensor import NestedTensor  # ComfyUI before 0.4 has none

    return NestedTensor(latents)


class RLTestSigmas:
    """The given sigmas, separated by commas."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("SIGMAS",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sigmas": ("STRING", {"default": "1.0, 0.5, 0.0"})}}

    def make(self, sigmas: str) -> tuple[torch.Tensor]:
        return (torch.tensor([float(value) for value in sigmas.split(",")]),)


class RLTestSaveLatent:
    """Writes the latent to NAME.safetensors in the output folder; several latents as one vector."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "name": ("STRING", {"default": "latent"})}}

    def save(self, samples: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        latent: Any = samples["samples"]
        if getattr(latent, "is_nested", False) and not isinstance(latent, torch.Tensor):
            latent = torch.cat([each.flatten() for each in latent.unbind()])
        tensor = latent.detach().cpu().contiguous()
        save_file({"samples": tensor}, path)
        return {"ui": {"latents": [{"path": str(path), "shape": list(tensor.shape), "dtype": str(tensor.dtype)}]}}


class RLTestSaveValues:
    """Writes noise levels, or one number, to NAME.safetensors in the output folder."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"values": ("SIGMAS,FLOAT", {}), "name": ("STRING", {"default": "values"})}}

    def save(self, values: torch.Tensor | float, name: str) -> dict[str, Any]:
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({"values": torch.as_tensor(values, dtype=torch.float64).reshape(-1).contiguous()}, path)
        return {"ui": {"values": [{"path": str(path)}]}}


class RLTestSaveConditioning:
    """Writes every tensor of a conditioning to NAME.safetensors in the output folder, by entry and name."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {"default": "conditioning"})}}

    def save(self, conditioning: list[Any], name: str) -> dict[str, Any]:
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        found = {
            f"{number}.{key}": value.detach().contiguous().clone()
            for number, (cond, more) in enumerate(conditioning)
            for key, value in {"cond": cond, **more}.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(found, path)
        return {"ui": {"conditioning": [{"path": str(path)}]}}


class RLTestSound:
    """A sound, and a VAE that makes a random latent of any."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("AUDIO", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[dict[str, Any], Any]:
        latent = torch.randn(1, 8, 4, 16, generator=torch.Generator().manual_seed(5))
        vae = SimpleNamespace(audio_sample_rate=44100, encode=lambda sound: latent)
        return {"waveform": torch.zeros(1, 2, 4410), "sample_rate": 44100}, vae


class RLTestMirrors:
    """The pack's table of mirrors: the ids of both nodes of each row."""

    CATEGORY = CATEGORY
    FUNCTION = "read"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def read(self) -> dict[str, Any]:
        mirrors = importlib.import_module("comfy_raylight.nodes.mirrors").MIRRORS
        return {"ui": {"mirrors": [{"id": mirror.id, "core": mirror.core} for mirror in mirrors]}}


class RLTestSaveLatents(RLTestSaveLatent):
    """Writes the latents of a list to NAME0.safetensors, NAME1.safetensors and so on."""

    INPUT_IS_LIST = True

    def save(self, samples: list[Any], name: list[str]) -> dict[str, Any]:  # type: ignore[override]
        saved = [super(RLTestSaveLatents, self).save(one, f"{name[0]}{index}") for index, one in enumerate(samples)]
        return {"ui": {"latents": [entry for one in saved for entry in one["ui"]["latents"]]}}


class RLTestLatents:
    """Two latents as a list."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_IS_LIST = (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"first": ("LATENT",), "second": ("LATENT",)}}

    def make(self, first: Any, second: Any) -> tuple[list[Any]]:
        return ([first, second],)


class RLTestRayActors:
    """A MODEL of the pool under the earlier pack's type."""

    CATEGORY = CATEGORY
    FUNCTION = "same"
    RETURN_TYPES = ("RAY_ACTORS",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def same(self, model: Any) -> tuple[Any]:
        return (model,)


class RLTestPixels:
    """Random pictures, or frames of a smooth pattern that moves."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 64, "min": 1, "max": 4096}
        return {
            "required": {
                "frames": ("INT", size),
                "height": ("INT", size),
                "width": ("INT", size),
                "channels": ("INT", {"default": 3, "min": 1, "max": 4}),
                "smooth": ("BOOLEAN", {"default": False}),
            }
        }

    def make(self, *, frames: int, height: int, width: int, channels: int, smooth: bool) -> tuple[torch.Tensor]:
        if not smooth:
            return (torch.rand(frames, height, width, channels, generator=torch.Generator().manual_seed(1)),)
        t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
        waves = [torch.sin(6 * (x * (c + 1) + y * (3 - c) + t)) for c in range(channels)]
        return (torch.stack(waves, -1) / 2 + 0.5,)


class RLTestSavePixels:
    """Writes pictures to NAME.safetensors in the output folder as they are."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {"default": "pixels"})}}

    def save(self, images: torch.Tensor, name: str) -> dict[str, Any]:
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({"pixels": images.detach().cpu().contiguous()}, path)
        return {"ui": {"pixels": [{"path": str(path), "shape": list(images.shape)}]}}


class RLTestReachEncoder:
    """Encodes with a part of the text encoders, as nodes that weigh words in their own way do."""

    CATEGORY = CATEGORY
    FUNCTION = "encode"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",)}}

    def encode(self, clip: Any) -> dict[str, Any]:
        clip.load_model()
        tokens = clip.tokenize("a fox")
        cond, _ = clip.cond_stage_model.clip_l.encode_token_weights(tokens["l"])
        return {"ui": {"shape": [list(cond.shape)]}}


class RLTestFailure:
    """A model with a patch in its attention that raises a ValueError on one rank of a pool (-1: everywhere)."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "rank": ("INT", {"default": -1, "min": -1, "max": 99})}}

    def patch(self, model: Any, rank: int) -> tuple[Any]:
        def fail(function: Any, *args: Any, **kwargs: Any) -> Any:
            import torch.distributed

            here = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            if rank in (-1, here):
                raise ValueError("a patch went wrong")
            return function(*args, **kwargs)

        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = fail
        return (clone,)


class RLTestCapture:
    """A model with a patch in its attention that keeps what it sees for the node, as detectors of poses do."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        seen = None

        def capture(function: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen = args[0]
            return function(*args, **kwargs)

        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = capture
        clone.capture = lambda: seen
        return (clone,)


class AnyKind(str):
    """A type of a socket that goes with every other."""

    def __ne__(self, other: object) -> bool:
        return False


class EasyCleanGpuUsed:
    """Stands in for a node of ComfyUI-Easy-Use that the earlier pack's files pass values through."""

    CATEGORY = CATEGORY
    FUNCTION = "forward"
    RETURN_TYPES = (AnyKind("*"),)
    RETURN_NAMES = ("output",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"anything": ("*", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        """Any type will do."""
        return True

    def forward(self, anything: Any) -> tuple[Any]:
        return (anything,)


NODES = (
    RLTestReachEncoder,
    RLTestFailure,
    RLTestCapture,
    RLTestConditioning,
    RLTestLatent,
    RLTestSigmas,
    RLTestSaveLatent,
    RLTestSaveValues,
    RLTestSaveConditioning,
    RLTestSound,
    RLTestMirrors,
    RLTestSaveLatents,
    RLTestRayActors,
    RLTestLatents,
    RLTestPixels,
    RLTestSavePixels,
)
NODE_CLASS_MAPPINGS = {**{node.__name__: node for node in NODES}, "easy cleanGpuUsed": EasyCleanGpuUsed}
