"""Where cases run: grids of ranks by name, and which of them a case takes."""

from __future__ import annotations

import zlib

from comfy_raylight.tests.host.large import LARGE

from .case import Case
from .families import even

MESHES: dict[str, tuple[int, int]] = {
    "u2": (2, 1),
    "u3": (3, 1),
    "u5": (5, 1),
    "u8": (8, 1),
    "r2": (1, 2),
    "r3": (1, 3),
    "u2r2": (2, 2),
    "u4r2": (4, 2),
}
"""Ulysses and ring degrees by name; a case's `meshes` are some of these."""
ALWAYS = ("u2",)
"""Whether every case runs on all of its meshes; by default on ALWAYS, and on one of the others by its name."""
ALONE = {"wan_t2v": ("TORCH", "TORCH_MATH"), "wan_override": ("TORCH",), "flux": ("TORCH", "TORCH_MATH")}
"""Cases that also run on a mesh of one process, and the kernels they run with."""


def meshes_of(case: Case) -> tuple[str, ...]:
    """The meshes that a case runs on."""
    if not (case.every or LARGE):
        return ()
    found = case.meshes or tuple(MESHES)
    others = [name for name in found if name not in ALWAYS]
    if LARGE or case.all_meshes or case in even.CASES or not others:
        return found
    one = others[zlib.crc32(case.name.encode()) % len(others)]
    return tuple(name for name in found if name in (*ALWAYS, one))
