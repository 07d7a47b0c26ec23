"""Machines of a joined Ray cluster: which get a pool's workers, and whether they have what workers need."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...raylight.config import PoolConfig
from ...raylight.errors import ConfigError
from ..wire import node_facts
from ..wire.messages import HostEnvironment
from . import limits, placement, processes
from .ray_private import private

PACK_ROOT = Path(__file__).resolve().parents[2]
COUNTED = {"cpu": "CPU", "cuda": "GPU", "xpu": "GPU", "npu": "NPU"}
"""What Ray calls the devices of a torch device type."""
ROOM_WAIT_S = 15.0
"""How long Ray may take to count the devices of a pool that has just been closed as free."""
POLL_S = 0.1


@dataclass(frozen=True)
class Seat:
    """Where a rank is to run.

    Attributes:
        node: Ray's id of the machine, "" for that of a local Ray.
        threads: the rank's share of its cores, for a CPU worker.
    """

    node: str
    threads: int


Gather = Callable[..., list[Any]]
"""launch.gather."""


def seats(
    config: PoolConfig, environment: HostEnvironment, gather: Gather, interrupted: Callable[[], bool]
) -> list[Seat]:
    """The seats of all ranks on the cluster that Ray is connected to.

    Raises:
        ConfigError: there is no room, or a machine lacks what workers need; the message says which.
        WorkerError: the user cancelled, or a machine did not answer.
    """
    chosen = _choose(config, environment.device_type, interrupted)
    facts = _survey(list({node.id: node for node in chosen}.values()), environment.comfy_root, gather, interrupted)
    beside = {node.id: chosen.count(node) for node in chosen}
    return [Seat(node.id, max(1, int(facts[node.id]["cores"]) // beside[node.id])) for node in chosen]


def own_seats(world: int) -> list[Seat]:
    """Those of a Ray of our own: this machine's."""
    return [Seat("", max(1, processes.usable_cores() // world))] * world


def options(node: str) -> dict[str, Any]:
    """Of an actor or a task, to run on the machine of this id and nowhere else; none for "", a local Ray's."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)} if node else {}


def _choose(config: PoolConfig, device_type: str, interrupted: Callable[[], bool]) -> list[placement.Node]:
    here, world = ray.get_runtime_context().get_node_id(), config.parallel.world
    deadline = time.monotonic() + ROOM_WAIT_S
    while True:
        nodes = _nodes(device_type)
        if config.devices:  # they count the devices of this machine
            return [next(node for node in nodes if node.id == here)] * world
        chosen = placement.place(nodes, here, world)
        if chosen:
            return chosen
        if sum(node.total for node in nodes) < world or interrupted() or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if device_type == "cpu":  # cores can be shared
        limits.check_cpu_workers(world, sum(node.total for node in nodes))
        return [next(node for node in nodes if node.id == here)] * world
    raise ConfigError(
        f"The Ray cluster has no room for {world} workers",
        f"{COUNTED.get(device_type, device_type)} by machine: {', '.join(map(str, nodes))}",
        "Lower GPU, close what else uses the cluster, or add machines to it",
    )


def _nodes(device_type: str) -> list[placement.Node]:
    name = COUNTED.get(device_type, device_type)
    free = private("ray._private.state.available_resources_per_node", use="sees which machines are free")()
    return [
        placement.Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            free=int(free.get(node["NodeID"], {}).get(name, 0)),
            total=int(node["Resources"].get(name, 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _survey(
    nodes: Sequence[placement.Node], comfy_root: str, gather: Gather, interrupted: Callable[[], bool]
) -> dict[str, Mapping[str, str]]:
    """What each machine has.

    Raises:
        ConfigError: one lacks what this one has, or has another version of it.
    """
    ray.cloudpickle.register_pickle_by_value(node_facts)
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(node_facts.look)
        asked = [look.options(**options(node.id)).remote(comfy_root, str(PACK_ROOT)) for node in nodes]
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_facts)
    told = gather(asked, timeout=60.0, what="tell what their machines have", interrupted=interrupted)
    mine = node_facts.look(comfy_root, str(PACK_ROOT))
    places = {"ComfyUI": comfy_root, "Raylight": str(PACK_ROOT), "PyTorch": "Ray's Python"}
    differences = [
        f"{node.address} ({facts['host']}) has {name} {facts[name]}, here it is {mine[name]}"
        if facts[name]
        else f"{node.address} ({facts['host']}) has no {name} in {place}"
        for node, facts in zip(nodes, told, strict=True)
        for name, place in places.items()
        if facts[name] != mine[name]
    ]
    if differences:
        raise ConfigError(
            "The machines of the Ray cluster do not have what workers need",
            "; ".join(differences),
            "Have the same versions under the same paths on each of them, and start Ray there with that Python",
        )
    return {node.id: facts for node, facts in zip(nodes, told, strict=True)}
