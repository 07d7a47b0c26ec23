"""Which plan belongs to which of ComfyUI's diffusion-model classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from torch import nn

from ..raylight.config import ParallelConfig
from ..raylight.errors import UnsupportedError
from ..raylight.plan import Plan, RowPlan
from .audio import ACE_STEP15, MUSIC3, STABLE_AUDIO
from .aura import AURAFLOW
from .chroma import chroma, radiance
from .cogvideo import COGVIDEOX
from .cosmos import PREDICT2, cosmos1
from .ernie import ERNIE
from .flux import FLUX
from .hidream import HIDREAM
from .hunyuan import HUNYUAN3D_21, HUNYUAN_DIT, hunyuan_video
from .ideogram import IDEOGRAM4
from .kandinsky import KANDINSKY5
from .krea import KREA2
from .ltx import LTXAV, LTXV
from .lumina import LUMINA, PIXEL_SPACE
from .minimax import MINIMAX
from .mochi import MOCHI
from .omnigen import OMNIGEN2
from .pixart import PIXART
from .qwen import QWEN
from .sd3 import SD3
from .unet import unet
from .wan import ANIMATE, DANCER, HUMO, S2V, VACE, WAN


@dataclass(frozen=True)
class Family:
    """One diffusion-model class.

    Attributes:
        models: what users know it by.
        plan: where its tokens or rows are, or a function of the model that says it, where versions differ.
        limit: what the workers do not share, "" for nothing.
        divided: what of it is, where it is not the sequence of its tokens.
    """

    models: str
    plan: Plan | Callable[[nn.Module], Plan | RowPlan]
    limit: str = ""
    divided: str = ""


ATTENTION_IS_NOT = "every worker computes all of self-attention, which these classes call out of reach"


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "WanModel": Family("Wan 2.1 / 2.2: t2v, i2v, flf2v, ti2v 5B, Fun-Control, reference", WAN),
        "VaceWanModel": Family("Wan VACE", VACE),
        "CameraWanModel": Family("Wan Fun-Camera", WAN),
        "HumoWanModel": Family("Wan HuMo", HUMO),
        "WanModel_S2V": Family("Wan 2.2 S2V", S2V),
        "AnimateWanModel": Family("Wan 2.2 Animate", ANIMATE),
        "SCAILWanModel": Family("Wan SCAIL", WAN),
        "SCAIL2WanModel": Family("Wan SCAIL-2", WAN),
        "WanDancerModel": Family("WanDancer", DANCER),
        "Flux": Family("Flux.1 dev, schnell, Fill, Kontext; Flux.2; LongCat-Image; Ovis-Image", FLUX),
        "Chroma": Family("Chroma", chroma),
        "ChromaRadiance": Family("Chroma Radiance, Radiance x0", radiance),
        "HunyuanVideo": Family("HunyuanVideo, HunyuanVideo 1.5, HunyuanImage 2.1 and its refiner", hunyuan_video),
        "Hunyuan3Dv2": Family("Hunyuan3D 2", FLUX),
        "HunYuanDiTPlain": Family("Hunyuan3D 2.1", HUNYUAN3D_21, ATTENTION_IS_NOT),
        "HunYuanDiT": Family("HunyuanDiT", HUNYUAN_DIT, ATTENTION_IS_NOT),
        "QwenImageTransformer2DModel": Family("Qwen-Image, Qwen-Image-Edit, Qwen-Image-Layered", QWEN),
        "NextDiT": Family("Lumina Image 2, NewBie, Z-Image, Z-Image omni", LUMINA),
        "NextDiTPixelSpace": Family("Z-Image pixel space", PIXEL_SPACE),
        "MiniMaxH3Model": Family("MiniMax-H3: video with sound, references, keyframes", MINIMAX),
        "SingleStreamDiT": Family("Krea 2", KREA2),
        "Ideogram4Transformer2DModel": Family("Ideogram 4", IDEOGRAM4),
        "LTXVModel": Family("LTX-Video: keyframes, guides", LTXV),
        "LTXAVModel": Family("LTX-2, LTX-2.3: video with sound", LTXAV),
        "OpenAISignatureMMDITWrapper": Family("Stable Diffusion 3, 3.5 medium and large", SD3),
        "MMDiT": Family("AuraFlow", AURAFLOW),
        "MiniTrainDIT": Family("Cosmos Predict2", PREDICT2),
        "Anima": Family("Anima", PREDICT2),
        "GeneralDIT": Family("Cosmos 1", cosmos1),
        "Kandinsky5": Family("Kandinsky 5", KANDINSKY5),
        "HiDreamImageTransformer2DModel": Family("HiDream I1, E1", HIDREAM),
        "OmniGen2Transformer2DModel": Family("OmniGen2", OMNIGEN2),
        "AsymmDiTJoint": Family("Mochi", MOCHI),
        "CogVideoXTransformer3DModel": Family("CogVideoX", COGVIDEOX),
        "AudioDiffusionTransformer": Family("Stable Audio", STABLE_AUDIO),
        "AceStepConditionGenerationModel": Family("ACE-Step 1.5", ACE_STEP15, ATTENTION_IS_NOT),
        "MiniMaxMusic3DiT": Family("MiniMax Music 3", MUSIC3, ATTENTION_IS_NOT),
        "ErnieImageModel": Family("ERNIE-Image", ERNIE, ATTENTION_IS_NOT),
        "PixArtMS": Family("PixArt Alpha, Sigma", PIXART, ATTENTION_IS_NOT),
        "UNetModel": Family("Stable Diffusion 1.5, 2, XL, XL refiner, inpaint models; SVD", unet, divided="rows"),
    }
)
"""Families by exact class name. A subclass has a forward of its own, so it has an entry of its own or none."""

UNSPLIT: Mapping[str, str] = MappingProxyType(
    {
        "StageB": "Stable Cascade's blocks normalise over all rows of the picture, and resize inside",
        "StageC": "Stable Cascade's blocks normalise over all rows of the picture",
        "ACEStepTransformer2DModel": "ACE-Step 1's blocks have linear attention and convolutions over all tokens",
        "CausalWanModel": "causal Wan generates frame after frame from key and value caches of its own",
        "WanAnimate2Model": "each frame of Wan Animate 2 attends to its own frame of the pose, in calls that are not a "
        "block's own, so that nothing can cut what they get",
        "NaDiT": "SeedVR2 attends in windows that lie across each other, out of reach of what could share them",
        "HiDreamO1Transformer": "HiDream O1 attends in two passes of its own, and keeps keys and values of the prompt "
        "from step to step",
        "Trellis2": "the tokens of Trellis 2 are voxels in objects of its own, which no cut knows",
    }
)
"""Why some classes cannot share a sequence."""

ASKING: Mapping[str, str] = MappingProxyType(
    {
        "HiDreamImageTransformer2DModel": "which tokens an expert gets",
        "HunYuanDiTPlain": "the same",
        "AceStepConditionGenerationModel": "the lengths of reference sounds",
        "WanDancerModel": "frames per second that come as a tensor",
        "MiniMaxH3Model": "the timestep, and where its grids of positions begin and end",
        "Ideogram4Transformer2DModel": "which tokens of the text are padding",
        "HunyuanVideo": "where in the schedule HunyuanImage is, which distilled models have a second timestep from",
        "LTXVModel": "which tokens keyframes and guides keep",
        "LTXAVModel": "the same, and whether a mask differs within a frame",
        "MiniTrainDIT": "whether all videos of a batch have one number of frames per second",
        "GeneralDIT": "the same",
    }
)
"""Classes whose own code asks a device for values, for some inputs or for all, and for what: what asks cannot be
recorded. docs/scaling.md names them."""


def has_plan(model: nn.Module) -> bool:
    """Whether a plan is written for a diffusion model."""
    return type(model).__name__ in FAMILIES


def check(model: nn.Module, parallel: ParallelConfig) -> None:
    """Refuse a model that the ranks of a sequence cannot share, as far as that is known before it runs.

    Raises:
        UnsupportedError: its class has no plan, and none can be looked for.
    """
    name = type(model).__name__
    if name in FAMILIES or name in UNSPLIT:
        plan_for(model)
    elif parallel.sequence == 1 or parallel.attention != "TORCH":
        refuse(name, "it has no plan of its own, and one is only looked for with XFuser_attention TORCH")
    elif parallel.residency != "resident":
        refuse(name, "it has no plan of its own, and one is only looked for without FSDP and FSDP_CPU_OFFLOAD")


def refuse(name: str, why: str) -> NoReturn:
    """Raises UnsupportedError."""
    raise UnsupportedError(
        f"Raylight cannot split the model family {name} over several workers",
        why,
        "Set ulysses_degree and ring_degree to 1: cfg_degree and data parallel work with every model",
    )


def plan_for(model: nn.Module) -> Plan | RowPlan:
    """The plan of a diffusion model.

    Raises:
        UnsupportedError: there is none; the message names the class, the reason and what does work.
    """
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None:
        refuse(name, UNSPLIT.get(name, "it has no plan for it"))
    return family.plan if isinstance(family.plan, Plan) else family.plan(model)
