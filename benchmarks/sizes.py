"""Models and inputs for the benchmarks: the classes of the parity tests, wide enough to be worth sharing.

Widths and tokens are such that one thread of a CPU takes about a second for a forward, nearly all of it inside
the blocks. Text has the 7 tokens of the tests where it stands beside the sequence, since it costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from comfy_raylight.patches.registry import FAMILIES
from comfy_raylight.tests.engine.case import Case, Inputs, build, random
from comfy_raylight.tests.engine.families import (
    chroma,
    cosmos,
    flux,
    hunyuan,
    images,
    ltx,
    lumina,
    mmdit,
    qwen,
    sounds,
    unet,
    videos,
    wan,
    wan_variants,
)
from comfy_raylight.tests.engine.families import even as dividing

Named = dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], Inputs]]]
"""What builds a model and what makes its inputs, by a short name of the model."""

AXES = (32, 48, 48)
"""Of rotary positions, 128 channels in a head."""
WIDE = dict(dim=768, ffn_dim=3072, num_heads=6)
"""Of Wan's variants."""
JOINT = dict(hidden_size=768, num_heads=6, mlp_ratio=4.0)
"""Of models built from Flux's blocks."""


def wide(only: str) -> Named:
    """Every class in FAMILIES that this ComfyUI has.

    Args:
        only: names separated by commas; "" is all.

    Raises:
        SystemExit: there is no such name.
    """
    missing = FAMILIES.keys() - {case.family for case in CASES}
    assert not missing, f"no size to measure {missing} at"
    return _chosen(CASES, only)


def even(only: str) -> Named:
    """A few tiny models whose 8 heads and whose tokens divide evenly over up to 8 ranks; `only` as in `wide`."""
    return _chosen(EVEN, only)


def wan_like() -> tuple[torch.nn.Module, Callable[[int], Inputs]]:
    """A Wan model of width 768, and its inputs for a number of tokens divisible by 32."""

    def make(tokens: int) -> Inputs:
        assert tokens % 32 == 0, tokens
        return wan.video(frames=4, height=16, width=tokens // 16)

    return wan.wan(**WIDE, num_layers=4), make


def ltx_like(*, blocks: int, heads: int, channels: int = 128) -> torch.nn.Module:
    """An LTX-Video model with so many channels in each head."""
    wanted = dict(attention_head_dim=channels, num_attention_heads=heads, cross_attention_dim=heads * channels)
    return build("comfy.ldm.lightricks.model.LTXVModel", **{**ltx.SIZES, **wanted}, num_layers=blocks)


def _chosen(cases: Sequence[Case], only: str) -> Named:
    known = {case.name: (case.build, case.inputs) for case in cases if case.available()}
    names = [name.strip() for name in only.split(",")] if only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"This ComfyUI has no {', '.join(unknown)}. Choose from: {', '.join(known)}")
    return {name: known[name] for name in names}


def _resized(make: Callable[[], Inputs], *shape: int) -> Inputs:
    """Inputs of the tests with latents of another shape."""
    (_, *rest), more = make()
    return (random(*shape), *rest), more


def _hunyuan_video(*, text: int, shape: tuple[int, int, int]) -> Inputs:
    (_, t, _, pooled), more = hunyuan.video(mask=False)
    return (random(1, 4, *shape), t, random(1, text, 16), pooled), more


def _sd3(*, heads: int, blocks: int, side: int) -> torch.nn.Module:
    text = {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64 * heads}}
    sizes: dict[str, Any] = dict(
        input_size=None, depth=heads, num_blocks=blocks, adm_in_channels=8, context_embedder_config=text
    )
    path = "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper"
    model: Any = build(path, **sizes, num_patches=side * side, pos_embed_max_size=side, qk_norm="rms")
    model.pos_embed.copy_(random(1, side * side, 64 * heads))
    return model


def _humo() -> torch.nn.Module:
    model = wan_variants.variant(".HumoWanModel", **WIDE, num_layers=3)
    model.audio_proj = wan_variants.Audio()
    return model


def _animate() -> torch.nn.Module:
    model = wan_variants.variant("_animate.AnimateWanModel", **WIDE, num_layers=5)
    model.motion_encoder = wan_variants.Motion()
    return model


def _cosmos(model: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    sizes = dict(model_channels=768, num_heads=6, mlp_ratio=4.0, adaln_lora_dim=64, crossattn_emb_channels=16)
    return partial(model, **sizes, max_img_h=64, max_img_w=64)


def _wan_video(beside: Callable[[], dict[str, Any]] = dict) -> Inputs:
    """1536 tokens, and what a variant wants beside them."""
    return wan.video(frames=4, height=32, width=48, clip_fea=random(1, 257, 1280), **beside())


_chroma: dict[str, Any] = dict(**JOINT, axes_dim=AXES, out_dim=768, hidden_dim=256, depth=2, depth_single_blocks=4)
_next = dict(dim=768, n_heads=6, n_kv_heads=6, axes_dims=AXES, multiple_of=256, pad_tokens_multiple=32)
_sheet = partial(_resized, lumina.sheet, 1, 4, 64, 64)

CASES = (
    Case(
        name="wan",
        family="WanModel",
        model=partial(wan.wan, **WIDE, num_layers=3),
        make=_wan_video,
    ),
    Case(
        name="vace",
        family="VaceWanModel",
        model=partial(wan_variants.vace, **WIDE, num_layers=2, vace_layers=1),
        make=partial(_wan_video, lambda: {"vace_context": random(1, 1, 6, 4, 32, 48), "vace_strength": [0.7]}),
    ),
    Case(
        name="camera",
        family="CameraWanModel",
        model=partial(wan_variants.camera, **WIDE, num_layers=3),
        make=partial(_wan_video, lambda: {"camera_conditions": random(1, 24, 4, 256, 384) * 0.001}),
    ),
    Case(
        name="humo",
        family="HumoWanModel",
        model=_humo,
        make=partial(wan_variants.spoken, height=32, width=48),
    ),
    Case(
        name="s2v",
        family="WanModel_S2V",
        model=partial(wan_variants.s2v, **WIDE, num_layers=3, audio_inject_layers=[0, 2]),
        make=partial(wan_variants.sung, height=32, width=64),
    ),
    Case(
        name="animate",
        family="AnimateWanModel",
        model=_animate,
        make=partial(wan_variants.posed, height=32, width=48),
    ),
    Case(
        name="scail",
        family="SCAILWanModel",
        model=partial(wan_variants.scail, **WIDE, num_layers=3),
        make=partial(_wan_video, lambda: {"pose_latents": random(1, 4, 4, 16, 24)}),
        needs=wan_variants.SCAIL,
    ),
    Case(
        name="wandancer",
        family="WanDancerModel",
        model=partial(wan_variants.dancer, **WIDE, num_layers=3, audio_inject_layers=[0, 2]),
        make=partial(wan_variants.danced, frames=4, width=192),
        needs=wan_variants.DANCER,
    ),
    Case(
        name="flux",
        family="Flux",
        model=partial(flux.flux, **JOINT, axes_dim=AXES, depth=2, depth_single_blocks=4),
        make=partial(flux.image, text=64, size=(64, 64)),
    ),
    Case(
        name="chroma",
        family="Chroma",
        model=partial(chroma.chroma, **_chroma),
        make=partial(chroma.image, size=(64, 64)),
    ),
    Case(
        name="radiance",
        family="ChromaRadiance",
        model=partial(chroma.radiance, **_chroma),
        make=partial(chroma.pixels, size=(64, 64)),
    ),
    Case(
        name="hunyuan",
        family="HunyuanVideo",
        model=partial(hunyuan.hunyuan, **JOINT, axes_dim=AXES, depth=2, depth_single_blocks=4),
        make=partial(_hunyuan_video, text=64, shape=(4, 32, 32)),
    ),
    Case(
        name="hunyuan3d",
        family="Hunyuan3Dv2",
        model=partial(hunyuan.shape3d, **JOINT, depth=2, depth_single_blocks=4),
        make=partial(_resized, hunyuan.latents, 1, 8, 1024),
    ),
    Case(
        name="hunyuan3d_21",
        family="HunYuanDiTPlain",
        model=partial(hunyuan.shape3d_21, hidden_size=768, num_heads=6, depth=3, num_moe_layers=1),
        make=partial(_resized, partial(hunyuan.latents, 2), 2, 8, 1024),
    ),
    Case(
        name="qwen",
        family="QwenImageTransformer2DModel",
        model=partial(qwen.qwen, attention_head_dim=128, num_attention_heads=6, axes_dims_rope=AXES),
        make=partial(_resized, partial(qwen.image, text=64), 1, 4, 1, 64, 96),
    ),
    Case(
        name="zimage",
        family="NextDiT",
        model=partial(lumina.zimage, **_next),
        make=_sheet,
    ),
    Case(
        name="zimage_pixel",
        family="NextDiTPixelSpace",
        model=partial(lumina.pixel_space, **_next),
        make=_sheet,
        needs=lumina.PIXEL_SPACE,
    ),
    Case(
        name="ltxv",
        family="LTXVModel",
        model=partial(ltx_like, blocks=4, heads=6),
        make=partial(ltx.video, shape=(4, 16, 24), timed=True),
    ),
    Case(
        name="ltx2",
        family="LTXAVModel",
        model=partial(ltx.ltxav, attention_head_dim=128, num_attention_heads=6, cross_attention_dim=768, num_layers=4),
        make=partial(ltx.sound_and_video, shape=(4, 16, 24), timed=True, sound=32),
        needs=ltx.LTX2,
    ),
    Case(
        name="sd3",
        family="OpenAISignatureMMDITWrapper",
        model=partial(_sd3, heads=12, blocks=4, side=32),
        make=partial(_resized, mmdit.picture, 1, 4, 64, 64),
    ),
    Case(
        name="auraflow",
        family="MMDiT",
        model=partial(mmdit.aura, dim=768, n_heads=6, global_conddim=768, max_seq=1024),
        make=partial(_resized, mmdit.plain_picture, 1, 4, 64, 64),
    ),
    Case(
        name="cosmos2",
        family="MiniTrainDIT",
        model=_cosmos(cosmos.predict2),
        make=partial(_resized, cosmos.video, 1, 4, 4, 32, 48),
    ),
    Case(
        name="anima",
        family="Anima",
        model=_cosmos(cosmos.anima),
        make=partial(_resized, cosmos.video, 1, 4, 1, 64, 64),
        needs=cosmos.anima_needs,
    ),
    Case(
        name="cosmos1",
        family="GeneralDIT",
        model=_cosmos(cosmos.cosmos1),
        make=partial(_resized, cosmos.video, 1, 4, 4, 32, 48),
    ),
    Case(
        name="kandinsky5",
        family="Kandinsky5",
        model=partial(videos.kandinsky5, model_dim=768, ff_dim=3072, axes_dims=AXES),
        make=partial(_resized, videos.kandinsky5_video, 1, 4, 4, 32, 48),
        needs=videos.KANDINSKY5,
    ),
    Case(
        name="hidream",
        family="HiDreamImageTransformer2DModel",
        model=partial(
            images.hidream,
            attention_head_dim=128,
            num_attention_heads=6,
            axes_dims_rope=AXES,
            max_resolution=(64, 64),
        ),
        make=partial(_resized, images.hidream_picture, 1, 4, 64, 64),
    ),
    Case(
        name="omnigen2",
        family="OmniGen2Transformer2DModel",
        model=partial(
            images.omnigen2, hidden_size=768, num_attention_heads=6, num_kv_heads=2, multiple_of=256, axes_dim_rope=AXES
        ),
        make=partial(_resized, images.omnigen2_picture, 1, 4, 64, 64),
    ),
    Case(
        name="mochi",
        family="AsymmDiTJoint",
        # its feed-forward has 8192 channels whatever the width
        model=partial(videos.mochi, hidden_size_x=768, hidden_size_y=384, num_heads=6, depth=2, mlp_ratio_x=16.0),
        make=partial(_resized, videos.mochi_video, 1, 4, 4, 32, 32),
    ),
    Case(
        name="cogvideox",
        family="CogVideoXTransformer3DModel",
        model=partial(
            videos.cogvideox, num_attention_heads=12, attention_head_dim=64, sample_width=48, sample_height=32
        ),
        make=partial(_resized, videos.cogvideox_video, 1, 4, 4, 32, 48),
        needs=videos.COGVIDEOX,
    ),
    Case(
        name="stable_audio",
        family="AudioDiffusionTransformer",
        model=partial(sounds.stable_audio, embed_dim=768, num_heads=12, cond_token_dim=64, depth=4),
        make=partial(sounds.sound, length=1536, cross_attn_cond=random(1, 7, 64)),
    ),
    Case(
        name="ace_step",
        family="AceStepConditionGenerationModel",
        model=partial(
            sounds.ace,
            hidden_size=768,
            num_heads=6,
            num_kv_heads=2,
            head_dim=128,
            intermediate_size=3072,
            sliding_window=128,
        ),
        make=partial(sounds.song, length=2048),
        needs=sounds.ACE,
    ),
    Case(
        name="ernie",
        family="ErnieImageModel",
        model=partial(images.ernie, hidden_size=768, num_attention_heads=6, ffn_hidden_size=3072, rope_axes_dim=AXES),
        make=partial(_resized, images.ernie_picture, 1, 4, 32, 48),
        needs=images.ERNIE,
    ),
    Case(
        name="pixart",
        family="PixArtMS",
        model=partial(images.pixart, hidden_size=768, num_heads=6, depth=4, mlp_ratio=4.0),
        make=partial(_resized, images.pixart_picture, 1, 4, 64, 64),
    ),
    Case(
        name="sd15",
        family="UNetModel",
        model=partial(unet.unet, unet.SD15, width=128, num_heads=8),
        make=partial(unet.picture, 64, 64, batch=1),
    ),
    Case(
        name="sdxl",
        family="UNetModel",
        model=partial(unet.unet, unet.SDXL, width=128, num_head_channels=64),
        make=partial(unet.picture, 64, 64, batch=1, label=20),
    ),
)

_eight: dict[str, Any] = dict(attention_head_dim=12, num_attention_heads=8)

EVEN = (
    Case(name="wan", family="WanModel", model=dividing.eight_heads, make=dividing.wide),
    Case(name="flux", family="Flux", model=dividing.eight_flux_heads, make=dividing.even_image),
    Case(
        name="qwen",
        family="QwenImageTransformer2DModel",
        model=partial(qwen.qwen, **_eight),
        make=partial(_resized, partial(qwen.image, text=8), 1, 4, 1, 8, 16),
    ),
    Case(
        name="ltxv",
        family="LTXVModel",
        model=partial(ltx_like, blocks=3, heads=8, channels=12),
        make=partial(ltx.video, shape=(2, 4, 8)),
    ),
    Case(
        name="hunyuan",
        family="HunyuanVideo",
        model=partial(hunyuan.hunyuan, hidden_size=96, num_heads=8),
        make=partial(_hunyuan_video, text=8, shape=(2, 8, 16)),
    ),
    Case(
        name="zimage",
        family="NextDiT",
        model=partial(lumina.zimage, dim=416, n_heads=8, n_kv_heads=8),
        make=partial(_resized, partial(lumina.sheet, text=8), 1, 4, 8, 16),
    ),
)
"""For `even`."""
