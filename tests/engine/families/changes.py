"""Wrong plans for negative controls, made from right ones; of the right shapes, so that only the result shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy_raylight.raylight.cuts import Entry
from comfy_raylight.raylight.layout import Layout
from comfy_raylight.raylight.plan import Blocks, Plan, Region


def _each(plan: Plan, change: Callable[[Blocks], Blocks]) -> Plan:
    regions = [
        Region(
            *map(change, region.blocks),
            exit=region.exit,
            whole=region.whole,
            parts=region.parts,
            per_block=region.per_block,
        )
        for region in plan.regions
    ]
    return Plan(*regions, block_patches=plan.block_patches)


def as_first_rank(plan: Plan, name: str) -> Plan:
    """Every rank takes rank 0's part of a shared argument; the tokens must divide by the ranks."""

    def change(blocks: Blocks) -> Blocks:
        if name not in blocks.shared:
            return blocks
        entry = blocks.shared[name]

        def first(value: Any, layout: Layout) -> Any:
            return entry(value, replace(layout, rank=0))

        return replace(blocks, shared={**blocks.shared, name: first})

    return _each(plan, change)


def with_sites(plan: Plan, *sites: Any) -> Plan:
    """Other attention sites."""
    return _each(plan, lambda blocks: replace(blocks, attention=sites))


def with_shared(plan: Plan, name: str, entry: Entry) -> Plan:
    """Another entry for a shared argument."""
    return _each(plan, lambda blocks: replace(blocks, shared={**blocks.shared, name: entry}))


def without_whole(plan: Plan) -> Plan:
    """Modules that need all tokens get those of one rank."""
    regions = [
        Region(*region.blocks, exit=region.exit, parts=region.parts, per_block=region.per_block)
        for region in plan.regions
    ]
    return Plan(*regions, block_patches=plan.block_patches)


def sharpened(model: torch.nn.Module, *names: str) -> torch.nn.Module:
    """Norms of q and k near one, as trained ones are: with tiny ones attention is uniform, whatever the rope."""
    for name, weight in model.named_parameters():
        if name.endswith(names):
            weight.data.add_(1)
    return model
