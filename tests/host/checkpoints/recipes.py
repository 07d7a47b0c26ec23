"""How to make a checkpoint of each family: what ComfyUI detects it by. ComfyUI's own class supplies the other keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import markers
from .markers import Keys, Sizes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a checkpoint of one family.

    Attributes:
        keys: what ComfyUI detects the family by, for given sizes.
        detected: the class of `comfy.supported_models` it must find.
        dtype: of the file, by default.
        size: the sizes and their defaults.
        config: overrides of the model's arguments in the file's metadata, as some families allow.
        spread: (pattern of keys, mean, standard deviation) of weights that the usual ones do not suit.
        device: where the model is built; "cpu" for a class that cannot be built on meta tensors.
    """

    keys: Callable[[Sizes], Keys]
    detected: str
    dtype: str = "float32"
    size: Sizes = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    spread: tuple[tuple[str, float, float], ...] = ()
    device: str = "meta"


WAN: Sizes = {"dim": 256, "ffn": 512, "layers": 2}
FLUX: Sizes = {"dim": 256, "double": 1, "single": 1, "context": 4096}
HUNYUAN: Sizes = {"dim": 256, "double": 1, "single": 1, "context": 64}
H3: Sizes = {"dim": 128, "heads": 5, "ffn": 128, "layers": 3, "context": 40, "frequencies": 32, "time": 32}
H3_SPREAD = (("rope.inv_freq", 0.3, 0.1),)
"""What the model divides positions by; a checkpoint brings it."""
BYT5 = {"byt5_in__fc1__weight": ()}
LTXAV_CONFIG = {
    "cross_attention_dim": 256,
    "audio_cross_attention_dim": 128,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 8,
    "caption_channels": 64,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 4,
    "connector_num_layers": 1,
    "rope_type": "split",
}
XL: Mapping[str, Any] = {
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
"""What SDXL's UNets have in common."""
FEW: Mapping[str, Any] = {
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 1),
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 4,
}
"""The blocks of a UNet as small as ComfyUI's detection allows."""
FOUR: Mapping[str, Any] = {"num_res_blocks": [2] * 4, "channel_mult": (1,) * 4}
"""Four levels, which SVD and SDXL's refiner are known by, of one width."""
FP8 = "float8_e4m3fn"
"""For widths that ComfyUI fixes, where even one layer has hundreds of millions of weights."""

RECIPES: Mapping[str, Recipe] = {
    "wan": Recipe(keys=markers.wan(), detected="WAN21_T2V", size={**WAN, "channels": 16}),
    "wan_i2v": Recipe(keys=markers.wan(channels=36, img_emb__proj__0__bias=()), detected="WAN21_I2V", size=WAN),
    "wan_ti2v": Recipe(keys=markers.wan(channels=48, out=48), detected="WAN22_T2V", size=WAN),
    "wan_causal": Recipe(keys=markers.wan(), detected="WAN21_CausalAR_T2V", size=WAN, config={"causal_ar": True}),
    "wan_vace": Recipe(
        keys=markers.wan(vace_patch_embedding__weight=(-1, 96, 1, 2, 2), vace_blocks__0__modulation=()),
        detected="WAN21_Vace",
        size=WAN,
    ),
    "wan_camera": Recipe(
        keys=markers.wan(channels=32, control_adapter__conv__weight=(), img_emb__proj__0__bias=()),
        detected="WAN21_Camera",
        size=WAN,
    ),
    "wan_s2v": Recipe(
        keys=markers.wan(casual_audio_encoder__encoder__final_linear__weight=()),
        detected="WAN22_S2V",
        size=WAN,
        spread=((r"^casual_audio_encoder\.weights$", 1.0, 0.1),),  # divided by their sum
    ),
    "wan_humo": Recipe(
        keys=markers.wan(audio_proj__audio_proj_glob_1__layer__bias=()),
        detected="WAN21_HuMo",
        size=WAN,
        dtype="bfloat16",
    ),
    "wan_animate": Recipe(
        keys=markers.wan(channels=36, face_adapter__fuser_blocks__0__k_norm__weight=()),
        detected="WAN22_Animate",
        size={**WAN, "layers": 5},
        dtype="bfloat16",
        spread=((r"^motion_encoder\.enc\..*weight$", 0.0, 1.0),),  # its layers scale weights themselves
    ),
    "wan_scail": Recipe(
        keys=markers.wan(channels=20, patch_embedding_pose__weight=()), detected="WAN21_SCAIL", size=WAN
    ),
    "wan_scail2": Recipe(
        keys=markers.wan(channels=20, patch_embedding_pose__weight=(), patch_embedding_mask__weight=()),
        detected="WAN21_SCAIL2",
        size=WAN,
    ),
    "wan_animate2": Recipe(
        keys=markers.wan(channels=36, img_emb__proj__0__bias=()),
        detected="WAN_Animate2",
        size=WAN,
        config={"model_type": "animate2"},
    ),
    "wan_dancer": Recipe(
        keys=markers.wan(channels=36, patch_embedding_global__weight=()), detected="WAN22_WanDancer", size=WAN
    ),
    "flux": Recipe(keys=markers.flux(), detected="Flux", dtype="bfloat16", size={**FLUX, "pooled": 768}),
    "longcat": Recipe(
        keys=markers.flux(guidance=False, pooled=False), detected="LongCatImage", size={**FLUX, "context": 3584}
    ),
    "flux2": Recipe(keys=markers.flux2, detected="Flux2", size={**FLUX, "context": 64}),
    "chroma": Recipe(keys=markers.chroma, detected="Chroma", dtype=FP8, size={"double": 1, "single": 1, "context": 64}),
    "radiance": Recipe(
        keys=markers.radiance, detected="ChromaRadiance", dtype=FP8, size={"double": 1, "single": 1, "context": 64}
    ),
    "qwen": Recipe(keys=markers.qwen, detected="QwenImage", dtype=FP8, size={"layers": 1}),
    "hunyuan": Recipe(
        keys=markers.hunyuan(
            channels=16,
            out=16,
            patch=(1, 2, 2),
            vector_in__in_layer__weight=(),
            guidance_in__in_layer__weight=(),
        ),
        detected="HunyuanVideo",
        size=HUNYUAN,
    ),
    "hunyuan15": Recipe(
        keys=markers.hunyuan(
            channels=65,
            out=32,
            patch=(1, 1, 1),
            cond_type_embedding__weight=(),
            vision_in__proj__0__weight=(1152,),
            **BYT5,
        ),
        detected="HunyuanVideo15",
        size=HUNYUAN,
    ),
    "hunyuan_image": Recipe(
        keys=markers.hunyuan(channels=64, out=64, patch=(1, 1), **BYT5), detected="HunyuanImage21", size=HUNYUAN
    ),
    "lumina2": Recipe(
        keys=markers.lumina(2304), detected="Lumina2", dtype="bfloat16", size={"layers": 1, "context": 64}
    ),
    "newbie": Recipe(
        keys=markers.lumina(2304, clip_text_pooled_proj__0__weight=(64,)),
        detected="Lumina2",
        dtype=FP8,
        size={"layers": 1, "context": 64},
    ),
    "zimage": Recipe(
        keys=markers.lumina(3840, cap_pad_token=()),
        detected="ZImage",
        dtype="bfloat16",
        size={"layers": 1, "context": 64},
    ),
    "zimage_pixel": Recipe(
        keys=markers.zimage_pixel, detected="ZImagePixelSpace", dtype=FP8, size={"layers": 1, "context": 64}
    ),
    "sd3": Recipe(keys=markers.sd3, detected="SD3", size={"layers": 4, "context": 64, "pooled": 32}),
    "auraflow": Recipe(keys=markers.auraflow, detected="AuraFlow", dtype=FP8, size={"single": 1}),
    "ltxv": Recipe(keys=markers.ltxv, detected="LTXV", size={"dim": 256, "layers": 2}),
    "ltxav": Recipe(keys=markers.ltxav, detected="LTXAV", size={"dim": 256, "layers": 2}, config=LTXAV_CONFIG),
    "ltx2": Recipe(
        keys=markers.ltxav,
        detected="LTXAV",
        dtype="bfloat16",
        size={"dim": 4096, "layers": 48},
        config={"rope_type": "split"},
    ),
    "h3": Recipe(keys=markers.minimax, detected="MiniMaxH3", size=H3, spread=H3_SPREAD),
    "h3_curves": Recipe(keys=markers.minimax, detected="MiniMaxH3", size={**H3, "curves": 9}, spread=H3_SPREAD),
    "krea2": Recipe(keys=markers.krea2, detected="Krea2", size={"heads": 5, "layers": 2, "context": 40}),
    "lens": Recipe(keys=markers.lens, detected="Lens", size={"heads": 5, "layers": 3, "context": 40}),
    "joyimage": Recipe(keys=markers.joyimage, detected="JoyImage", size={"heads": 3, "layers": 2}),
    "ideogram4": Recipe(keys=markers.ideogram4, detected="Ideogram4", dtype=FP8, size={"layers": 1}),
    "cosmos": Recipe(keys=markers.cosmos, detected="CosmosT2V", dtype=FP8, size={"dim": 480}),
    "cosmos2": Recipe(keys=markers.predict2, detected="CosmosT2IPredict2", dtype=FP8),
    "anima": Recipe(keys=markers.anima, detected="Anima", dtype=FP8),
    "kandinsky5": Recipe(keys=markers.kandinsky5, detected="Kandinsky5", size={"dim": 128, "layers": 2}),
    "hunyuan3d": Recipe(keys=markers.hunyuan3d, detected="Hunyuan3Dv2", size=HUNYUAN),
    "hunyuan3d_21": Recipe(
        keys=markers.hunyuan3d_21, detected="Hunyuan3Dv2_1", dtype="bfloat16", size={"dim": 256, "layers": 3}
    ),
    "hunyuan_dit": Recipe(keys=markers.hydit, detected="HunyuanDiT", dtype="bfloat16", size={"dim": 512, "layers": 4}),
    "pixart": Recipe(keys=markers.pixart, detected="PixArtSigma", dtype="bfloat16", size={"layers": 1, "tokens": 16}),
    "ace15": Recipe(keys=markers.ace15, detected="ACEStep15", dtype=FP8, size={"dim": 256, "layers": 2}, device="cpu"),
    "music3": Recipe(
        keys=markers.music3, detected="MiniMaxMusic3", dtype=FP8, spread=(("rotary_pos_emb.inv_freq", 0.3, 0.1),)
    ),
    "seedvr2": Recipe(keys=markers.seedvr2, detected="SeedVR2", dtype=FP8, spread=(("rope.*freqs", 0.3, 0.1),)),
    "cogvideox": Recipe(
        keys=markers.cogvideo,
        detected="CogVideoX_T2V",
        dtype="bfloat16",
        size={"dim": 128, "layers": 2, "context": 64},
    ),
    "unet": Recipe(keys=markers.unet(num_heads=8, **FEW), detected="SD15", size={"context": 768}),
    "sd15_inpaint": Recipe(
        keys=markers.unet(in_channels=9, num_heads=8, **FEW), detected="SD15", size={"context": 768}
    ),
    "sd2": Recipe(
        keys=markers.unet(num_head_channels=64, use_linear_in_transformer=True, **FEW),
        detected="SD20",
        size={"context": 1024},
    ),
    "svd": Recipe(
        keys=markers.unet(
            in_channels=8,
            transformer_depth=[1] * 6 + [0] * 2,
            transformer_depth_middle=1,
            transformer_depth_output=[1] * 9 + [0] * 3,
            use_temporal_attention=True,
            use_temporal_resblock=True,
            video_kernel_size=[3, 1, 1],
            extra_ff_mix_layer=True,
            use_spatial_context=True,
            merge_strategy="learned_with_images",
            **{**FOUR, **XL, "adm_in_channels": 768},
        ),
        detected="SVD_img2vid",
        dtype=FP8,
        size={"context": 1024},
    ),
    "sdxl_refiner": Recipe(
        keys=markers.unet(
            model_channels=384,
            transformer_depth=[0, 0, 4, 4, 4, 4, 0, 0],
            transformer_depth_middle=4,
            transformer_depth_output=[0] * 3 + [4] * 6 + [0] * 3,
            **{**FOUR, **XL, "adm_in_channels": 2560},
        ),
        detected="SDXLRefiner",
        dtype=FP8,
        size={"context": 1280},
    ),
    "sdxl": Recipe(
        keys=markers.unet(
            num_res_blocks=[1] * 3,
            channel_mult=(1, 1, 1),
            transformer_depth=[0, 2, 5],
            transformer_depth_middle=-1,
            transformer_depth_output=[0, 0, 1, 1, 1, 1],
            **XL,
        ),
        detected="KOALA_700M",
        dtype="bfloat16",
        size={"context": 2048},
    ),
    "sdxl_base": Recipe(
        keys=markers.unet(
            num_res_blocks=[2] * 3,
            channel_mult=(1, 2, 4),
            transformer_depth=[0, 0, 2, 2, 10, 10],
            transformer_depth_middle=10,
            transformer_depth_output=[0] * 3 + [2] * 3 + [10] * 3,
            **XL,
        ),
        detected="SDXL",
        dtype="bfloat16",
        size={"context": 2048},
    ),
}
"""Families by name. Widths that ComfyUI fixes (Z-Image, Lumina2, Qwen, older Flux) cannot be made smaller."""
