"""Processes of the Ray of this process. A ComfyUI that other tests share runs below it too, with a Ray of its own."""

from __future__ import annotations

import psutil
from comfy_raylight.workers.pool.ray_keeper import NAME
from comfy_raylight.workers.pool.ray_watch import RayWatch


def of_ray(name: str) -> psutil.Process:
    """The keeper (`ray_keeper.NAME`), or one of those that Ray cannot be without."""
    own = RayWatch.own_at_hand()
    assert own is not None, "there is no Ray"
    return psutil.Process({NAME: own.keeper.pid, **own.processes}[name])
