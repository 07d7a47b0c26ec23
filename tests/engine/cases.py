"""The engine's cases: ComfyUI's real model classes at tiny widths, their inputs, and what ComfyUI must have for them.

ComfyUI itself is imported where a model is built: in rank processes only, after `ranks.enter_comfy`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from comfy_raylight.patches.registry import plan_for
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.hooks import install
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.plan import Plan

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def build(path: str, **wanted: Any) -> torch.nn.Module:
    """The class at `path` with those of the wanted arguments that this ComfyUI knows, and random weights."""
    import comfy.ops

    place = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    module, _, name = path.rpartition(".")
    space = importlib.import_module(module)
    cls = getattr(space, name)
    known = set(inspect.signature(cls.__init__).parameters)
    if hasattr(space, name + "Params"):
        known |= {field.name for field in fields(getattr(space, name + "Params"))}
    model = cls(**{key: value for key, value in (wanted | place).items() if key in known})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.6 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model.eval()


def wan(**more: Any) -> torch.nn.Module:
    sizes = dict(dim=60, ffn_dim=64, freq_dim=32, text_dim=16, in_dim=4, out_dim=4, num_heads=5, num_layers=4)
    return build("comfy.ldm.wan.model.WanModel", **{"model_type": "t2v", **sizes, **more})


def flux(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=16, hidden_size=48, num_heads=3)
    shape = dict(mlp_ratio=2.0, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2)
    rest = dict(qkv_bias=True, guidance_embed=True, txt_ids_dims=[])
    return build("comfy.ldm.flux.model.Flux", **{**sizes, **shape, **rest, **more})


def lumina(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=4, dim=60, n_layers=3, n_refiner_layers=2, n_heads=5, n_kv_heads=1, multiple_of=8)
    rest = dict(ffn_dim_multiplier=1.0, qk_norm=True, cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[64, 64, 64])
    return build("comfy.ldm.lumina.model.NextDiT", **{**sizes, **rest, **more})


def zimage(**more: Any) -> torch.nn.Module:
    sizes = dict(dim=260, n_kv_heads=5, axes_dims=[20, 16, 16], z_image_modulation=True, pad_tokens_multiple=8)
    return lumina(**{**sizes, **more})


def video(batch: int = 1, frames: int = 3, height: int = 6, width: int = 10, **more: Any) -> Inputs:
    t = torch.full((batch,), 500.0)
    return (random(batch, 4, frames, height, width), t, random(batch, 7, 16)), more


def frames_video() -> Inputs:
    (x, _, context), _ = video(batch=2)
    return (x, torch.tensor([[0.0, 500.0, 500.0], [0.0, 400.0, 400.0]]), context), {}


def clip_video() -> Inputs:
    args, _ = video(batch=2)
    return args, {"clip_fea": random(2, 257, 1280)}


def image(batch: int = 1, text: int = 7, **more: Any) -> Inputs:
    t = torch.full((batch,), 0.5)
    y, guidance = random(batch, 8), torch.full((batch,), 3.5)
    return (random(batch, 4, 6, 10), t, random(batch, text, 16), y, guidance), more


def sheet(batch: int = 1, text: int = 7, **more: Any) -> Inputs:
    return (random(batch, 4, 6, 10), torch.full((batch,), 0.5), random(batch, text, 16), text), more


def patched(inputs: Callable[[], Inputs], options: Callable[[], dict[str, Any]]) -> Inputs:
    args, kwargs = inputs()
    return args, {**kwargs, "transformer_options": options()}


def override() -> dict[str, Any]:
    def user(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert "optimized_attention_override" in kwargs["transformer_options"]
        return func(*args, **kwargs) * 1.5

    return {"optimized_attention_override": user}


def draws() -> dict[str, Any]:
    def user(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = func(*args, **kwargs)
        return out + torch.rand_like(out)

    return {"optimized_attention_override": user}


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


def skip(*blocks: tuple[str, int]) -> dict[str, Any]:
    def skipped(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return args

    return {"patches_replace": {"dit": dict.fromkeys(blocks, skipped)}}


def run_original(*blocks: tuple[str, int]) -> dict[str, Any]:
    def original(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return extra["original_block"](args)

    return {"patches_replace": {"dit": dict.fromkeys(blocks, original)}}


def slice_patch() -> dict[str, Any]:
    def patch(out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        start, stop = extra["img_slice"]
        out = out.clone()
        out[:, start:stop] *= 1.7
        return out

    return {"patches": {"attn1_output_patch": [patch]}}


def longer_keys() -> dict[str, Any]:
    def patch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pe: torch.Tensor, **rest: Any) -> dict[str, Any]:
        longer = {name: torch.cat((t, t[:, :, :1]), 2) for name, t in (("k", k), ("v", v), ("pe", pe))}
        return {"q": q, **longer}

    return {"patches": {"attn1_patch": [patch]}}


def slope(name: str) -> dict[str, Any]:
    def patch(data: dict[str, Any]) -> dict[str, Any]:
        img = data["img"]
        rows, columns = (torch.linspace(-1, 1, n) for n in img.shape[1:])
        return {"img": img * (1 + rows[:, None] * columns), "txt": data["txt"]}

    return {"patches": {name: [patch]}}


def residuals() -> dict[str, Any]:
    add = random(1, 15, 48) * 0.1
    return {"input": [add, None], "output": [add, add * 2]}


def text_mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 22, 22)
    mask[..., :7, 7:] = -1e4
    return mask


def head_mask() -> torch.Tensor:
    return text_mask().expand(1, 3, 22, 22).contiguous()


def without(*, shared: str = "", attention: bool = True, head: bool = True, kind: type) -> Plan:
    """The family's plan with something forgotten in every region."""
    plan = plan_for(kind)
    regions = []
    for region in plan.regions:
        kept = {name: entry for name, entry in region.blocks.shared.items() if name != shared}
        blocks = replace(region.blocks, shared=kept)
        blocks = blocks if attention else replace(blocks, attention=())
        leave = region.exit if head or region.exit is None else replace(region.exit, shared={})
        regions.append(replace(region, blocks=blocks, exit=leave))
    return Plan(*regions)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model with one set of inputs.

    Attributes:
        model, make: how to build the model and its inputs; inputs are made anew for each forward.
        base: plain inputs of the same model, for the forward after one that raised.
        modes: "trunk" and "block" force a granularity, "auto" lets the engine choose; "packed",
            "synced" and "kernel" choose and switch an option on, "wrapped" is a DIFFUSION_MODEL wrapper.
        ranks: degrees to run at.
        needs: (module, text): the module's source must hold the text in this ComfyUI.
        wrong: a negative control: the outputs must differ.
        raises: the type of the error that every rank must raise.
        change: keyword arguments of `without`.
    """

    name: str
    model: Callable[[], torch.nn.Module]
    make: Callable[[], Inputs]
    base: Callable[[], Inputs] = video
    modes: tuple[str, ...] = ("trunk", "block")
    ranks: tuple[int, ...] = (2, 3, 8)
    needs: tuple[str, str] | None = None
    wrong: bool = False
    raises: str = ""
    change: dict[str, Any] | None = None

    def inputs(self) -> Inputs:
        return copy.deepcopy(self.make())

    def modes_on(self, size: int) -> list[str]:
        """The modes to run on `size` ranks; what does not depend on their number is not repeated on many."""
        return [mode for mode in self.modes if size < 8 or mode not in ("synced", "wrapped", "kernel")]

    def plan(self, kind: type) -> Plan:
        return plan_for(kind) if self.change is None else without(kind=kind, **self.change)


WAN_ATTN = ("comfy.ldm.wan.model", "attn1_patch")
FLUX_ATTN = ("comfy.ldm.flux.layers", "attn1_patch")
FLUX_REF = ("comfy.ldm.flux.model", "index_timestep_zero")
LUMINA_PATCH = ("comfy.ldm.lumina.model", '"double_block" in patches')
LUMINA_REFINER = ("comfy.ldm.lumina.model", '"noise_refiner" in patches')
LUMINA_OMNI = ("comfy.ldm.lumina.model", "ref_contexts")
EVERY = ("trunk", "block", "auto", "packed", "synced", "wrapped", "kernel")
CHOOSES_BLOCK = ("auto", "block")
TRUNK = ("trunk",)
i2v = partial(wan, model_type="i2v")
ref_conv = partial(wan, in_dim_ref_conv=4)
flux2 = partial(flux, global_modulation=True, vec_in_dim=None, guidance_embed=False)
ref_images = partial(image, ref_latents=[random(1, 4, 4, 6)])
omni = partial(sheet, ref_latents=[random(1, 4, 4, 6)], ref_contexts=[random(1, 5, 16), random(1, 6, 16)])
timed = partial(ref_images, ref_latents_method="index_timestep_zero")
both = (("double_block", 0), ("single_block", 1))
ends = (("double_block", 0), ("double_block", 1), ("single_block", 0))

CASES = (
    Case(name="wan_t2v", model=wan, make=video, modes=EVERY),
    Case(name="wan_batch", model=wan, make=partial(video, batch=2), modes=EVERY),
    Case(name="wan_short", model=wan, make=partial(video, frames=47, height=2, width=2)),
    Case(name="wan_tiny", model=wan, make=partial(video, frames=5, height=2, width=2), modes=EVERY),
    Case(name="wan_i2v", model=i2v, make=clip_video),
    Case(name="wan_ti2v", model=wan, make=frames_video),
    Case(name="wan_ref", model=ref_conv, make=partial(video, reference_latent=random(1, 4, 6, 10))),
    Case(name="wan_override", model=wan, make=partial(patched, video, override), modes=EVERY[:-1]),
    Case(name="wan_patches", model=wan, make=partial(patched, video, looks_across), needs=WAN_ATTN),
    Case(name="wan_attn2", model=wan, make=partial(patched, partial(video, batch=2), attn2_only), needs=WAN_ATTN),
    Case(
        name="wan_skip",
        model=wan,
        make=partial(patched, video, partial(skip, ("double_block", 0), ("double_block", 3))),
        modes=CHOOSES_BLOCK,
    ),
    Case(name="flux", model=flux, make=image, base=image, modes=EVERY),
    Case(name="flux_batch", model=flux, make=partial(image, batch=2), modes=EVERY),
    Case(name="flux_text1", model=flux, make=partial(image, text=1), modes=EVERY),
    Case(name="flux_ref", model=flux, make=ref_images),
    Case(name="flux2", model=flux2, make=image),
    Case(name="flux2_timed", model=flux2, make=timed, needs=FLUX_REF),
    Case(name="flux_mask", model=flux, make=partial(image, attention_mask=text_mask())),
    Case(name="flux_slice", model=flux, make=partial(patched, image, slice_patch), needs=FLUX_ATTN),
    Case(name="flux_control", model=flux, make=partial(image, control=residuals()), modes=CHOOSES_BLOCK),
    Case(
        name="flux_control_ref",
        model=flux,
        make=partial(ref_images, control=residuals()),
        modes=CHOOSES_BLOCK,
    ),
    Case(
        name="flux_replace",
        model=flux,
        make=partial(patched, image, partial(run_original, *both)),
        modes=CHOOSES_BLOCK,
    ),
    Case(name="flux_skip", model=flux, make=partial(patched, image, partial(skip, *ends)), modes=CHOOSES_BLOCK),
    Case(name="flux_override", model=flux, make=partial(patched, image, override)),
    Case(name="lumina2", model=lumina, make=sheet, modes=EVERY),
    Case(name="lumina2_batch", model=lumina, make=partial(sheet, batch=2)),
    Case(name="zimage", model=zimage, make=sheet, modes=EVERY),
    Case(name="zimage_text1", model=zimage, make=partial(sheet, text=1)),
    Case(name="zimage_omni", model=partial(zimage, siglip_feat_dim=8), make=omni, needs=LUMINA_OMNI),
    Case(
        name="zimage_double_block",
        model=zimage,
        make=partial(patched, sheet, partial(slope, "double_block")),
        modes=CHOOSES_BLOCK,
        needs=LUMINA_PATCH,
    ),
    Case(
        name="zimage_noise_refiner",
        model=zimage,
        make=partial(patched, sheet, partial(slope, "noise_refiner")),
        modes=CHOOSES_BLOCK,
        needs=LUMINA_REFINER,
    ),
    Case(name="no_wan_rope", model=wan, make=video, change={"shared": "freqs"}, wrong=True, ranks=(2,)),
    Case(name="no_wan_attention", model=wan, make=video, change={"attention": False}, wrong=True, ranks=(2,)),
    Case(name="no_head_e", model=wan, make=frames_video, change={"head": False}, wrong=True, ranks=(2,), modes=TRUNK),
    Case(name="no_wan_e", model=wan, make=frames_video, change={"shared": "e"}, wrong=True, ranks=(2,)),
    Case(
        name="no_flux_attention",
        model=flux,
        make=image,
        base=image,
        change={"attention": False},
        wrong=True,
        ranks=(2,),
    ),
    Case(name="no_flux_rope", model=flux, make=image, base=image, change={"shared": "pe"}, wrong=True, ranks=(2,)),
    Case(
        name="zimage_wrong_trunk",
        model=zimage,
        make=partial(patched, sheet, partial(slope, "double_block")),
        base=sheet,
        modes=TRUNK,
        needs=LUMINA_PATCH,
        wrong=True,
        ranks=(2,),
    ),
    Case(
        name="flux_longer",
        model=flux,
        make=partial(patched, image, longer_keys),
        base=image,
        needs=FLUX_ATTN,
        raises="UnsupportedError",
    ),
    Case(
        name="wan_random_override",
        model=wan,
        make=partial(patched, video, draws),
        base=video,
        ranks=(2, 3),  # more ranks than heads: one without heads would not draw, and wait for the others
        raises="UnsupportedError",
    ),
    Case(
        name="flux_head_mask",
        model=flux,
        make=partial(image, attention_mask=head_mask()),
        base=image,
        raises="UnsupportedError",
    ),
)


def available() -> list[Case]:
    """The cases that this ComfyUI has."""
    found = []
    for case in CASES:
        if case.needs is None or case.needs[1] in inspect.getsource(importlib.import_module(case.needs[0])):
            found.append(case)
    return found


ALONE = {"wan_t2v": ("TORCH", "TORCH_MATH"), "wan_override": ("TORCH",), "flux": ("TORCH", "TORCH_MATH")}
"""Cases that also run on a mesh of one process, and the kernels they run with."""


def alone(prepared: list[tuple[Case, Any, torch.Tensor]]) -> dict[str, float]:
    """Errors on one process without torch.distributed: the engine must change nothing, or only the kernel."""
    results = {}
    with torch.no_grad():
        for case, model, reference in prepared:
            for attention in ALONE.get(case.name, ()):
                mesh = Mesh.single(ParallelConfig(world=1, attention=attention))
                installation = install(model, case.plan(type(model)), mesh)
                args, kwargs = case.inputs()
                out = installation.wrapper(model._forward, *args, **kwargs)
                installation.remove()
                results[f"{case.name}-{attention}"] = ((out - reference).abs().max() / reference.abs().max()).item()
    return results
