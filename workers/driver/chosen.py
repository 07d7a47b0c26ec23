"""A place that is chosen anew before each run: how many cards, how they share, and where the weights are."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy import model_management

from ...patches.registry import ASKING, FAMILIES, plan_for
from ...raylight.blocks import blocks
from ...raylight.choice import choose, sizing
from ...raylight.choice.choose import Choice, Layout, Situation
from ...raylight.config import ModelSpec, PoolConfig
from ...raylight.errors import ConfigError, PlanError, UnsupportedError
from ...raylight.names import functions, name_of
from ...raylight.plan import Plan, RowPlan
from ..mapping.adopt import parts
from ..pool.pool import HISTORY, Pool
from ..wire import random_states
from ..wire.comfy_host import device_uuid
from .model_rpc import DRIVER_ONLY, interruptible
from .place import Place

if TYPE_CHECKING:
    from ..wire.messages import Room
    from .remote import RemotePatcher

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a sampling run before it begins.

    Attributes:
        shape: of the latent.
        others: shapes of latents that come beside it.
        conditions: entries in each list that a step evaluates.
        text: tokens of the longest prompt.
    """

    shape: tuple[int, ...]
    steps: int
    conditions: tuple[int, ...] = (1,)
    text: int = 0
    others: tuple[tuple[int, ...], ...] = ()


class Chosen(Place):
    """A pool of some of the cards, by what a run is like.

    What was chosen last for the same cards holds for all models on them: those that a workflow merges, or samples
    together, and ControlNets are on one pool.

    Args:
        base: all cards, each of them by itself.
        goal: one of choose.GOALS.
    """

    chooses = True

    def __init__(self, base: PoolConfig, goal: str) -> None:
        super().__init__(base)
        self._goal = goal
        self._model: Any = None
        self._spec: ModelSpec | None = None
        self._plan: Plan | RowPlan | None = None
        self._factor = 0.0
        self._refused: set[tuple[Any, ...]] = set()

    @property
    def count(self) -> int:
        """Cards."""
        return self._config.parallel.world

    @property
    def config(self) -> PoolConfig:
        return self._last[0]

    @property
    def replica(self) -> int:
        return self._last[1]

    @property
    def _last(self) -> tuple[PoolConfig, int]:
        return HISTORY.chosen.get(self._config, (self._config, 0))

    def prepare(self, model: Any, spec: ModelSpec) -> None:
        """The model is about to be loaded; how the pool shares now, for another one, may be impossible for it."""
        self._model, self._spec = model, spec
        with contextlib.suppress(UnsupportedError):  # it cannot share a forward: a choice says so
            self._plan = plan_for(model.diffusion_model)
        parallel = self.config.parallel
        if parallel.residency != "resident" or (parallel.needs_plan and self._plan is None):
            HISTORY.chosen.pop(self._config, None)

    def wrappers(self) -> Mapping[str, Callable[..., Any]]:
        return {__name__: self._around}

    def choose(self, patcher: RemotePatcher, run: Run) -> Choice:
        """Decide how a run is shared, and have the pool be so from its next call on."""
        situation = self._situation(patcher, run)
        if self._kind(patcher) in self._refused:
            situation = dataclasses.replace(situation, most=1, conditions=(sum(run.conditions),))
        choice = choose.choose(situation)
        self._go(patcher, choice.layout)
        told = f"{os.path.basename(patcher.rpc.spec.path)} runs on {choice}"
        if told != self.told:
            log.info("%s", told)
        self.told = told
        return choice

    def _around(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ComfyUI's sampling: where workers refuse a run because of how they share it, one card does it.

        Nothing of the run is kept: it begins again with the same noise and the same generators. That is right as long
        as no model call has come back, of which nodes might have remembered something; after one the error is raised,
        and the next run is not shared.
        """
        guider = executor.class_obj
        patcher: RemotePatcher = guider.model_patcher
        choice = self.choose(patcher, run_of(guider, args, kwargs))
        if len(choice.layout.cards) == 1:
            return executor(*args, **kwargs)
        before, answered = random_states.keep(), patcher.rpc.answered
        conds = {name: [dict(each) for each in found] for name, found in guider.conds.items()}
        kept = [value.clone() if isinstance(value, torch.Tensor) else value for value in args[:2]]
        try:
            return executor(*args, **kwargs)
        except (UnsupportedError, ConfigError) as error:
            self._refused.add(self._kind(patcher))
            if patcher.rpc.answered != answered:
                raise
            whole = choice.layout.residency == "resident"
            alone = Layout(
                world=self.count, cards=choice.layout.cards[:1], residency="resident" if whole else "streamed"
            )
            self._go(patcher, alone)
            self.told = f"{os.path.basename(patcher.rpc.spec.path)} runs on {alone}: it cannot be shared. {error.what}"
            log.info("%s", self.told)
            before()
            guider.conds = conds
            return executor(*kept, *args[2:], **kwargs)

    def _situation(self, patcher: RemotePatcher, run: Run) -> Situation:
        rpc = patcher.rpc
        lanes = rpc.lanes()  # which starts the pool where needed
        pool = lanes.pool
        with interruptible():
            machine = pool.measured()
            rooms: list[Room] = lanes.call_groups("room", [(range(len(pool.members)), ())])[0]
        present = self._present(pool)
        works, most = self._works(run)
        blocks, outside = self._sizes()
        if not works:
            blocks, outside = (), sum(blocks) + outside
        return Situation(
            count=self.count,
            machine=machine,
            works=works,
            most=most,
            rings=isinstance(self._plan, Plan) and not self._limited,
            conditions=run.conditions,
            steps=run.steps,
            blocks=blocks,
            outside=outside,
            activations=self._activations(patcher, run),
            parts=bool(self._config.devices) or pool.device_type == "cpu",
            records=self._records(patcher, pool),
            free=() if pool.device_type == "cpu" else self._free(rooms, present, patcher),
            present=present,
            loaded=rpc.resident,
            goal=self._goal,
        )

    def _sizes(self) -> tuple[tuple[int, ...], int]:
        """Bytes of the weights of each block, and of all others."""
        model = self._model.diffusion_model
        sizes = [sum(map(_nbytes, block.parameters())) for block in dict.fromkeys(blocks(model))]
        whole = sum(map(_nbytes, model.parameters()))
        part = 1.0
        assert self._spec is not None
        if self._spec.path.lower().endswith(".gguf") and whole:  # whose quantised weights are shown in 16 bits
            stored = self._spec.size + sum(size for _, size, _, _ in self._spec.others)
            part = min(1.0, stored / whole)
        return tuple(int(size * part) for size in sizes), int(max(0, whole - sum(sizes)) * part)

    def _kind(self, patcher: RemotePatcher) -> tuple[Any, ...]:
        """What nodes have put into a model, by which workers may refuse to share it."""
        options = patcher.model_options.get("transformer_options", {})
        return patcher.patches_uuid, *map(name_of, functions(options)), *patcher.object_patches

    @property
    def _limited(self) -> bool:
        """Whether every worker computes all of the attention."""
        family = FAMILIES.get(type(self._model.diffusion_model).__name__)
        return bool(family and family.limit)

    def _works(self, run: Run) -> tuple[tuple[Any, ...], int]:
        """What a forward has to do, and the ranks that may share it; nothing and one where that is not known."""
        model = self._model.diffusion_model
        if self._plan is None:
            return (), 1
        try:
            works = sizing.works(model, self._plan, run.shape, text=run.text, others=run.others)
        except PlanError as error:  # the workers would say the same
            log.info("%s", error)
            return (), 1
        if self._limited:  # as if there were one head, which one rank has
            works = tuple(dataclasses.replace(work, heads=1) for work in works)
        return works, sizing.most(model, self._plan, run.shape)

    def _activations(self, patcher: RemotePatcher, run: Run) -> int:
        """Bytes of a call on one card, by ComfyUI's own estimate, which workers go by; shared calls take less."""
        base = patcher.model
        self._factor = self._factor or base.memory_usage_factor
        base.memory_usage_factor = self._factor
        return int(max(base.memory_required(list(run.shape)), model_management.minimum_inference_memory()))

    def _records(self, patcher: RemotePatcher, pool: Pool) -> bool:
        options = patcher.model_options.get("transformer_options", {})
        inside = list(functions({name: value for name, value in options.items() if name not in DRIVER_ONLY}))
        family = type(self._model.diffusion_model).__name__
        nvidia = pool.device_type == "cuda" and bool(model_management.is_nvidia())
        return nvidia and not inside and not patcher.object_patches and family not in ASKING

    def _present(self, pool: Pool) -> Layout:
        parallel = pool.config.parallel
        degrees = parallel.degrees
        size = degrees["cfg"] * parallel.sequence
        cards = tuple(range(self.replica * size, (self.replica + 1) * size))
        if parallel.world < self.count and self._config.devices:
            cards = tuple(map(self._config.devices.index, pool.config.devices))
        return Layout(
            world=parallel.world,
            cards=cards,
            cfg=degrees["cfg"],
            ulysses=degrees["ulysses"],
            ring=degrees["ring"],
            residency=parallel.residency,
        )

    def _free(self, rooms: Sequence[Room], present: Layout, patcher: RemotePatcher) -> tuple[int, ...]:
        """Bytes of each card that the model may have: what is free, and what models take there that can leave."""
        mine = device_uuid(patcher.load_device)
        own = sum(
            int(loaded.model_loaded_memory())
            for loaded in model_management.current_loaded_models
            if loaded.model is not None and not isinstance(loaded.model, type(patcher))
        )
        found = [room.free + room.ours + (own if room.uuid and room.uuid == mine else 0) for room in rooms]
        where = range(self.count) if present.world == self.count else present.cards
        known = dict(zip(where, found, strict=True))
        return tuple(known.get(card, min(found)) for card in range(self.count))  # without a worker nobody knows

    def _go(self, patcher: RemotePatcher, layout: Layout) -> None:
        """Have the pool be of this layout from the next call on."""
        parallel = dataclasses.replace(
            self._config.parallel,
            world=layout.world,
            cfg=layout.cfg,
            ulysses=layout.ulysses,
            ring=layout.ring,
            residency=layout.residency,
        )
        devices, replica = self._config.devices, layout.cards[0] // len(layout.cards)
        if layout.world < self.count:
            devices, replica = tuple(devices[card] for card in layout.cards) if devices else (), 0
        HISTORY.chosen[self._config] = (dataclasses.replace(self._config, parallel=parallel, devices=devices), replica)
        # each rank holds one part of every activation
        patcher.model.memory_usage_factor = self._factor / layout.sequence


def run_of(guider: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Run:
    """What is known of a run from a guider of ComfyUI and the arguments of its outer_sample."""
    named = dict(zip(("noise", "latent_image", "sampler", "sigmas"), args, strict=False)) | dict(kwargs)
    shapes = named.get("latent_shapes") or [named["noise"].shape]
    lists = {name: found for name, found in guider.conds.items() if found}
    one = math.isclose(getattr(guider, "cfg", 0.0), 1.0) and not guider.model_options.get("disable_cfg1_optimization")
    if one and set(lists) == {"positive", "negative"}:
        del lists["negative"]
    entries = [entry for found in lists.values() for entry in found]
    texts = [entry["cross_attn"] for entry in entries if isinstance(entry.get("cross_attn"), torch.Tensor)]
    beside = [latent for entry in entries[:1] for latent in entry.get("reference_latents") or ()]
    return Run(
        shape=tuple(shapes[0]),
        steps=max(1, len(named["sigmas"]) - 1),
        conditions=tuple(len(found) for found in lists.values()) or (1,),
        text=max((text.shape[1] for text in texts if text.ndim == 3), default=0),
        others=tuple(tuple(latent.shape) for latent in beside if isinstance(latent, torch.Tensor)),
    )


def _nbytes(parameter: torch.Tensor) -> int:
    return sum(part.nbytes for part in parts(parameter))
