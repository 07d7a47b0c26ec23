"""Gives every core node that takes and returns a MODEL to the pool and to plain ComfyUI, and compares the pictures.

    sweep.py COMFY_ROOT OUT.json --model FAMILY=FILE:WORKERS --second FILE [--packs FOLDER]

One family, one pool, one process: the driver's. `--second` is another checkpoint of the family, for merges. `--packs`
has the nodes of other packs tried in place of ComfyUI's, samplers that return a LATENT or IMAGE as well; what they need
must be installed.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import importlib
import json
import logging
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACK = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
"""Largest difference of equal pictures, relative to the largest value."""
ROUNDING = {"ModelComputeDtype": 2e-2}
"""Nodes that have the model compute in bfloat16, and what its rounding makes of a picture in two steps: some CPUs'
matrix products round otherwise for other numbers of rows, which workers have."""
NODE_LIMIT_S = 100
"""After so long with one node this process shows its stacks and ends."""
STEPS = 2
CACHE_STEPS = 10
"""Caches skip no call in less."""

ULP = 2.0**-23
"""Of float32 at 1: what may be in the last digit of a noise."""
EQUAL, SAME_ERROR, REFUSED, NOT_TRIED = "equal", "same error", "refused", "not tried"
UNSETTLED = "equal (unsettled)"
"""Further apart than TOLERANCE, but no further than plain pictures whose noise differs in the last digit."""
DIFFERENT, ONE_SIDED, LEAK, POOL_LOST = "different", "only one side failed", "leak", "pool lost"
FINE = frozenset({EQUAL, UNSETTLED, SAME_ERROR, REFUSED, NOT_TRIED})


@dataclass(frozen=True)
class Family:
    """What a family takes: text tokens, their width, more of the conditioning, the latent's shape.

    Sizes are such that two workers get parts of different length.
    """

    tokens: int
    width: int
    shape: tuple[int, ...]
    pooled: int = 0
    guidance: float = 0.0


FAMILIES: Mapping[str, Family] = {
    "wan": Family(32, 4096, (1, 16, 3, 14, 18)),
    "flux": Family(20, 64, (1, 16, 14, 18), pooled=32, guidance=3.5),
    # by hand: a small checkpoint of Flux.2 shows what FluxKVCache does where it can act
    "flux2": Family(20, 64, (1, 128, 7, 9)),
    "unet": Family(77, 768, (1, 4, 8, 8)),
}


@dataclass(frozen=True)
class Setting:
    """How to sample so that a node can act."""

    steps: int
    reference: bool
    masked: bool

    @classmethod
    def of(cls, node: str) -> Setting:
        return cls(
            steps=CACHE_STEPS if "Cache" in node else STEPS,
            reference=node == "FluxKVCache",
            masked=node == "DifferentialDiffusion",
        )


@dataclass(frozen=True)
class Verdict:
    """What came of one node with one family; `reason` is short and the same on every machine."""

    verdict: str
    reason: str = ""


class Missing(Exception):
    """The node wants something this sweep cannot make; the text says what."""


class _Make:
    """In `NUDGES`: give this optional input as well, made from its type."""


MAKE = _Make()
_LAYERS = {"double_layers": "0", "single_layers": "0", "layers": "0", "start_percent": 0.0, "end_percent": 1.0}
_CACHE = {"reuse_threshold": 5.0, "start_percent": 0.0, "end_percent": 1.0}
_WINDOWS = {"context_length": 2, "context_overlap": 1, "dim": 2}
_SCALES = {"q": 1.5, "k": 0.7, "v": 1.2, "out": 0.9}
_SIZE = {"width": 144, "height": 112, "length": 9}

NUDGES: Mapping[str, Mapping[str, Any]] = {
    "ARVideoI2V": _SIZE,
    "ContextWindowsManual": _WINDOWS,
    "CFGOverride": {"cfg": 2.0},
    "EasyCache": _CACHE,
    "Epsilon Scaling": {"scaling_factor": 1.1},
    "FreSca": {"freq_cutoff": 2},
    "HyperTile": {"tile_size": 32, "max_depth": 1},
    "LTXVContextWindows": {"context_length": 9, "context_overlap": 8},
    "LTXVSpatioTemporalGuidance": {"blocks": "0"},
    "LazyCache": _CACHE,
    "ModelComputeDtype": {"dtype": "bf16"},
    "ModelNoiseScale": {"noise_scale": 2.0},
    "ModelSamplingDiscrete": {"sampling": "v_prediction"},
    "ModelSamplingFlux": {"max_shift": 1.5},
    "PatchModelAddDownscale": {"block_number": 1, "end_percent": 1.0},
    "RenormCFG": {"renorm_cfg": 0.5},
    "ScaleROPE": {"scale_x": 1.5},
    "SkipLayerGuidanceDiT": _LAYERS,
    "SkipLayerGuidanceDiTSimple": _LAYERS,
    "SkipLayerGuidanceSD3": _LAYERS,
    "TrainLoraNode": {"steps": 1, "rank": 1, "training_dtype": "fp32", "lora_dtype": "fp32"},
    "UNetCrossAttentionMultiply": _SCALES,
    "UNetSelfAttentionMultiply": _SCALES,
    "UNetTemporalAttentionMultiply": {"self_structural": 1.5, "cross_structural": 0.7},
    "WanContextWindowsManual": {"context_length": 5, "context_overlap": 1},
    "WanInfiniteTalkToVideo": {"mode": {"mode": "single_speaker"}, **_SIZE, "start_image": MAKE},
    "ZImageFunControlnet": {"image": MAKE},
}
"""Inputs in place of the defaults, where these do nothing to models as small as ours."""
REFUSAL = " cannot be used with a model on the Raylight pool"
"""Said in every refusal of a node; the table need not repeat it."""
MERGE_RATIO = 0.25
"""For the numbers of merging nodes, whose defaults take one model as it is."""


VIDEO_VAE = frozenset({"QwenImageDiffsynthControlnet", "WanInfiniteTalkToVideo"})
"""Nodes of families whose VAE makes videos."""


class StandInVAE:
    """Makes latents of fitting shape: what is in them does not matter here."""

    audio_sample_rate = 44100

    def __init__(self, *, video: bool) -> None:
        self._video = video

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.ndim == 3:  # sound
            return _noise(5, 1, 8, 4, 16)
        frames, height, width = pixels.shape[0], pixels.shape[1] // 8, pixels.shape[2] // 8
        return (
            _noise(5, 1, 16, (frames - 1) // 4 + 1, height, width) if self._video else _noise(5, 1, 16, height, width)
        )

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return _noise(6, 1, latent.shape[-2] * 8, latent.shape[-1] * 8, 3)

    def spacial_compression_encode(self) -> int:
        return 8


class Inputs:
    """Makes the inputs of a node by their declared types: defaults, or small real objects."""

    def __init__(self, family: str, models: tuple[Any, Any], lora: Path) -> None:
        self._family = FAMILIES[family]
        self._models = models
        self._lora = lora

    def of(self, name: str, node: type) -> dict[str, Any]:
        """Keyword arguments for the node's function.

        Raises:
            Missing: one of them cannot be made.
        """
        declared: dict[str, Any] = node.INPUT_TYPES()  # type: ignore[attr-defined]
        nudges = NUDGES.get(name, {})
        result: dict[str, Any] = {}
        models = iter(self._models)
        for key, spec in declared.get("required", {}).items():
            if spec[0] == "MODEL":
                result[key] = next(models)
            elif key in nudges:
                result[key] = nudges[key]
            else:
                result[key] = self._value(name, node, spec)
        samples = "MODEL" not in node.RETURN_TYPES  # type: ignore[attr-defined]
        for key, spec in declared.get("optional", {}).items():
            if samples and spec[0] == "MODEL":
                result[key] = next(models)
            elif nudges.get(key) is MAKE or spec[0] in NEEDED or (samples and spec[0] in SAMPLED):
                result[key] = self._value(name, node, spec)
            elif key in nudges:
                result[key] = nudges[key]
        if getattr(node, "INPUT_IS_LIST", False):
            result = {key: [value, value] for key, value in result.items()}
        return result

    def _value(self, name: str, node: type, spec: Any) -> Any:
        kind = spec[0]
        options: dict[str, Any] = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
        if isinstance(kind, (list, tuple)) or kind == "COMBO":
            choices = kind if isinstance(kind, (list, tuple)) else options.get("options") or []
            if not choices and "default" not in options:
                raise Missing("needs a file")
            return options.get("default", choices[0] if choices else None)
        if kind == "FLOAT" and name.startswith("ModelMerge"):
            return MERGE_RATIO
        if kind in PLAIN:
            return options.get("default", PLAIN[kind])
        maker = self._makers(name, node).get(kind)
        if maker is None:
            raise Missing(f"needs {kind}")
        return maker()

    def _makers(self, name: str, node: type) -> dict[str, Callable[[], Any]]:
        return {
            "AUDIO": lambda: {"waveform": _noise(8, 1, 1, 4410), "sample_rate": 44100},
            "AUDIO_ENCODER_OUTPUT": lambda: {"encoded_audio_all_layers": [_noise(n, 1, 40, 768) for n in range(13)]},
            "CLIP": lambda: None,  # the model's half of the node is what counts here
            "CLIP_VISION": _clip_vision,
            "CLIP_VISION_OUTPUT": _clip_vision_output,
            "CONDITIONING": lambda: conditioning(self._family, 5),
            "EMBEDS": lambda: _noise(14, 1, CLIP_VISION_WIDTH),
            "IMAGE": lambda: _noise(1, 1, 112, 144, 3).sigmoid(),
            "IPADAPTER": _ip_adapter,
            "LATENT": lambda: {"samples": _noise(4, *self._family.shape)},
            "LATENT_OPERATION": _latent_operation,
            "LORA_MODEL": self._lora_model,
            "MASK": lambda: _ones(1, 112, 144),
            "MODEL_PATCH": lambda: _model_patch(name, node),
            "NOISE": lambda: call_node(registered()["RandomNoise"], {"noise_seed": 3})[0],
            "SAMPLER": lambda: call_node(registered()["KSamplerSelect"], {"sampler_name": "euler"})[0],
            "SIGMAS": lambda: _noise(2, 5).abs().sort(descending=True).values,
            "VAE": lambda: StandInVAE(video=len(self._family.shape) == 5 or name in VIDEO_VAE),
        }

    def _lora_model(self) -> Any:
        import comfy.utils

        return comfy.utils.load_torch_file(str(self._lora), safe_load=True)


CLIP_VISION_WIDTH = 16
MADE = ("MODEL", "LATENT", "IMAGE")
"""What nodes of other packs return that can be compared."""
NEEDED, SAMPLED = ("CLIP_VISION",), ("CONDITIONING", "LATENT")
"""What nodes need that say it is optional: all of them, and samplers."""
PLAIN: Mapping[str, Any] = {"INT": 1, "FLOAT": 1.0, "STRING": "", "BOOLEAN": False}


def _noise(seed: int, *shape: int) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ones(*shape: int) -> torch.Tensor:
    import torch

    return torch.ones(shape)


def _clip_vision_output() -> Any:
    import comfy.clip_vision

    output = comfy.clip_vision.Output()
    output["all_hidden_states"] = _noise(9, 1, 27, 729, 1152)
    output["penultimate_hidden_states"] = _noise(10, 1, 729, 1152)
    return output


def _clip_vision() -> Any:
    """ComfyUI's own image encoder with random weights, small but for its number of layers."""
    import comfy.clip_vision
    import torch

    config = {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": 32,
        "image_size": 224,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": CLIP_VISION_WIDTH,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        vision = comfy.clip_vision.ClipVisionModel(str(path))
    with torch.inference_mode():
        for index, weight in enumerate(vision.model.parameters()):
            weight.copy_(0.1 * _noise(index, *weight.shape))
    return vision


def _ip_adapter() -> dict[str, dict[str, torch.Tensor]]:
    """As files for SD1.5 have it: keys and values of each cross-attention, by odd numbers, from four more tokens."""
    text = FAMILIES["unet"].width
    widths = (320,) * 2 + (640,) * 2 + (1280,) * 2 + (1280,) * 3 + (640,) * 3 + (320,) * 3 + (1280,)
    layers = {
        f"{2 * number + 1}.{part}.weight": _noise(number, width, text) * text**-0.5
        for number, width in enumerate(widths)
        for part in ("to_k_ip", "to_v_ip")
    }
    projection = {
        "proj.weight": _noise(40, 4 * text, CLIP_VISION_WIDTH),
        "proj.bias": _noise(41, 4 * text),
        "norm.weight": _ones(text),
        "norm.bias": _noise(42, text),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def _latent_operation() -> Any:
    return call_node(registered()["LatentOperationTonemapReinhard"], {"multiplier": 1.0})[0]


def _model_patch(name: str, node: type) -> Any:
    """The model patch a node is made for, small or without weights."""
    import comfy.model_patcher
    import comfy.ops
    import torch

    place = sys.modules[node.__module__]
    build: dict[str, Callable[[], torch.nn.Module]] = {
        "QwenImageDiffsynthControlnet": lambda: place.QwenImageBlockWiseControlNet(
            num_layers=2, dim=256, operations=comfy.ops.disable_weight_init
        ),
        "USOStyleReference": lambda: place.SigLIPMultiFeatProjModel(
            style_token_nums=4, hidden_size=256, operations=comfy.ops.disable_weight_init
        ),
        "SUPIRApply": lambda: importlib.import_module("comfy.ldm.supir.supir_modules").SUPIR(
            device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init
        ),
        "WanInfiniteTalkToVideo": lambda: importlib.import_module("comfy_extras.nodes_model_patch").MultiTalkModelPatch(
            context_tokens=4,
            in_dim=256,
            intermediate_dim=16,
            out_dim=16,
            num_layers=2,
            operations=comfy.ops.disable_weight_init,
        ),
        "ZImageFunControlnet": lambda: importlib.import_module("comfy.ldm.lumina.controlnet").ZImage_Control(
            device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init
        ),
    }
    if name not in build:
        raise Missing("needs MODEL_PATCH")
    model = build[name]()
    for index, weight in enumerate(model.parameters()):
        if not weight.is_meta:
            weight.data = 0.05 * _noise(index, *weight.shape)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def conditioning(family: Family, seed: int, **more: Any) -> list[list[Any]]:
    """One text, with what the family wants besides."""
    options: dict[str, Any] = {}
    if family.guidance:
        options["guidance"] = family.guidance
    if family.pooled:
        options["pooled_output"] = _noise(seed + 100, 1, family.pooled)
    return [[_noise(seed, 1, family.tokens, family.width), {**options, **more}]]


def sample(model: Any, family: Family, node: str, *, nudge: bool = False) -> torch.Tensor:
    """A picture by euler at cfg 3, in the setting of `node`.

    Args:
        nudge: change the noise in its last digit.
    """
    import comfy.sample
    import torch

    setting = Setting.of(node)
    more: dict[str, Any] = {}
    if setting.reference:  # it cannot go together with a guidance embedding
        more = {"reference_latents": [_noise(11, *family.shape)], "guidance": None}
    with torch.inference_mode():
        torch.manual_seed(0)
        picture: torch.Tensor = comfy.sample.sample(
            model,
            _noise(7, *family.shape) * (1 + (ULP if nudge else 0.0)),
            setting.steps,
            3.0,
            "euler",
            "simple",
            conditioning(family, 1, **more),
            conditioning(family, 2, **more),
            torch.zeros(family.shape),
            noise_mask=_noise(12, 1, 1, *family.shape[-2:]).sigmoid() if setting.masked else None,
            disable_pbar=True,
            seed=7,
        )
    return picture


def call_node(node: type, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Run a node of either kind as the executor does; its outputs."""
    import torch

    with torch.inference_mode():
        output = getattr(node(), node.FUNCTION)(**arguments)  # type: ignore[attr-defined]
    values: tuple[Any, ...] = getattr(output, "args", output)
    return values


def registered() -> dict[str, Any]:
    """ComfyUI's own nodes by name."""
    import nodes

    found: dict[str, Any] = nodes.NODE_CLASS_MAPPINGS  # type: ignore[attr-defined]  # a benchmark has that name
    return found


def pack_nodes(packs: Path) -> frozenset[str]:
    """Load the node packs of a folder as ComfyUI does; the names of their nodes."""
    import nodes
    from comfy_raylight.workers.wire.comfy_host import with_server

    with_server()
    core = set(registered())
    for pack in sorted(packs.resolve().iterdir()):
        asyncio.run(nodes.load_custom_node(str(pack), ignore=core))  # type: ignore[attr-defined]
    for name in set(registered()) - core:
        try:
            registered()[name].INPUT_TYPES()
        except Exception as error:  # a pack for another version of ComfyUI
            logging.getLogger("sweep").warning("%s is left out: %s: %s", name, type(error).__name__, error)
            del registered()[name]
    return frozenset(registered()) - core


def model_nodes(wanted: Collection[str]) -> Iterator[tuple[str, type]]:
    """Those that take a MODEL and return something of a wanted type."""
    for name, node in sorted(registered().items()):
        returned = list(getattr(node, "RETURN_TYPES", None) or ())
        inputs = node.INPUT_TYPES()
        taken = [spec[0] for part in ("required", "optional") for spec in inputs.get(part, {}).values()]
        if any(kind in returned for kind in wanted) and any(
            isinstance(kind, str) and kind == "MODEL" for kind in taken
        ):
            yield name, node


def difference(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, relative to the largest value; a value that is not a number only equals another."""
    import torch

    if picture.shape != reference.shape:
        return float("inf")
    if torch.equal(picture.isnan(), reference.isnan()):
        picture, reference = picture.nan_to_num(), reference.nan_to_num()
    return float((picture - reference).abs().max() / reference.abs().max().clamp_min(1e-12))


class Sweep:
    """Two models of one file, on the pool and plain, and what each node makes of them."""

    def __init__(self, family: str, files: tuple[Path, Path], workers: int, folder: Path) -> None:
        import comfy.sd
        from comfy_raylight.raylight.config import ModelSpec, ParallelConfig, PoolConfig
        from comfy_raylight.tests.host.checkpoints import lora
        from comfy_raylight.workers.driver import remote

        self._name = family
        self._family = FAMILIES[family]
        self._lora = lora(files[0], folder / "loras" / "small.safetensors")
        self.config = PoolConfig(parallel=ParallelConfig(world=workers, ulysses=workers, ring=1, cfg=1))
        self._plain: tuple[Any, ...] = tuple(comfy.sd.load_diffusion_model(str(file)) for file in files)
        self._remote: tuple[Any, ...] = tuple(remote.load_model(self.config, ModelSpec.of(file)) for file in files)
        self._bare: dict[Setting, torch.Tensor] = {}
        self._first = sample(self._remote[0], self._family, "")
        apart = difference(self._first, self._bare_plain(""))
        if apart > TOLERANCE:
            raise SystemExit(f"{family}: the model without nodes differs by {apart:.1e}")

    def run(self, name: str, node: type) -> Verdict:
        """Try one node, then see that it left nothing behind on the pool."""
        from comfy_raylight.workers.pool.pool import REGISTRY

        before = REGISTRY.get(self.config)
        verdict = self._judge(name, node)
        after = sample(self._remote[0], self._family, "")
        apart = difference(after, self._first)
        if REGISTRY.get(self.config) is not before:
            return Verdict(POOL_LOST, f"{verdict.verdict}: {verdict.reason}")
        if apart <= TOLERANCE:
            return verdict
        # a node that writes into the model itself does that to any
        self._first = after
        self._bare.clear()
        if difference(after, self._bare_plain("")) > TOLERANCE:
            return Verdict(LEAK, f"afterwards the bare model differs by {apart:.1e}; {verdict.verdict}")
        return Verdict(verdict.verdict, verdict.reason or "it changes the loaded model, as in plain ComfyUI")

    def _judge(self, name: str, node: type) -> Verdict:
        from comfy_raylight.raylight.errors import UnsupportedError

        try:
            ours = self._attempt(name, node, self._remote)
        except Missing as missing:
            return Verdict(NOT_TRIED, str(missing))
        if isinstance(ours, UnsupportedError):
            return Verdict(REFUSED, _line(f"{ours.what}: {ours.why}".replace(REFUSAL, "")))
        theirs = self._attempt(name, node, self._plain)
        if isinstance(ours, Exception) and isinstance(theirs, Exception):
            kinds = _kind(ours), _kind(theirs)
            same = kinds[0] == kinds[1]
            text = f"{kinds[1]}: {_line(theirs)}"
            return Verdict(SAME_ERROR, text) if same else Verdict(DIFFERENT, f"pool {_tell(ours)}, plain {text}")
        if isinstance(ours, Exception):
            return Verdict(ONE_SIDED, f"the pool: {_tell(ours)}")
        if isinstance(theirs, Exception):
            return Verdict(ONE_SIDED, f"plain ComfyUI: {_tell(theirs)}")
        apart = difference(ours, theirs)
        effect = difference(theirs, self._bare_plain(name))
        if apart > ROUNDING.get(name, TOLERANCE):
            nudged = self._attempt(name, node, self._plain, nudge=True)
            if not isinstance(nudged, Exception) and apart <= 2 * difference(nudged, theirs):
                return Verdict(UNSETTLED)
            return Verdict(DIFFERENT, f"by {apart:.1e}, the node's own effect is {effect:.1e}")
        return Verdict(EQUAL, "" if effect > TOLERANCE else "no effect on this family")

    def _attempt(
        self, name: str, node: type, models: tuple[Any, ...], *, nudge: bool = False
    ) -> torch.Tensor | Exception:
        import torch

        torch.manual_seed(0)
        random.seed(0)
        try:
            with torch.inference_mode():  # as the executor, for loaders too
                arguments = Inputs(self._name, models, self._lora).of(name, node)
            values = call_node(node, arguments)
            random.seed(0)
            found = dict(zip(node.RETURN_TYPES, values, strict=False))  # type: ignore[attr-defined]
            made = [sample(found["MODEL"], self._family, name, nudge=nudge)] if "MODEL" in found else []
            made += [found["LATENT"]["samples"]] if "LATENT" in found else []
            made += [found["IMAGE"]] if "IMAGE" in found else []
            return made[0] if len(made) == 1 else torch.cat([picture.flatten() for picture in made])
        except Missing:
            raise
        except Exception as error:
            logging.getLogger("sweep").debug("%s on %s", name, type(models[0]).__name__, exc_info=True)
            return error

    def _bare_plain(self, node: str) -> torch.Tensor:
        kind = Setting.of(node)
        if kind not in self._bare:
            self._bare[kind] = sample(self._plain[0], self._family, node)
        return self._bare[kind]


def _kind(error: Exception) -> str:
    return getattr(error, "cause_type", "") or type(error).__name__


def _line(error: object) -> str:
    """The first line of a message, without what differs from one machine to the next."""
    lines = str(error).strip().splitlines() or [""]
    return re.sub(r"\b0x[0-9a-f]{6,}|/\S+/", "...", lines[0])[:200].strip()


def _tell(error: Exception) -> str:
    return f"{type(error).__name__}: {_line(error)}"


def boot(root: Path, workers: int) -> None:
    """Make this process one that runs ComfyUI from `root`, with this pack importable, with a worker's threads."""
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[0] = str(root)  # in place of this folder
    sys.path.append(str(PACK / "workers" / "import_root"))
    os.chdir(root)
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    # sums depend on it in their last digit, which bfloat16 makes visible
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // workers))
    importlib.import_module("utils.extra_config")  # first, as in ComfyUI: its comfy/utils.py would take the name
    import nodes

    # mypy takes this for the benchmark of that name
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))  # type: ignore[attr-defined]


def _folders(folder: Path) -> None:
    """Only our own files can be chosen, whatever lies in this ComfyUI's folders."""
    import folder_paths

    for kind in ("loras", "hypernetworks", "model_patches"):
        (folder / kind).mkdir()
        folder_paths.folder_names_and_paths[kind] = ([str(folder / kind)], {".safetensors", ".pt"})


def _hypernetwork(path: Path) -> None:
    import torch

    def layer(dim: int, seed: int) -> dict[str, torch.Tensor]:
        return {"linear.weight": _noise(seed, dim, dim) * dim**-0.5, "linear.bias": _noise(seed, dim) * 0.1}

    torch.save({dim: [layer(dim, 1), layer(dim, 2)] for dim in (256, 320, 768)}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("comfy", type=Path, help="root of a ComfyUI")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--model", required=True, metavar="FAMILY=FILE:WORKERS", help=f"one of {', '.join(FAMILIES)}")
    parser.add_argument("--second", required=True, type=Path, metavar="FILE", help="another checkpoint of the family")
    parser.add_argument("--packs", type=Path, metavar="FOLDER", help="try the nodes of the packs in it, not ComfyUI's")
    parser.add_argument("--only", nargs="+", default=[], metavar="NODE", help="no others, and tell where errors arose")
    options = parser.parse_args()
    family, _, rest = options.model.partition("=")
    file, _, workers = rest.rpartition(":")
    out = options.out.resolve()
    files = Path(file).resolve(), options.second.resolve()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    if options.only:
        logging.getLogger("sweep").setLevel(logging.DEBUG)
    boot(options.comfy.resolve(), int(workers))
    packed = pack_nodes(options.packs) if options.packs else None

    import comfyui_version
    from comfy_raylight.workers.pool.pool import close_all

    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _folders(Path(folder))
        _hypernetwork(Path(folder) / "hypernetworks" / "small.pt")
        try:
            sweep = Sweep(family, files, int(workers), Path(folder))
            for name, node in model_nodes(["MODEL"] if packed is None else MADE):
                if (options.only and name not in options.only) or (packed is not None and name not in packed):
                    continue
                faulthandler.dump_traceback_later(NODE_LIMIT_S, exit=True)
                sys.stderr.write(f"{name} ... ")
                verdict = sweep.run(name, node)
                sys.stderr.write(f"{verdict.verdict} ({verdict.reason})\n")
                results[name] = asdict(verdict)
        finally:
            faulthandler.cancel_dump_traceback_later()
            close_all()
    report = {"comfy": comfyui_version.__version__, "family": family, "workers": int(workers), "nodes": results}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
