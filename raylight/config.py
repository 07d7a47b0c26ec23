"""Frozen, validated settings: everything that crosses a function or a process as a value."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, LoadError
from .packing import RESIDENCIES

AXES = ("dp", "cfg", "ring", "ulysses")
"""Mesh axes from outermost to innermost: ulysses ranks are neighbours (design section 5)."""
COMPILERS = ("inductor", "cudagraphs")
"""What a user may choose to have Python out of a model's calls: a backend of torch.compile, or recorded calls."""
PREFETCHES = ("auto", "on", "off")
"""When the next block's weights are gathered while one computes; "auto" is where that pays."""
READERS = ("map", "private")
"""Ways to read a model file (see loaders.source)."""
MOST_WORKERS = 1024
"""More than any pool has room for: what is made for each worker, and looked through, is bounded by it."""
LOCAL = "local"
"""Address of a Ray of our own, in place of a cluster's."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the workers share one model call.

    `world` counts workers. All three degrees 0 means data parallel: every worker is a replica of its
    own. Otherwise their product must divide `world`; the rest becomes the `dp` axis.

    Attributes:
        overlap: turns in which Ulysses exchanges some heads while others compute; 0 chooses by what there is to
            compute, 1 exchanges all heads at once.
        residency: where the weights of a model's blocks are between their uses, one of RESIDENCIES. The ranks
            that share one sequence have parts of each block, since only they are sure to make the same calls.
        prefetch: one of PREFETCHES.
        speeds: relative speed of each worker, to which its part of tokens, heads and rows is in proportion; () where
            all are alike. They are measured, and no part of what a user chooses.

    Raises:
        ConfigError: the numbers do not fit; the message lists the nearest valid choices.
    """

    world: int
    ulysses: int = 0
    ring: int = 0
    cfg: int = 0
    sync_ulysses: bool = False
    overlap: int = 0
    attention: str = "TORCH"
    residency: str = "resident"
    prefetch: str = "auto"
    speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.speeds) in (0, self.world) and all(speed > 0 for speed in self.speeds), self.speeds
        assert self.residency in RESIDENCIES, self.residency
        assert self.prefetch in PREFETCHES, self.prefetch
        if self.world < 1:
            raise ConfigError("The pool needs at least one worker", f"GPU is {self.world}", "Set GPU to 1 or more")
        degrees = {"ulysses_degree": self.ulysses, "ring_degree": self.ring, "cfg_degree": self.cfg}
        for name, value in {"GPU": self.world, **degrees}.items():
            if value > MOST_WORKERS:
                raise ConfigError(
                    f"{name} is larger than any pool can be",
                    f"{reprlib.repr(value)}, and a pool has up to {MOST_WORKERS} workers",
                    "Set GPU to the number of devices, and the degrees so that their product divides it",
                )
        shown = ", ".join(f"{name}={value}" for name, value in degrees.items())
        if min(degrees.values()) < 0:
            raise ConfigError("A parallel degree is negative", shown, "Use 1 for an axis that is off")
        if any(degrees.values()) and not all(degrees.values()):
            raise ConfigError(
                "Some parallel degrees are 0 and some are not",
                shown,
                "Use 1 for an axis that is off, or 0 for all three to run data parallel",
            )
        product = self.ulysses * self.ring * self.cfg
        if product and self.world % product:
            divisors = [str(n) for n in range(1, self.world + 1) if self.world % n == 0]
            raise ConfigError(
                "The parallel degrees do not fit the number of workers",
                f"{shown} multiply to {product}, GPU is {self.world}",
                f"Make the product one of {', '.join(divisors)} (for example ulysses_degree={self.world}, "
                f"ring_degree=1, cfg_degree=1), or set GPU to a multiple of {product}",
            )
        if self.residency == "sharded" and self.sequence == 1:
            raise ConfigError(
                "FSDP divides weights over the workers that share one sequence, and each has one of its own here",
                f"{shown}, GPU is {self.world}",
                "Set ulysses_degree (or ring_degree) to 2 or more, or switch FSDP_CPU_OFFLOAD on: it streams the "
                "weights from host memory and works with any degrees",
            )

    @property
    def degrees(self) -> dict[str, int]:
        """Size of each mesh axis; the product is `world`."""
        inner = {"cfg": self.cfg or 1, "ring": self.ring or 1, "ulysses": self.ulysses or 1}
        return {"dp": self.world // (inner["cfg"] * inner["ring"] * inner["ulysses"]), **inner}

    @property
    def sequence(self) -> int:
        """P, the number of ranks that share one sequence."""
        return self.degrees["ring"] * self.degrees["ulysses"]

    @property
    def needs_plan(self) -> bool:
        """Whether a model must be one whose attention sites are known."""
        return self.sequence > 1 or self.attention != "TORCH"


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Which pool: equal values mean the same running pool.

    Attributes:
        parallel: how the workers share a call.
        address: Ray cluster to join, or LOCAL for one of our own.
        namespace: Ray namespace, used when a cluster is joined.
        devices: physical accelerator indices, one per worker; empty means the first ones. Not used on CPU.
        object_store_gb: Ray object store size in GiB for a local Ray; 0 means Ray's own small default here.
        dashboard: "host:port" of Ray's dashboard, or "" for none.
        rendezvous: "host" or "host:port" that rank 0's store listens on where workers are on several machines; "" means
            its machine's address and a free port.
        check_links: run one all-reduce per axis after the start and log bandwidth.
        reader: how workers read model files, one of READERS.
        models_kept: models that stay mapped in the workers although no workflow uses them any more, at most,
            together with those in use.
    """

    parallel: ParallelConfig
    address: str = LOCAL
    namespace: str = "default"
    devices: tuple[int, ...] = ()
    object_store_gb: float = 0.0
    dashboard: str = ""
    rendezvous: str = ""
    check_links: bool = False
    reader: str = "map"
    models_kept: int = 2

    def __post_init__(self) -> None:
        if self.devices and len(set(self.devices)) != len(self.devices):
            raise ConfigError("gpu_indices names a device twice", reprlib.repr(list(self.devices)))
        if self.devices and len(self.devices) < self.parallel.world:
            raise ConfigError(
                "gpu_indices names fewer devices than there are workers",
                f"{reprlib.repr(list(self.devices))} for GPU={self.parallel.world}",
                "Name one device per worker, or leave gpu_indices empty",
            )
        if any(index < 0 for index in self.devices):
            raise ConfigError("gpu_indices holds a negative number", reprlib.repr(list(self.devices)))
        # a NaN would besides equal no running pool
        if not (math.isfinite(self.object_store_gb) and self.object_store_gb >= 0):
            raise ConfigError("ray_object_store_gb is no size", str(self.object_store_gb), "Use 0 for a small one")
        if self.models_kept < 1:
            raise ConfigError("mmap_cache_size is below 1", str(self.models_kept), "Use 1 or more")
        assert self.reader in READERS

    @property
    def local(self) -> bool:
        """Whether its Ray is one of our own, on this machine."""
        return self.address == LOCAL


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Content key of a model file plus the options it is loaded with: equal specs are one loaded model.

    `size` is in bytes, `mtime_ns` in nanoseconds since the epoch. `dtype` and `options` mean what
    ComfyUI's UNETLoader means by `weight_dtype`: a torch dtype name or "", and the names of boolean
    model options to switch on. `reader` is one of READERS. `dequant_dtype` and `patch_dtype` are for GGUF
    files: the torch dtype, or "" for the computation's, that weights are rounded to after they are
    dequantised, and that patches to them are computed in (float32 where ""). `others` are the other files of a model
    in parts, each with its path, size, mtime_ns and inode; what makes such a spec is `loaders.parts.spec_of`.
    `shapes` are those of tensors that a file has in other dims than the model, by name (see workers/mapping/shapes.py).
    `encoder` is the type by which ComfyUI knows text encoders ("flux"), "" for another model: each file is then an
    encoder, or a part that goes with one, and no tensor of one file is another's.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int
    dtype: str = ""
    options: tuple[str, ...] = ()
    reader: str = "map"
    dequant_dtype: str = ""
    patch_dtype: str = ""
    others: tuple[tuple[str, int, int, int], ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    encoder: str = ""

    @classmethod
    def of(
        cls, path: str | os.PathLike[str], *, others: Sequence[str | os.PathLike[str]] = (), **options: Any
    ) -> ModelSpec:
        """Describe the file as it is now.

        Args:
            others: paths of the model's other files.
            options: the other fields.

        Raises:
            LoadError: a file does not exist or cannot be read.
        """
        real, size, mtime_ns, inode = _stamp(path)
        stamps = tuple(map(_stamp, others))
        return cls(path=real, size=size, mtime_ns=mtime_ns, inode=inode, others=stamps, **options)

    @property
    def paths(self) -> tuple[str, ...]:
        """All files of the model."""
        return (self.path, *(path for path, *_ in self.others))

    def now(self) -> ModelSpec:
        """The same file with the same options as it is now: equal to this one unless the file changed.

        Raises:
            LoadError: the file does not exist any more, or cannot be read.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("path", "size", "mtime_ns", "inode", "others"):
            del fields[name]
        first, *others = self.paths
        return ModelSpec.of(first, others=others, **fields)


def _stamp(path: str | os.PathLike[str]) -> tuple[str, int, int, int]:
    real = Path(path).resolve()
    try:
        stat = real.stat()
    except OSError as error:
        raise LoadError(
            f"The model file {real} cannot be read", str(error), "Check the file name and its permissions"
        ) from error
    if not real.is_file():
        raise LoadError(f"{real} is not a file", "", "Choose a model file")
    return (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How workers run a model, beyond what its weights and patches say; equal settings change nothing.

    Attributes:
        ffn_chunks: stretches of tokens that feed-forward layers take one after another; 1 is all at once.
        compile: one of COMPILERS; "" is none.
    """

    ffn_chunks: int = 1
    compile: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.ffn_chunks <= 64:
            raise ConfigError("ffn_chunks is out of range", str(self.ffn_chunks), "Use 1 (off) to 64")
        if self.compile and self.compile not in COMPILERS:
            raise ConfigError("There is no such compiler", self.compile, f"Use one of {', '.join(COMPILERS)}")
