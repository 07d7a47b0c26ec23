"""What one forward of a model has to do: told from its modules, its plan and its latent's shape, before it runs.

An estimate: inputs that add tokens and are not known by then (sounds, poses, masks) are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from ..cost import Work
from ..plan import Plan, RowPlan
from ..sequence.slots import modules

Shape = Sequence[int]
PATCHES = {"AceStepConditionGenerationModel": 2, "Ideogram4Transformer2DModel": 1}
"""Positions of a latent's dim that become a token, of classes that have it elsewhere or mean something else by it."""
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
"""What models, or the first of their blocks, call the number of their attention's heads."""


def works(
    model: nn.Module, plan: Plan | RowPlan, shape: Shape, *, text: int = 0, others: Sequence[Shape] = ()
) -> tuple[Work, ...]:
    """The regions of a forward for one condition.

    Args:
        model: values of its weights are not looked at.
        shape: of the latent, [batch, channels, ...].
        text: tokens of the prompt.
        others: shapes of latents that come as tokens beside it.
    """
    itemsize = _itemsize(model)
    if isinstance(plan, RowPlan):
        return tuple(_maps(model, shape, itemsize))
    length = sum(tokens(model, each) for each in (shape, *others))
    found: list[Work] = []
    for region in plan.regions:
        for blocks in region.blocks:
            members = modules(model, blocks.at)
            if not members:  # some models have none of a kind
                continue
            first = members[0]
            joint = len({stream.over for stream in blocks.streams.values() if len(stream.over) == 1}) > 1
            long = joint or len(blocks.order) > 1 or (len(found) > 0 and found[-1].tokens > length)
            found.append(
                Work(
                    tokens=length + (text if long else 0),
                    width=_width(first),
                    blocks=len(members),
                    weights=float(sum(weight.numel() for weight in first.parameters() if weight.ndim == 2)),
                    batch=shape[0],
                    itemsize=itemsize,
                    heads=_heads(model, first),
                )
            )
    return tuple(found)


def most(model: nn.Module, plan: Plan | RowPlan, shape: Shape) -> int:
    """Ranks that can have a part of a forward: of its tokens, or of its strips of rows."""
    if isinstance(plan, RowPlan):
        return max(1, int(shape[2]) >> plan.halvings)
    return max(1, tokens(model, shape))


def tokens(model: nn.Module, shape: Shape) -> int:
    """How many tokens a latent becomes."""
    sizes = tuple(shape[2:])
    return math.prod(-(-size // patch) for size, patch in zip(sizes, _patch(model, len(sizes)), strict=True))


def _patch(model: nn.Module, dims: int) -> tuple[int, ...]:
    """How many positions become one token, along each dim of a latent."""
    found = getattr(model, "patch_size", getattr(model, "patch", None))
    found = PATCHES.get(type(model).__name__, found)
    spatial = getattr(model, "patch_spatial", found)
    time = getattr(model, "patch_temporal", getattr(model, "patch_size_t", None))
    if isinstance(spatial, int):
        found = (time if isinstance(time, int) else 1, spatial, spatial)
    if not isinstance(found, (tuple, list)) or not all(isinstance(size, int) and size > 0 for size in found):
        found = ()
    found = tuple(found)[-dims:] if dims else ()
    return (1,) * (dims - len(found)) + found


def _width(block: nn.Module) -> int:
    """Channels of a block's tokens: what most of its weights read."""
    reads: dict[int, int] = {}
    for weight in block.parameters():
        if weight.ndim == 2:
            reads[weight.shape[1]] = reads.get(weight.shape[1], 0) + weight.shape[0]
    return max(reads, key=lambda width: (reads[width], width), default=1)


def _heads(model: nn.Module, block: nn.Module) -> int:
    for owner in (model, block):
        for name in HEADS:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _itemsize(model: nn.Module) -> int:
    """Bytes per element of what it computes: quantised weights are computed in 16 bits."""
    sizes = [weight.element_size() for weight in model.parameters() if weight.ndim >= 2]
    return max(2, max(set(sizes), key=sizes.count)) if sizes else 2


def _maps(model: nn.Module, shape: Shape, itemsize: int) -> Iterator[Work]:
    """A UNet's: its convolutions and its attentions, by how often the picture was halved before."""
    level = 0
    for number, part in enumerate(_parts(model)):
        names = {type(module).__name__ for module in part.modules()}
        level += "Downsample" in names
        positions = math.prod(-(-size // (1 << level)) for size in shape[2:])
        convolutions = [weight.numel() for weight in part.parameters() if weight.ndim >= 4]
        if convolutions:
            yield Work(
                tokens=positions,
                width=0,
                blocks=len(convolutions),
                weights=sum(convolutions) / len(convolutions),
                batch=shape[0],
                itemsize=itemsize,
            )
        attending = [module for module in part.modules() if hasattr(module, "attn1")]
        if attending:
            first = attending[0]
            yield Work(
                tokens=positions,
                width=_width(first),
                blocks=len(attending),
                weights=float(sum(weight.numel() for weight in first.parameters() if weight.ndim == 2)),
                out=1,
                batch=shape[0],
                itemsize=itemsize,
                heads=_heads(first.get_submodule("attn1"), first),
            )
        level -= "Upsample" in names
        assert level >= 0, number


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    yield from model.get_submodule("input_blocks").children()
    yield model.get_submodule("middle_block")
    yield from model.get_submodule("output_blocks").children()
