"""Flux.1 and Flux.2, LongCat-Image and Ovis-Image, and patches that look across tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy_raylight.raylight.cuts import Rope
from comfy_raylight.raylight.plan import Plan, Region

from ..case import CHOOSES_BLOCK, EVERY, Case, Inputs, build, override, patched, random, run_original, skip, without


def flux(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=16, hidden_size=48, num_heads=3)
    shape = dict(mlp_ratio=2.0, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2)
    rest = dict(qkv_bias=True, guidance_embed=True, txt_ids_dims=[])
    return build("comfy.ldm.flux.model.Flux", **{**sizes, **shape, **rest, **more})


def flux2() -> torch.nn.Module:
    sizes = dict(hidden_size=80, num_heads=5, axes_dim=[4, 4, 4, 4], theta=2000, patch_size=1, txt_ids_dims=[3])
    plain = dict(vec_in_dim=None, guidance_embed=False, qkv_bias=False, ops_bias=False)
    rest = dict(global_modulation=True, mlp_silu_act=True, default_ref_method="index", ref_index_scale=10.0)
    return flux(**sizes, **plain, **rest)


def image(batch: int = 1, text: int = 7, channels: int = 4, size: tuple[int, int] = (6, 10), **more: Any) -> Inputs:
    t = torch.linspace(0.5, 0.25, batch)
    y, guidance = random(batch, 8), torch.full((batch,), 3.5)
    return (random(batch, channels, *size), t, random(batch, text, 16), y, guidance), more


def references(method: str, batch: int = 1, **more: Any) -> Inputs:
    refs = [random(batch, 4, 4, 6), random(batch, 4, 6, 3)]
    return image(batch, size=(5, 7), ref_latents=refs, ref_latents_method=method, **more)


def rope_shift() -> dict[str, Any]:
    """What ComfyUI's LongCatImage adds to the options: the image's positions start after the text's."""
    return {"rope_options": {"shift_t": 1.0, "shift_y": 7.0, "shift_x": 7.0}}


def slice_patch() -> dict[str, Any]:
    def patch(out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        start, stop = extra["img_slice"]
        out = out.clone()
        out[:, start:stop] *= 1.7
        return out

    return {"patches": {"attn1_output_patch": [patch]}}


def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] twice -> [B, L], a weight for each token that depends on all of them."""
    return torch.softmax((q * k).mean((1, 3)) * 8, 1) * q.shape[2]


def image_slice(extra: dict[str, Any], tokens: int) -> slice:
    return slice(*extra.get("img_slice", (0, tokens)))


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> dict[str, Any]:
    """An attn1_patch: a softmax over all tokens, the image's tokens flipped, the rope shifted by a token."""
    weight, extra = weights(q, k), given["extra_options"]
    extra["weight"] = weight
    v = v * (1 + weight[:, None, :, None])
    at = image_slice(extra, v.shape[2])
    v[:, :, at] += v[:, :, at].flip(2)
    out = {"q": q + k.mean(2, keepdim=True), "v": v}
    return out if given["pe"] is None else {**out, "pe": given["pe"].roll(1, 2)}


def mix_output(out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    """An attn1_output_patch that also reads what `mix` left for it, in the same block and no other."""
    weight = extra.pop("weight") if "weight" in extra else torch.softmax(out.mean(2), 1)
    at = image_slice(extra, out.shape[1])
    out[:, at] += 0.5 * out[:, at].flip(1)
    return out * (1 + weight[..., None]) + out.mean(1, keepdim=True)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> dict[str, Any]:
    """An attn1_patch that computes an attention of its own, under the options it is given."""
    from comfy.ldm.modules.attention import optimized_attention

    heads = q.shape[1]
    own = optimized_attention(q, k, v, heads, skip_reshape=True, transformer_options=given["extra_options"])
    return {"v": v + own.unflatten(2, (heads, -1)).transpose(1, 2)}


def write(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> dict[str, Any]:
    """An attn1_patch that writes into what it is given, and returns only some of it."""
    weight = weights(q, k)[:, None, :, None]
    k.add_(k.flip(2))
    v.mul_(1 + weight)
    q.mul_(weight)
    return {"q": q}


def hide(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> dict[str, Any]:
    """An attn1_patch that returns a mask: no query sees the second half of the keys."""
    mask = torch.zeros(1, q.shape[2], q.shape[2])
    mask[..., q.shape[2] // 2 :] = -torch.inf
    return {"attn_mask": mask}


def guide(out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    """An attn1_output_patch as NAG's: both halves of the batch get what their difference says, in place."""
    at = image_slice(extra, out.shape[1])
    negative, positive = (out[row : row + 1, at] for row in (0, 1))
    guided = positive * 5.0 - negative * 4.0
    ratio = guided.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True).clamp_min(1e-6)
    out[:, at] = 0.5 * guided * ratio.clamp(max=1.5) / ratio + 0.5 * positive
    return out


def calls(**patches: Callable[..., Any]) -> Callable[[], dict[str, Any]]:
    """transformer_options with one patch in each of some lists."""
    return lambda: {"patches": {name: [patch] for name, patch in patches.items()}}


across = calls(attn1_patch=mix, attn1_output_patch=mix_output)


def style(data: dict[str, Any]) -> dict[str, Any]:
    """A post_input patch that puts tokens before the text, as USO's style references."""
    added = data["txt"][:, :3] * 0.5 + data["img"].mean(1, keepdim=True)
    ids = torch.zeros_like(data["txt_ids"][:, :3])
    return {
        **data,
        "txt": torch.cat((added, data["txt"]), 1),
        "txt_ids": torch.cat((ids, data["txt_ids"]), 1),
    }


def drop_references(data: dict[str, Any]) -> dict[str, Any]:
    """A post_input patch that leaves out tokens but not their positions, as a reference cache."""
    return {**data, "img": data["img"][:, :-6]}


def longer_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pe: torch.Tensor, **rest: Any) -> dict[str, Any]:
    longer = {name: torch.cat((t, t[:, :, :1]), 2) for name, t in (("k", k), ("v", v), ("pe", pe))}
    return {"q": q, **longer}


def residuals(tokens: int = 15, width: int = 48) -> dict[str, Any]:
    add = random(1, tokens, width) * 0.1
    return {"input": [add, None], "output": [add, add * 2]}


def text_mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 22, 22)
    mask[..., :7, 7:] = -1e4
    return mask


def head_mask() -> torch.Tensor:
    return text_mask().expand(1, 3, 22, 22) * torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)


def shown_regions(batch: int = 1) -> torch.Tensor:
    """A bool mask [B, L, L] as of regional prompts: each half of the text is for one half of the image."""
    side = torch.cat((torch.arange(7) // 4, torch.arange(15) // 8))
    mask = side[:, None] == side[None]
    mask[7:, 7:] = True
    return torch.stack([mask, torch.ones_like(mask)][:batch])


def regions(batch: int = 1) -> torch.Tensor:
    shown = shown_regions(batch)
    return torch.zeros(shown.shape).masked_fill_(~shown, -torch.inf)


def without_patches(plan: Plan) -> Plan:
    """The plan with patches shown what a rank holds."""
    forgetful = [[replace(blocks, patches={}) for blocks in region.blocks] for region in plan.regions]
    return Plan(*(Region(*blocks) for blocks in forgetful))


def image_first(plan: Plan) -> Plan:
    """The plan with the rope table cut as if the other stream came first."""
    (double,), single = plan.regions[0].blocks, plan.regions[1]
    return Plan(Region(replace(double, shared={**double.shared, "pe": Rope(*reversed(double.order))})), single)


FLUX_ATTN = ("comfy.ldm.flux.layers", "attn1_patch")
FLUX_REF = ("comfy.ldm.flux.model", "index_timestep_zero")
FLUX_IDS = ("comfy.ldm.flux.model", "txt_ids_dims")
FLUX_YAK = ("comfy.ldm.flux.model", "yak_mlp")
longcat = partial(flux, vec_in_dim=None, guidance_embed=False, txt_ids_dims=[1, 2])
ovis = partial(longcat, yak_mlp=True, txt_norm=True)
small = partial(image, size=(3, 5))
timed = partial(small, ref_latents=[random(1, 4, 2, 3)], ref_latents_method="index_timestep_zero")
timed_pair = partial(timed, batch=2, ref_latents=[random(2, 4, 2, 3), random(2, 4, 3, 3)])
both = (("double_block", 0), ("single_block", 1))
ends = (("double_block", 0), ("double_block", 1), ("single_block", 0))
FEW = ("u2", "u3", "u8", "u2r2")
"""Meshes for variants that differ only before the blocks, or in what a patch does."""
case = partial(Case, family="Flux", model=flux)
few = partial(case, meshes=FEW)
wrong = partial(case, make=image, base=image, wrong=True, meshes=("u2",))

CASES = (
    case(name="flux", make=image, base=image, modes=EVERY),
    case(name="flux_batch", make=partial(image, batch=2), modes=EVERY),
    case(name="flux_text1", make=partial(image, text=1), modes=EVERY),
    case(name="flux_five_heads", model=partial(flux, hidden_size=80, num_heads=5), make=image),
    few(name="flux_fill", model=partial(flux, in_channels=9), make=partial(image, channels=9)),
    case(name="flux_ref", make=partial(references, "offset")),
    few(name="flux_ref_index", make=partial(references, "index", batch=2)),
    few(name="flux_ref_uxo", make=partial(references, "uxo")),
    few(name="flux_ref_default", model=partial(flux, default_ref_method="index"), make=partial(references, "none")),
    case(name="flux2", model=flux2, make=small, modes=EVERY),
    few(name="flux2_batch", model=flux2, make=partial(small, batch=2)),
    case(name="flux2_ref", model=flux2, make=partial(small, ref_latents=[random(1, 4, 2, 3), random(1, 4, 3, 3)])),
    case(name="flux2_timed", model=flux2, make=timed, needs=FLUX_REF, modes=EVERY),
    few(name="flux2_timed_batch", model=flux2, make=timed_pair, needs=FLUX_REF),
    case(name="flux2_across", model=flux2, make=partial(patched, timed_pair, across), needs=FLUX_ATTN),
    few(name="flux_longcat", model=longcat, make=partial(patched, image, rope_shift), needs=FLUX_IDS),
    few(
        name="flux_longcat_ref",
        model=longcat,
        make=partial(patched, partial(references, "index"), rope_shift),
        needs=FLUX_IDS,
    ),
    few(name="flux_ovis", model=ovis, make=image, needs=FLUX_YAK),
    few(name="flux_ovis_batch", model=ovis, make=partial(image, batch=2), needs=FLUX_YAK),
    few(name="flux_style", make=partial(patched, image, calls(post_input=style))),
    case(name="flux_mask", make=partial(image, attention_mask=text_mask())),
    case(name="flux_head_mask", make=partial(image, attention_mask=head_mask())),
    case(name="flux_regions", make=partial(image, attention_mask=regions())),
    few(name="flux_regions_batch", make=partial(image, batch=2, attention_mask=regions(2))),
    # ComfyUI's attention on the CPU adds True as 1; the ring's kernels read it as PyTorch does
    case(name="flux_regions_bool", make=partial(image, attention_mask=shown_regions()), meshes=("u2", "u3", "u8")),
    case(name="flux_slice", make=partial(patched, image, slice_patch), needs=FLUX_ATTN),
    case(name="flux_across", make=partial(patched, image, across), needs=FLUX_ATTN, modes=EVERY),
    case(name="flux_across_batch", make=partial(patched, partial(image, batch=2), across), needs=FLUX_ATTN),
    few(
        name="flux_across_ref",
        make=partial(patched, partial(references, "index"), across),
        needs=FLUX_ATTN,
    ),
    few(
        name="flux_across_mask",
        make=partial(patched, partial(image, attention_mask=regions()), across),
        needs=FLUX_ATTN,
    ),
    few(
        name="flux_across_two",
        make=partial(patched, image, lambda: {"patches": {"attn1_patch": [mix, attend, mix]}}),
        needs=FLUX_ATTN,
    ),
    few(name="flux_attend", make=partial(patched, image, calls(attn1_patch=attend)), needs=FLUX_ATTN),
    few(name="flux_write", make=partial(patched, image, calls(attn1_patch=write)), needs=FLUX_ATTN),
    few(name="flux_hide", make=partial(patched, image, calls(attn1_patch=hide)), needs=FLUX_ATTN),
    few(
        name="flux_nag",
        make=partial(patched, partial(image, batch=2), calls(attn1_output_patch=guide)),
        needs=FLUX_ATTN,
    ),
    few(
        name="flux_across_control",
        make=partial(patched, partial(image, control=residuals()), across),
        needs=FLUX_ATTN,
        modes=CHOOSES_BLOCK,
    ),
    case(name="flux_control", make=partial(image, control=residuals()), modes=CHOOSES_BLOCK),
    case(name="flux_control_ref", make=partial(references, "offset", control=residuals(12)), modes=CHOOSES_BLOCK),
    few(
        name="flux2_control",
        model=flux2,
        make=partial(timed, control=residuals(width=80)),
        needs=FLUX_REF,
        modes=CHOOSES_BLOCK,
    ),
    case(name="flux_replace", make=partial(patched, image, partial(run_original, *both)), modes=CHOOSES_BLOCK),
    case(name="flux_skip", make=partial(patched, image, partial(skip, *ends)), modes=CHOOSES_BLOCK),
    case(
        name="flux_override",
        make=partial(patched, image, override),
        base=image,
        ring_raises="UnsupportedError",
    ),
    case(
        name="flux_longer",
        make=partial(patched, image, calls(attn1_patch=longer_keys)),
        base=image,
        needs=FLUX_ATTN,
        raises="MisfitError",
    ),
    few(
        name="flux_dropped",
        make=partial(patched, image, calls(post_input=drop_references)),
        base=image,
        raises="MisfitError",
    ),
    wrong(name="no_flux_attention", change=partial(without, attention=False)),
    wrong(name="no_flux_rope", loud=True, change=partial(without, shared="pe")),
    wrong(name="no_flux_patches", change=without_patches, make=partial(patched, image, across), needs=FLUX_ATTN),
    wrong(name="no_flux2_rope", loud=True, model=flux2, make=small, base=small, change=partial(without, shared="pe")),
    wrong(name="flux2_rope_order", model=flux2, make=small, base=small, change=image_first),
    wrong(
        name="no_flux2_double_dims",
        model=flux2,
        make=timed,
        base=timed,
        change=partial(without, shared="modulation_dims_img"),
        needs=FLUX_REF,
    ),
    wrong(
        name="no_flux2_single_dims",
        model=flux2,
        make=timed,
        base=timed,
        change=partial(without, shared="modulation_dims"),
        needs=FLUX_REF,
    ),
)
