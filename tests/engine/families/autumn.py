"""Models of ComfyUI 0.26 to 0.33: MiniMax-H3, Krea 2, Ideogram 4, SCAIL-2."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy_raylight.patches.minimax import segment
from comfy_raylight.raylight.layout import Layout
from comfy_raylight.raylight.plan import Plan, Region

from ..case import (
    CHOOSES_BLOCK,
    EVERY,
    TRUNK,
    Case,
    Inputs,
    backend,
    build,
    override,
    patched,
    random,
    run_original,
    skip,
)
from . import wan_variants
from .changes import as_first_rank, sharpened, with_shared, with_sites

MINIMAX = ("comfy.ldm.minimax.model", "class MiniMaxH3Model")
KREA = ("comfy.ldm.krea2.model", "class SingleStreamDiT")
IDEOGRAM = ("comfy.ldm.ideogram4.model", "class Ideogram4Transformer2DModel")
SCAIL2 = ("comfy.ldm.wan.model", "class SCAIL2WanModel")


def minimax(**more: Any) -> torch.nn.Module:
    sizes = dict(hidden_size=96, num_layers=3, token_refiner_num_layers=1, num_attention_heads=5, ffn_hidden_size=96)
    rest = dict(text_dim=40, timestep_input_dim=32, time_embed_hidden_size=32, time_embed_dim=32)
    model = build(
        "comfy.ldm.minimax.model.MiniMaxH3Model", **{**sizes, "attention_head_dim": 128, **rest, **more}
    ).requires_grad_(False)
    # buffers that a checkpoint brings
    for name, buffer in model.named_buffers():
        steps = torch.arange(buffer.shape[0]) / buffer.shape[0]
        buffer.copy_(10000**-steps if name == "rope.inv_freq" else random(*buffer.shape))
    return model


def sharp() -> torch.nn.Module:
    return sharpened(minimax(), "q_norm.weight", "k_norm.weight")


def handed(*blocks: int) -> torch.nn.Module:
    """With blocks of a form that ComfyUI has after 0.33, some of which are given an attention of a node's.

    It projects q, k and v of all tokens itself, a few at a time, and looks at all of them.
    """
    from comfy.ldm.minimax.model import DiTBlock
    from comfy.ldm.modules.attention import optimized_attention

    def attend(attn: Any, x: torch.Tensor, rope_freqs: Any = None, transformer_options: Any = None) -> torch.Tensor:
        chunks = torch.cat([attn.qkv_proj(part) for part in x.split(7)])
        q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in chunks.chunk(3, -1))
        turned = rope_freqs.flatten(3).mean(-1)[0]
        q, k = (each.transpose(0, 1)[None] for each in (attn.q_norm(q) + turned[..., None], attn.k_norm(k)))
        out = optimized_attention(q, k, v.transpose(0, 1)[None], attn.heads, skip_reshape=True)
        return attn.out_proj(out[0]) * x.mean(0)

    class Block(DiTBlock):  # type: ignore[misc,valid-type]
        def forward(  # noqa: PLR0917, the names and order are the model's
            self,
            x: torch.Tensor,
            t_emb: Any,
            mod_segments: Any,
            rope_freqs: Any,
            transformer_options: Any = None,
            attention: Any = None,
        ) -> torch.Tensor:
            own = self._modules["attn"]
            self._modules["attn"] = own if attention is None else Node(attention)
            try:
                out: torch.Tensor = super().forward(x, t_emb, mod_segments, rope_freqs, transformer_options or {})
                return out
            finally:
                self._modules["attn"] = own

    class Node(torch.nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.forward = function

    model = sharp()
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        block.__class__ = Block
        if index in blocks:

            def give(module: Any, args: Any, kwargs: Any) -> Any:
                return args, {**kwargs, "attention": partial(attend, module.attn)}

            block.register_forward_pre_hook(give, with_kwargs=True)
    return model


def alone() -> dict[str, Any]:
    """A node that computes blocks itself: what it does is to all tokens, and calls nothing of the block's own."""

    def computed(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        h = args["img"]
        scores = torch.softmax(h[:, :8] @ h[:, 8:16].T, -1)
        return extra["original_block"]({**args, "img": h + scores @ h})

    return {"patches_replace": {"dit": {("double_block", 1): computed}}}


def uncalled(plan: Plan) -> Plan:
    """A node's attention gets what a rank has."""
    (region,) = plan.regions
    return Plan(Region(*(replace(blocks, called={}) for blocks in region.blocks), exit=region.exit))


def sounding(text: int = 9, width: int = 10, **more: Any) -> Inputs:
    """Video [1, 24, T, H, W] and sound [1, 32, 2, t], of 45 and 14 tokens."""
    latents = [random(1, 24, 3, 6, width), random(1, 32, 2, 7)]
    return (latents, torch.tensor([700.0]), random(1, text, 40)), more


def payload(**entries: Any) -> dict[str, Any]:
    """Conditioning that becomes tokens between the text and the target."""
    return {"minimax_payload": entries}


def video_mask() -> torch.Tensor:
    """One frame kept, half of another at half strength: a row of the modulation table for each token."""
    mask = torch.ones(1, 1, 3, 6, 10)
    mask[:, :, 0], mask[:, :, 1, :, :5] = 0, 0.5
    return mask


def sound_mask() -> torch.Tensor:
    mask = torch.ones(1, 1, 2, 7)
    mask[..., :3] = 0
    return mask


def references() -> dict[str, Any]:
    """A picture, a sound, and a video with its sound."""
    image, video, sound = random(1, 24, 1, 4, 6), random(1, 24, 2, 4, 4), random(1, 32, 2, 5)
    refs = [
        {"kind": "image", "latent_h": 4, "latent_w": 6},
        {"kind": "audio", "ref_audio_t": 5},
        {"kind": "video_audio", "latent_t": 2, "latent_h": 4, "latent_w": 4, "ref_audio_t": 5},
    ]
    return payload(refs=refs, cond_video_latents=[image, video], cond_audio_latents=[sound, sound * 0.5])


def keyframes() -> dict[str, Any]:
    """The first frame with its sound, and the last."""
    first, last, sound = random(1, 24, 1, 6, 10), random(1, 24, 1, 6, 10, seed=2), random(1, 32, 2, 2)
    frames = [
        {"resolved_frame_index": 0, "latent": first, "audio_latent": sound},
        {"resolved_frame_index": 8, "latent": last},
    ]
    return payload(keyframes=frames, cond_video_latents=[first, last], cond_audio_latents=[sound])


def tagged() -> dict[str, Any]:
    """Text whose tokens are of several modalities."""
    return payload(text_token_tags=torch.tensor([1, 1, 0, 0, 0, 1, 2, 1, 1]))


def as_of_all(plan: Plan) -> Plan:
    """Rows of the modulation table for each token are not cut: every rank takes the first ones."""

    def entry(value: list[Any], layout: Layout) -> list[Any]:
        cut = [segment(each, layout) for each in value]
        return [
            (a, b, row[: b - a] if isinstance(row, torch.Tensor) else row)
            for (a, b, _), (_, _, row) in zip(cut, value, strict=True)
        ]

    return with_shared(plan, "mod_segments", entry)


def krea(**more: Any) -> torch.nn.Module:
    sizes: dict[str, Any] = dict(features=640, txtdim=40, heads=5, kvheads=5, layers=3, txtlayers=2)
    rest: dict[str, Any] = dict(default_ref_method="index_timestep_zero")
    return build("comfy.ldm.krea2.model.SingleStreamDiT", **{**sizes, **rest, **more})


def krea_picture(batch: int = 1, refs: bool = False, size: tuple[int, int] = (6, 10), **more: Any) -> Inputs:
    if refs:
        more["ref_latents"] = [random(batch, 16, 4, 6), random(batch, 16, 6, 4, seed=2)]
    return (random(batch, 16, *size), torch.linspace(0.3, 0.6, batch), random(batch, 7, 80)), more


def ideogram() -> torch.nn.Module:
    sizes: dict[str, Any] = dict(num_layers=3, num_attention_heads=3, attention_head_dim=128, intermediate_size=64)
    rest: dict[str, Any] = dict(in_channels=128, adaln_dim=32, llm_features_dim=24)
    return build("comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel", **sizes, **rest)


def ideogram_picture(batch: int = 1, text: bool = True, masked: bool = False) -> Inputs:
    context = random(batch, 7, 24) if text else None
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])[-batch:] if masked else None
    return (random(batch, 128, 3, 5), torch.linspace(0.3, 0.6, batch), context, mask), {}


def masked_poses(batch: int = 1, **more: Any) -> Inputs:
    """A pose for each frame, and masks of its size that say who is where."""
    size = (4, 6) if more.get("half") else (8, 12)
    return wan_variants.poses(batch=batch, sam_latents=random(batch, 28, 3, *size), **more)


scail2 = partial(wan_variants.variant, ".SCAIL2WanModel")
h3 = partial(Case, family="MiniMaxH3Model", model=minimax, needs=MINIMAX)
krea2 = partial(Case, family="SingleStreamDiT", model=krea, needs=KREA)
ideogram4 = partial(Case, family="Ideogram4Transformer2DModel", model=ideogram, needs=IDEOGRAM)
scail = partial(Case, family="SCAIL2WanModel", model=scail2, needs=SCAIL2)
# five heads on every number of workers that people have
everywhere = partial(h3, meshes=("u2", "u3", "u5", "u8", "r2", "u2r2"), all_meshes=True)
wrong: dict[str, Any] = dict(wrong=True, meshes=("u2",), modes=TRUNK)

CASES = (
    everywhere(name="h3", make=sounding, modes=EVERY),
    everywhere(name="h3_masks", make=partial(sounding, denoise_mask=video_mask(), audio_denoise_mask=sound_mask())),
    h3(name="h3_video_mask", make=partial(sounding, denoise_mask=video_mask())),
    h3(name="h3_sound_mask", make=partial(sounding, audio_denoise_mask=sound_mask())),
    everywhere(name="h3_references", make=partial(sounding, **references())),
    everywhere(name="h3_keyframes", make=partial(sounding, **keyframes())),
    h3(name="h3_tags", make=partial(sounding, **tagged())),
    h3(name="h3_refined", make=lambda: ((*sounding()[0][:2], random(1, 9, 96)), {})),
    h3(name="h3_curves", model=partial(minimax, adaln_curve_grid=9), make=partial(sounding, width=14)),
    h3(
        name="h3_replace",
        make=partial(patched, sounding, partial(run_original, ("double_block", 0), ("double_block", 2))),
        modes=CHOOSES_BLOCK,
    ),
    h3(name="h3_skip", make=partial(patched, sounding, partial(skip, ("double_block", 1))), modes=CHOOSES_BLOCK),
    h3(
        name="h3_override",
        make=partial(patched, partial(sounding, **references()), override),
        base=sounding,
        ring_raises="UnsupportedError",
    ),
    h3(
        name="h3_backend",
        make=partial(patched, sounding, backend),
        meshes=("u2", "u3", "r2", "u2r2"),
        all_meshes=True,
    ),
    everywhere(name="h3_handed", model=partial(handed, 0, 2), make=sounding),
    h3(name="h3_handed_references", model=partial(handed, 1), make=partial(sounding, **references())),
    h3(name="h3_alone", make=partial(patched, sounding, alone), modes=CHOOSES_BLOCK),
    h3(name="no_h3_handed", model=partial(handed, 0, 2), make=sounding, change=uncalled, **wrong),
    h3(name="no_h3_attention", make=sounding, change=with_sites, **wrong),
    h3(
        name="no_h3_rope",
        model=sharp,
        make=partial(sounding, text=19),
        change=partial(as_first_rank, name="rope_freqs"),
        **wrong,
    ),
    h3(name="no_h3_rows", make=partial(sounding, denoise_mask=video_mask()), change=as_of_all, **wrong),
    krea2(name="krea2", make=krea_picture, modes=EVERY),
    krea2(name="krea2_batch", make=partial(krea_picture, batch=2)),
    krea2(name="krea2_grouped", model=partial(krea, heads=10), make=krea_picture),
    krea2(name="krea2_references", make=partial(krea_picture, batch=2, refs=True)),
    krea2(name="krea2_timed_references", make=partial(krea_picture, refs=True, ref_latents_method="index")),
    krea2(
        name="krea2_override",
        make=partial(patched, krea_picture, override),
        base=krea_picture,
        ring_raises="UnsupportedError",
    ),
    krea2(name="no_krea2_attention", make=krea_picture, change=with_sites, **wrong),
    krea2(
        name="no_krea2_rope",
        make=partial(krea_picture, size=(6, 14)),
        change=partial(as_first_rank, name="freqs"),
        **wrong,
    ),
    krea2(
        name="no_krea2_boundary",
        make=partial(krea_picture, refs=True, size=(6, 14)),
        change=lambda plan: with_shared(plan, "timestep_zero_index", lambda value, layout: value),
        **wrong,
    ),
    ideogram4(name="ideogram4", make=ideogram_picture, modes=EVERY),
    ideogram4(name="ideogram4_batch", make=partial(ideogram_picture, batch=2, masked=True)),
    ideogram4(name="ideogram4_masked", make=partial(ideogram_picture, masked=True)),
    ideogram4(name="ideogram4_without_text", make=partial(ideogram_picture, text=False)),
    ideogram4(name="no_ideogram4_attention", make=ideogram_picture, change=with_sites, **wrong),
    ideogram4(
        name="no_ideogram4_rope", make=ideogram_picture, change=partial(as_first_rank, name="freqs_cis"), **wrong
    ),
    scail(name="scail2", make=masked_poses),
    scail(
        name="scail2_reference",
        make=partial(
            masked_poses, half=True, reference_latent=random(1, 4, 1, 8, 12), ref_mask_latents=random(1, 28, 1, 8, 12)
        ),
    ),
    scail(
        name="scail2_skip", make=partial(patched, masked_poses, partial(skip, ("double_block", 2))), modes=CHOOSES_BLOCK
    ),
    scail(name="no_scail2_attention", make=masked_poses, change=with_sites, **wrong),
)
