"""Wan 2.1 and 2.2."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from comfy_raylight.raylight.plan import Plan, Region

from ..case import (
    CHOOSES_BLOCK,
    EVERY,
    TRUNK,
    Case,
    Inputs,
    backend,
    build,
    draws,
    override,
    patched,
    random,
    skip,
    without,
)
from .changes import as_first_rank


def wan(**more: Any) -> torch.nn.Module:
    sizes = dict(dim=60, ffn_dim=64, freq_dim=32, text_dim=16, in_dim=4, out_dim=4, num_heads=5, num_layers=4)
    return build("comfy.ldm.wan.model.WanModel", **{"model_type": "t2v", **sizes, **more})


def video(batch: int = 1, frames: int = 3, height: int = 6, width: int = 10, **more: Any) -> Inputs:
    t = torch.full((batch,), 500.0)
    return (random(batch, 4, frames, height, width), t, random(batch, 7, 16)), more


def frames_video() -> Inputs:
    (x, _, context), _ = video(batch=2)
    return (x, torch.tensor([[0.0, 500.0, 500.0], [0.0, 400.0, 400.0]]), context), {}


def clip_video() -> Inputs:
    args, _ = video(batch=2)
    return args, {"clip_fea": random(2, 257, 1280)}


def ref_frames_video() -> Inputs:
    args, more = video(frames=4, reference_latent=random(1, 4, 6, 10))
    return (args[0], torch.tensor([[0.0, 500.0, 400.0, 300.0]]), args[2]), more


def fun_control() -> Inputs:
    (_, t, context), more = video(clip_fea=random(1, 257, 1280), reference_latent=random(1, 4, 6, 10))
    return (random(1, 12, 3, 6, 10), t, context), more


def changed(plan: Plan, *, at: str = "blocks.*", **more: Any) -> Plan:
    """The plan with one list of blocks changed."""
    (region,) = plan.regions
    lists = [replace(blocks, **more) if blocks.at == at else blocks for blocks in region.blocks]
    return Plan(Region(*lists, exit=region.exit, whole=region.whole))


def looks_across() -> dict[str, Any]:
    def attn1(data: dict[str, Any]) -> torch.Tensor:
        weight = torch.softmax((data["q"] + data["k"]).flatten(2).mean(-1), 1)
        data["transformer_options"]["note"] = weight
        return data["x"] * (1 + weight[..., None])

    def attn2(data: dict[str, Any]) -> torch.Tensor:
        return data["x"] + data["transformer_options"].pop("note")[..., None] + data["x"].mean(1, keepdim=True)

    return {"patches": {"attn1_patch": [attn1], "attn2_patch": [attn2]}}


def attn2_only() -> dict[str, Any]:
    return {"patches": {"attn2_patch": [lambda data: data["x"] + data["x"].flip(1)]}}


def guided() -> dict[str, Any]:
    """Like ComfyUI's NAGuidance: the first row is guided away from the second, in place."""

    def attn1(data: dict[str, Any]) -> torch.Tensor:
        options, x = data["transformer_options"], data["x"]
        positive, negative = (x[options["cond_or_uncond"].index(row)].clone() for row in (0, 1))
        away = positive * 5 - negative * 4
        ratio = away.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        x[0] = away * ratio.clamp(max=1.5) / ratio / 2 + positive / 2
        return x

    return {"cond_or_uncond": [0, 1], "patches": {"attn1_patch": [attn1]}}


def speakers(number: int) -> dict[str, Any]:
    """InfiniteTalk's own patches and modules, as its node sets them."""
    from comfy.ldm.wan.model_multitalk import MultiTalkCrossAttnPatch, MultiTalkGetAttnMapPatch

    module = "comfy.ldm.wan.model_multitalk.WanMultiTalkAttentionBlock"
    blocks = [build(module, in_dim=80, out_dim=16) for _ in range(4)]
    for index, block in enumerate(blocks):
        block.norm_x.weight.data += index  # type: ignore[operator,union-attr]
    talks = MultiTalkCrossAttnPatch(SimpleNamespace(model=SimpleNamespace(blocks=blocks)), 0.5)
    patches = {"attn2_patch": [talks]}
    if number == 2:
        masks = torch.arange(15) % 5 < 2
        patches["attn1_patch"] = [MultiTalkGetAttnMapPatch(torch.stack((masks, ~masks)))]
    return {"audio_embeds": random(1, 3, 4 * number, 16), "patches": patches}


def in_context(batch: int = 1, **more: Any) -> Inputs:
    """Bernini's references: a picture and a video behind the tokens of the video that is made."""
    return video(batch, context_latents=[random(batch, 4, 1, 4, 6), random(batch, 4, 2, 6, 10, seed=2)], **more)


def camera(strength: float = 0.8) -> dict[str, Any]:
    """Uni3C's own patch and module, as its node sets them; the render is encoded already."""
    from comfy_extras.nodes_model_patch import WanUni3CCnetPatch

    sizes: dict[str, Any] = dict(in_channels=24, conv_out_dim=20, dim=60, ffn_dim=64, num_heads=5, num_layers=3)
    made = build("comfy.ldm.wan.uni3c.WanUni3CControlnet", **sizes, time_embed_dim=60, out_proj_dim=60)
    patch = WanUni3CCnetPatch(SimpleNamespace(model=made), None, None, None, strength, 1.0, 0.0)
    patch.prepared_render = random(1, 4, 3, 6, 10)
    return {"cond_or_uncond": [0, 1], "patches": {"double_block": [patch]}}


def talking() -> torch.nn.Module:
    """With attention that tells tokens apart: the map of two speakers is scaled by its own range."""
    model = wan(dim=80)
    for block in model.blocks:  # type: ignore[union-attr]
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
            norm.weight.data += 1
    return model


def nag() -> torch.nn.Module:
    """With text attention replaced in every block, as object patches do it."""
    model = wan()
    negative = random(1, 5, 60)

    def attend(self: Any, x: torch.Tensor, context: torch.Tensor, **more: Any) -> torch.Tensor:
        toward, away = (type(self).forward(self, x, text, **more) for text in (context, negative))
        out = toward * 3 - away * 2
        ratio = out.norm(p=1, dim=-1, keepdim=True) / toward.norm(p=1, dim=-1, keepdim=True)
        return torch.where(ratio > 2.5, out / ratio * 2.5, out)

    for block in model.blocks:  # type: ignore[union-attr]
        block.cross_attn.forward = partial(attend, block.cross_attn)
    return model


WAN_ATTN = ("comfy.ldm.wan.model", "attn1_patch")
WAN_TALK = ("comfy.ldm.wan.model_multitalk", "")
WAN_CONTEXT = ("comfy.ldm.wan.model", "context_latents")
WAN_CAMERA = ("comfy.ldm.wan.uni3c", "class WanUni3CControlnet")
i2v = partial(wan, model_type="i2v")
ref_conv = partial(wan, in_dim_ref_conv=4)

CASES = (
    Case(name="wan_t2v", family="WanModel", model=wan, make=video, modes=EVERY),
    Case(name="wan_batch", family="WanModel", model=wan, make=partial(video, batch=2), modes=EVERY),
    Case(name="wan_short", family="WanModel", model=wan, make=partial(video, frames=47, height=2, width=2)),
    Case(name="wan_tiny", family="WanModel", model=wan, make=partial(video, frames=5, height=2, width=2), modes=EVERY),
    Case(name="wan_i2v", family="WanModel", model=i2v, make=clip_video),
    Case(name="wan_ti2v", family="WanModel", model=wan, make=frames_video),
    Case(name="wan_ref", family="WanModel", model=ref_conv, make=partial(video, reference_latent=random(1, 4, 6, 10))),
    Case(
        name="wan_flf",
        family="WanModel",
        model=partial(i2v, flf_pos_embed_token_number=514),
        make=partial(video, clip_fea=random(1, 514, 1280)),
    ),
    Case(
        name="wan_fun_control",
        family="WanModel",
        model=partial(i2v, in_dim=12, in_dim_ref_conv=4),
        make=fun_control,
    ),
    # 5 rows of tokens for 4 frames: a frame's modulation covers more than its tokens
    Case(name="wan_ref_frames", family="WanModel", model=ref_conv, make=ref_frames_video),
    Case(
        name="wan_subject",
        family="WanModel",
        model=wan,
        make=partial(video, height=5, width=9, time_dim_concat=random(1, 4, 2, 6, 10)),
    ),
    Case(
        name="wan_override",
        family="WanModel",
        model=wan,
        make=partial(patched, video, override),
        modes=EVERY[:-1],
        base=video,
        ring_raises="UnsupportedError",
    ),
    Case(
        name="wan_backend",
        family="WanModel",
        model=wan,
        make=partial(patched, video, backend),
        meshes=("u2", "u3", "r2", "u2r2"),
        all_meshes=True,
        needs=("comfy.model_patcher", "def set_model_optimized_attention"),
    ),
    Case(name="wan_patches", family="WanModel", model=wan, make=partial(patched, video, looks_across), needs=WAN_ATTN),
    Case(
        name="wan_attn2",
        family="WanModel",
        model=wan,
        make=partial(patched, partial(video, batch=2), attn2_only),
        needs=WAN_ATTN,
    ),
    Case(
        name="wan_guided",
        family="WanModel",
        model=wan,
        make=partial(patched, partial(video, batch=2), guided),
        needs=WAN_ATTN,
    ),
    Case(name="wan_bernini", family="WanModel", model=wan, make=in_context, modes=EVERY, needs=WAN_CONTEXT),
    Case(
        name="wan_bernini_batch",
        family="WanModel",
        model=i2v,
        make=partial(in_context, batch=2, clip_fea=random(2, 257, 1280)),
        needs=WAN_CONTEXT,
    ),
    Case(
        name="wan_bernini_patched",
        family="WanModel",
        model=wan,
        make=partial(patched, in_context, looks_across),
        needs=WAN_CONTEXT,
    ),
    Case(
        name="wan_uni3c",
        family="WanModel",
        model=wan,
        make=partial(patched, partial(video, batch=2), camera),
        modes=CHOOSES_BLOCK,
        needs=WAN_CAMERA,
    ),
    Case(
        name="wan_uni3c_reference",
        family="WanModel",
        model=ref_conv,
        make=partial(patched, partial(video, batch=2, reference_latent=random(2, 4, 6, 10)), camera),
        modes=CHOOSES_BLOCK,
        needs=WAN_CAMERA,
    ),
    Case(
        name="wan_uni3c_bernini",
        family="WanModel",
        model=wan,
        make=partial(patched, partial(in_context, batch=2), camera),
        modes=CHOOSES_BLOCK,
        needs=WAN_CAMERA,
    ),
    Case(name="wan_nag", family="WanModel", model=nag, make=video),
    Case(
        name="wan_talk",
        family="WanModel",
        model=talking,
        make=partial(patched, video, partial(speakers, 1)),
        needs=WAN_TALK,
    ),
    Case(
        name="wan_talk_two",
        family="WanModel",
        model=talking,
        make=partial(patched, video, partial(speakers, 2)),
        needs=WAN_TALK,
    ),
    Case(
        name="wan_skip",
        family="WanModel",
        model=wan,
        make=partial(patched, video, partial(skip, ("double_block", 0), ("double_block", 3))),
        modes=CHOOSES_BLOCK,
    ),
    Case(
        name="no_wan_rope",
        family="WanModel",
        model=wan,
        make=partial(video, frames=4),
        change=partial(as_first_rank, name="freqs"),
        wrong=True,
        meshes=("u2",),
    ),
    Case(
        name="no_wan_attention",
        family="WanModel",
        model=wan,
        make=video,
        change=partial(without, attention=False),
        wrong=True,
        meshes=("u2",),
    ),
    Case(
        name="no_head_e",
        family="WanModel",
        model=wan,
        make=frames_video,
        change=partial(without, head=False),
        wrong=True,
        meshes=("u2",),
        modes=TRUNK,
    ),
    Case(
        name="no_wan_e",
        family="WanModel",
        model=wan,
        make=frames_video,
        change=partial(without, shared="e"),
        wrong=True,
        meshes=("u2",),
    ),
    Case(
        name="no_wan_bernini_rope",
        family="WanModel",
        model=wan,
        make=partial(in_context, frames=4),
        change=partial(as_first_rank, name="freqs"),
        needs=WAN_CONTEXT,
        wrong=True,
        meshes=("u2",),
    ),
    # tokens that a rank has of the whole video would get the residual of its first ones
    Case(
        name="no_wan_uni3c_block",
        family="WanModel",
        model=wan,
        make=partial(patched, partial(video, batch=2), camera),
        modes=TRUNK,
        needs=WAN_CAMERA,
        wrong=True,
        loud=True,
        meshes=("u2",),
    ),
    Case(
        name="no_wan_patches",
        family="WanModel",
        model=wan,
        make=partial(patched, partial(video, batch=2), attn2_only),
        change=partial(changed, patches={}),
        needs=WAN_ATTN,
        wrong=True,
        meshes=("u2",),
    ),
    Case(
        name="wan_random_override",
        family="WanModel",
        model=wan,
        make=partial(patched, video, draws),
        base=video,
        meshes=("u2", "u3"),  # more ranks than heads: one without heads would not draw, and wait for the others
        raises="UnsupportedError",
    ),
)
