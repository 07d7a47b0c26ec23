"""The keys by which ComfyUI detects each family, with the shapes that it derives sizes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

Keys = dict[str, tuple[int, ...]]
"""Shapes of tensors by key; () where detection asks only whether the key is there."""
Sizes = Mapping[str, int]


def _layers(pattern: str, count: int) -> Keys:
    """A key of every block, by which ComfyUI counts them; `pattern` has the number as {}."""
    return {pattern.format(number): () for number in range(count)}


def wan(*, channels: int = 16, out: int = 16, **more: tuple[int, ...]) -> Callable[[Sizes], Keys]:
    """Wan; names in `more` have `__` for a dot, and a shape may have -1 for the width."""

    def keys(size: Sizes) -> Keys:
        dim = size["dim"]
        given, made = size.get("channels", channels), size.get("channels", out)
        markers = {key.replace("__", "."): tuple(dim if n == -1 else n for n in shape) for key, shape in more.items()}
        return {
            **_layers("blocks.{}.modulation", size["layers"]),
            "head.modulation": (1, 2, dim),
            "head.head.weight": (4 * made, dim),
            "patch_embedding.weight": (dim, given, 1, 2, 2),
            "blocks.0.ffn.0.weight": (size["ffn"], dim),
            **markers,
        }

    return keys


def flux(*, guidance: bool = True, pooled: bool = True) -> Callable[[Sizes], Keys]:
    def keys(size: Sizes) -> Keys:
        dim = size["dim"] if _counts_heads() else 3072
        markers: Keys = {"guidance_in.in_layer.weight": ()} if guidance else {}
        if pooled:
            markers["vector_in.in_layer.weight"] = (dim, size["pooled"])
        return {
            **_layers("double_blocks.{}.img_attn.proj.weight", size["double"]),
            **_layers("single_blocks.{}.linear1.weight", size["single"]),
            _flux_norm(): (),
            "img_in.weight": (dim, 64),
            "txt_in.weight": (dim, size["context"]),
            **markers,
        }

    return keys


def flux2(size: Sizes) -> Keys:
    dim = size["dim"] if _counts_heads() else 6144
    return {
        **_layers("double_blocks.{}.img_attn.proj.weight", size["double"]),
        **_layers("single_blocks.{}.linear1.weight", size["single"]),
        _flux_norm(): (),
        "double_stream_modulation_img.lin.weight": (),
        "img_in.weight": (dim, 128),
        "txt_in.weight": (dim, size["context"]),
    }


def _chroma_base(size: Sizes) -> Keys:
    return {
        **_layers("double_blocks.{}.img_attn.proj.weight", size["double"]),
        **_layers("single_blocks.{}.linear1.weight", size["single"]),
        _flux_norm(): (),
        f"distilled_guidance_layer.norms.0.{_norm_name()}": (),
        "txt_in.weight": (3072, size["context"]),
    }


def chroma(size: Sizes) -> Keys:
    return {**_chroma_base(size), "img_in.weight": (3072, 64)}


def radiance(size: Sizes) -> Keys:
    return {**_chroma_base(size), f"nerf_blocks.0.norm.{_norm_name()}": (), "img_in_patch.weight": (3072, 3, 16, 16)}


def _counts_heads() -> bool:
    """Whether ComfyUI derives Flux's heads from its width; before 0.4 it takes them to be 24, and Flux.2's 48."""
    from comfy.ldm.flux.model import FluxParams

    return "txt_ids_dims" in {field.name for field in fields(FluxParams)}


def _norm_name() -> str:
    """What Flux's norms call their weight, which changed between versions."""
    import comfy.ops
    from comfy.ldm.flux.layers import QKNorm

    state = QKNorm(8, dtype=None, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
    return next(iter(state)).rsplit(".", 1)[-1]


def _flux_norm() -> str:
    return f"double_blocks.0.img_attn.norm.key_norm.{_norm_name()}"


def lumina(dim: int, **more: tuple[int, ...]) -> Callable[[Sizes], Keys]:
    def keys(size: Sizes) -> Keys:
        return {
            **_layers("layers.{}.attention.qkv.weight", size["layers"]),
            "cap_embedder.1.weight": (dim, size["context"]),
            "noise_refiner.0.attention.k_norm.weight": (),
            **{key.replace("__", "."): shape for key, shape in more.items()},
        }

    return keys


def zimage_pixel(size: Sizes) -> Keys:
    patch, hidden = 3 * 16 * 16, 64
    return {
        **lumina(3840, cap_pad_token=())(size),
        "x_embedder.weight": (3840, patch),
        "dec_net.cond_embed.weight": (hidden, 3840),
        "dec_net.final_layer.linear.weight": (patch, hidden),
        "dec_net.input_embedder.embedder.0.weight": (hidden, patch + 64),
        **_layers("dec_net.res_blocks.{}.mlp.0.weight", 1),
    }


def unet(**config: Any) -> Callable[[Sizes], Keys]:
    """All keys of a UNet: ComfyUI counts its blocks to know what it is built like."""

    def keys(size: Sizes) -> Keys:
        import comfy.ops
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        common = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320}
        kind = {"use_spatial_transformer": True, "legacy": False, "context_dim": size["context"], "device": "meta"}
        model = UNetModel(**{**common, **kind, **config}, operations=comfy.ops.disable_weight_init)
        return {key: tuple(value.shape) for key, value in model.state_dict().items()}

    return keys


def hunyuan(*, channels: int, out: int, patch: tuple[int, ...], **more: tuple[int, ...]) -> Callable[[Sizes], Keys]:
    def keys(size: Sizes) -> Keys:
        dim = size["dim"]
        return {
            **_layers("double_blocks.{}.img_attn.proj.weight", size["double"]),
            **_layers("single_blocks.{}.linear1.weight", size["single"]),
            "txt_in.individual_token_refiner.blocks.0.norm1.weight": (),
            "txt_in.input_embedder.weight": (dim, size["context"]),
            "img_in.proj.weight": (dim, channels, *patch),
            "final_layer.linear.weight": (out * math.prod(patch), dim),
            **{key.replace("__", "."): shape for key, shape in more.items()},
        }

    return keys


def sd3(size: Sizes) -> Keys:
    dim = 64 * size["layers"]
    return {
        "joint_blocks.0.context_block.attn.qkv.weight": (),
        "joint_blocks.0.context_block.attn.ln_q.weight": (),
        "joint_blocks.0.x_block.attn2.qkv.weight": (),
        "x_embedder.proj.weight": (dim, 16, 2, 2),
        "final_layer.linear.weight": (64, dim),
        "y_embedder.mlp.0.weight": (dim, size["pooled"]),
        "context_embedder.weight": (dim, size["context"]),
        "pos_embed": (1, 32 * 32, dim),
    }


def ltxv(size: Sizes) -> Keys:
    return {
        **_layers("transformer_blocks.{}.attn1.to_q.weight", size["layers"]),
        "adaln_single.emb.timestep_embedder.linear_1.bias": (),
        "transformer_blocks.0.attn2.to_k.weight": (size["dim"], size["dim"]),
    }


def ltxav(size: Sizes) -> Keys:
    return {**ltxv(size), "audio_adaln_single.linear.weight": ()}


def minimax(size: Sizes) -> Keys:
    dim = size["dim"]
    time: Keys = {
        "time_embedder.proj_in.weight": (dim, size["frequencies"]),
        "time_embedder.proj_out.weight": (size["time"], dim),
    }
    if "curves" in size:
        time = {"adaln_t_table": (size["curves"], size["time"])}
    return {
        **_layers("blocks.{}.norm1.weight", size["layers"]),
        **_layers("token_refiner.blocks.{}.norm1.weight", 1),
        "video_patch_proj.weight": (dim, 24 * 4),
        "audio_patch_proj.weight": (dim, 32),
        "final_layer.video_out.weight": (24 * 4, dim),
        "final_layer.audio_out.weight": (32, dim),
        "blocks.0.attn.q_norm.weight": (128,),
        "blocks.0.attn.qkv_proj.weight": (3 * size["heads"] * 128, dim),
        "blocks.0.mlp.fc1.weight": (2 * size["ffn"], dim),
        "condition_proj.weight": (dim, size["context"]),
        "rope.inv_freq": (16,),
        **time,
    }


def music3(size: Sizes) -> Keys:
    layer = "diffusion_transformer.transformer.layers.{}.self_attn.to_qkv.weight"
    return {**_layers(layer, 36), "cond_layer_logits": (8,), "latent_conditioners.0.weight": (2048, 4096, 3)}


def seedvr2(size: Sizes) -> Keys:
    return {
        "blocks.31.mlp.all.proj_in_gate.weight": (),
        "positive_conditioning": (58, 5120),
        "negative_conditioning": (64, 5120),
    }


def krea2(size: Sizes) -> Keys:
    dim = size["heads"] * 128
    return {
        **_layers("blocks.{}.prenorm.scale", size["layers"]),
        "first.weight": (dim, 16 * 4),
        "blocks.0.attn.wq.weight": (dim, dim),
        "blocks.0.attn.wk.weight": (dim, dim),
        "txtfusion.projector.weight": (1, 2),
        "txtfusion.layerwise_blocks.0.prenorm.scale": (size["context"],),
    }


def lens(size: Sizes) -> Keys:
    dim = size["heads"] * 64
    return {
        **_layers("transformer_blocks.{}.attn.norm_added_q.weight", size["layers"]),
        "transformer_blocks.0.img_mlp.w1.weight": (),
        "img_in.weight": (dim, 128),
        "proj_out.weight": (128, dim),
        "txt_norm.weight": (size["context"],),
    }


def joyimage(size: Sizes) -> Keys:
    dim = size["heads"] * 128
    return {
        **_layers("double_blocks.{}.attn.img_attn_qkv.weight", size["layers"]),
        "double_blocks.0.attn.img_attn_q_norm.weight": (128,),
        "condition_embedder.time_embedder.linear_1.weight": (),
        "img_in.weight": (dim, 16, 1, 2, 2),
    }


def ideogram4(size: Sizes) -> Keys:
    return {
        **_layers("layers.{}.attention_norm1.weight", size["layers"]),
        "embed_image_indicator.weight": (),
        "input_proj.weight": (18 * 256, 128),
    }


def cosmos(size: Sizes) -> Keys:
    return {
        "blocks.block0.blocks.0.block.attn.to_q.0.weight": (size["dim"], size["dim"]),
        "x_embedder.proj.1.weight": (size["dim"], 4 * 17),
    }


def predict2(size: Sizes) -> Keys:
    return {"blocks.0.mlp.layer1.weight": (), "x_embedder.proj.1.weight": (2048, 4 * 17)}


def anima(size: Sizes) -> Keys:
    return {**predict2(size), "llm_adapter.blocks.0.cross_attn.q_proj.weight": ()}


def kandinsky5(size: Sizes) -> Keys:
    dim = size["dim"]
    return {
        **_layers("text_transformer_blocks.{}.self_attention.to_query.weight", 1),
        **_layers("visual_transformer_blocks.{}.self_attention.to_query.weight", size["layers"]),
        "visual_transformer_blocks.0.cross_attention.key_norm.weight": (),
        "visual_transformer_blocks.0.feed_forward.in_layer.weight": (2 * dim, dim),
        "visual_embeddings.in_layer.weight": (dim, 4 * 33),
        "visual_embeddings.in_layer.bias": (dim,),
        "time_embeddings.in_layer.bias": (64,),
    }


def hunyuan3d(size: Sizes) -> Keys:
    return {
        **_layers("double_blocks.{}.img_attn.proj.weight", size["double"]),
        **_layers("single_blocks.{}.linear1.weight", size["single"]),
        "latent_in.weight": (size["dim"], 64),
        "cond_in.weight": (size["dim"], size["context"]),
    }


def hunyuan3d_21(size: Sizes) -> Keys:
    return {
        **_layers("blocks.{}.attn1.to_q.weight", size["layers"]),
        "t_embedder.mlp.2.weight": (),
        "blocks.0.attn1.k_norm.weight": (),
        "x_embedder.weight": (size["dim"], 64),
    }


def ace15(size: Sizes) -> Keys:
    dim, heads = size["dim"], 8 * 128
    return {
        **_layers("decoder.layers.{}.self_attn_norm.weight", size["layers"]),
        "decoder.layers.0.self_attn_norm.weight": (dim,),
        "decoder.layers.0.mlp.gate_proj.weight": (dim, dim),
        "decoder.layers.0.self_attn.q_proj.weight": (heads, dim),
        "encoder.lyric_encoder.layers.0.input_layernorm.weight": (2048,),
        "encoder.lyric_encoder.layers.0.self_attn.q_proj.weight": (heads, 2048),
        "encoder.lyric_encoder.layers.0.mlp.gate_proj.weight": (64, 2048),
    }


def cogvideo(size: Sizes) -> Keys:
    dim = size["dim"]
    return {
        **_layers("blocks.{}.norm1.linear.weight", size["layers"]),
        "blocks.0.norm1.linear.weight": (6 * dim, 64),
        "patch_embed.proj.weight": (dim, 16, 2, 2),
        "patch_embed.text_proj.weight": (dim, size["context"]),
    }


def pixart(size: Sizes) -> Keys:
    return {
        **_layers("blocks.{}.scale_shift_table", size["layers"]),
        "t_block.1.weight": (),
        "y_embedder.y_embedding": (size["tokens"], 4096),
    }


def hydit(size: Sizes) -> Keys:
    return {
        **_layers("blocks.{}.attn1.Wqkv.weight", size["layers"]),
        "mlp_t5.0.weight": (),
        "x_embedder.proj.weight": (size["dim"], 4, 2, 2),
        "extra_embedder.0.weight": (4 * size["dim"], 1024),
    }


def auraflow(size: Sizes) -> Keys:
    return {
        **_layers("double_layers.{}.attn.w1q.weight", 1),
        **_layers("single_layers.{}.attn.w1q.weight", size["single"]),
        "positional_encoding": (1, 32 * 32, 3072),
        "cond_seq_linear.weight": (3072, 2048),
    }


def qwen(size: Sizes) -> Keys:
    return {
        **_layers("transformer_blocks.{}.attn.to_q.weight", size["layers"]),
        "txt_norm.weight": (),
        "img_in.weight": (3072, 64),
    }
