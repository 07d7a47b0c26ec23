"""What sizing.py says of every case against what its blocks get: `python -m engine.sizes COMFYUI_ROOT RESULTS`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from comfy_raylight.patches.control import control_plan_for
from comfy_raylight.patches.registry import plan_for
from comfy_raylight.raylight import cost
from comfy_raylight.raylight.choice import sizing
from comfy_raylight.raylight.plan import Plan
from comfy_raylight.raylight.sequence.slots import Slot, modules

from .case import Case
from .families import CASES
from .ranks import enter_comfy, forward_of


def seen(case: Case) -> dict[str, Any] | None:
    """Tokens, width and count of the blocks of a case, as told and as they are; None where there are none to see."""
    model = case.build()
    plan = case.plan(model)
    if not isinstance(plan, Plan) or control_plan_for(model):
        return None
    args, kwargs = case.inputs()
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    text = args[2].shape[1] if len(args) > 2 and isinstance(args[2], torch.Tensor) and args[2].ndim == 3 else 0
    told = sizing.works(model, plan, first.shape, text=text)
    found: list[tuple[int, int] | None] = [None] * len(told)
    lists = [blocks for region in plan.regions for blocks in region.blocks if modules(model, blocks.at)]
    for number, blocks in enumerate(lists):
        block = modules(model, blocks.at)[0]

        def look(module: Any, args: Any, kwargs: Any, number: int = number, blocks: Any = blocks) -> None:
            lengths, width = {}, 0
            for name, stream in blocks.streams.items():
                value = Slot.need(module, name).read(args, kwargs)
                if isinstance(value, torch.Tensor) and len(stream.over) == 1:
                    lengths[stream.over[0]] = stream.segment(value).length
                    width = width or value.shape[-1]
            found[number] = found[number] or (sum(lengths.values()), width)

        block.register_forward_pre_hook(look, with_kwargs=True)
    forward_of(model)(*args, **kwargs)
    return {
        "tokens": [(work.tokens, one[0] if one else 0) for work, one in zip(told, found, strict=True)],
        "width": [(work.width, one[1] if one else 0) for work, one in zip(told, found, strict=True)],
        "family": case.family,
    }


def sdxl() -> dict[str, Any]:
    """SDXL's UNet, without weights, at 1024 x 1024."""
    sizes = dict(in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4])
    deep = dict(transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10)
    deep["transformer_depth_output"] = [0, 0, 0, 2, 2, 2, 10, 10, 10]
    rest = dict(context_dim=2048, num_classes="sequential", adm_in_channels=2816, use_linear_in_transformer=True)
    more = dict(image_size=32, num_heads=-1, num_head_channels=64, use_spatial_transformer=True, legacy=False)
    import comfy.ldm.modules.diffusionmodules.openaimodel as openai
    import comfy.ops

    with torch.device("meta"):
        model = openai.UNetModel(**sizes, **deep, **rest, **more, operations=comfy.ops.disable_weight_init)
    plan, shape = plan_for(model), (1, 4, 128, 128)
    works = sizing.works(model.half(), plan, shape)
    return {
        "attentions": sum(work.blocks for work in works if work.width),
        "sent": sum(cost.attention_bytes(work, ulysses=2, ring=1) for work in works),
        "flops": sum(work.linear_flops + work.attention_flops for work in works),
        "most": sizing.most(model, plan, shape),
    }


def main(root: str, result: str) -> int:
    """Write what is told and what is true of every case that this ComfyUI has."""
    enter_comfy(root)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    report: dict[str, Any] = {}
    with torch.inference_mode():
        for case in CASES:
            if case.wrong or case.raises or case.change or not case.available():
                continue
            try:
                found = seen(case)
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {error}", "family": case.family}
            if found is not None:
                report[case.name] = found
    Path(result).write_text(json.dumps({"cases": report, "sdxl": sdxl()}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
