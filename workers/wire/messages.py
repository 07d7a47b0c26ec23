"""What crosses between the driver and a worker: frozen dataclasses of plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ...raylight.config import ModelSpec, ParallelConfig, WorkerSettings
from ...raylight.cost import Machine
from ...raylight.errors import RaylightError
from .parcels import Parcel
from .said import Said

PREFIX = "diffusion_model."
"""Of the keys of weights and object patches of a diffusion model."""
OPTIONS = "transformer_options"
"""Name of the argument of a model that has what nodes put into it."""
PLAIN = (type(None), bool, int, float, str)
Kind = Literal["diffusion", "control", "encoder"]
"""What a model file holds: a diffusion model, a ControlNet, text encoders."""


@dataclass(frozen=True, kw_only=True)
class HostEnvironment:
    """What a worker must know of the ComfyUI process it belongs to.

    Attributes:
        comfy_root: directory ComfyUI is imported from.
        arguments: pickled `vars()` of ComfyUI's parsed command line; bytes, since unpickling some values
            imports ComfyUI, which must wait until the environment is right.
        folders: pickled `folder_paths.folder_names_and_paths` with the directories beside it.
        device_type: torch device type of the workers, "cpu" or an accelerator's.
    """

    comfy_root: str
    arguments: bytes
    folders: bytes
    device_type: str


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """Where a worker runs, as it says itself after `start`. `device_name` is alike for devices of one kind."""

    rank: int
    pid: int
    node: str
    host: str
    device: str
    device_name: str
    start_seconds: float


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the process groups of a pool meet.

    Attributes:
        file: on one machine, a file that only this user can open; "" for rank 0's store on `host` and `port`.
        timeout: seconds that a rank waits there, and in a collective.
    """

    timeout: float
    file: str = ""
    host: str = ""
    port: int = 0


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """Makes the process groups. `parallel` describes the whole pool.

    `readers` is the rank's index among those of its replica on its host, and their number: together they read
    a file once. `apart` says that the pool spans machines. `machine` has what was measured of the workers before.
    """

    parallel: ParallelConfig
    rank: int
    rendezvous: Rendezvous
    threads: int
    readers: tuple[int, int] = (0, 1)
    apart: bool = False
    machine: Machine | None = None


@dataclass(frozen=True, kw_only=True)
class Room:
    """A worker's device memory in bytes: free, and taken by models that can leave it. `uuid` is the device's."""

    free: int
    ours: int
    uuid: str


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """Loads a model.

    `dtype` names what plain ComfyUI would keep its weights in; the driver decides it, since it may depend on
    free memory. `kind` says what the file holds.
    """

    spec: ModelSpec
    dtype: str
    kind: Kind = "diffusion"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a worker says of a model it loaded.

    `bytes` is what the weights occupy on `device`, whose `uuid` is "" on a CPU. `weights` says where they are and
    what they take, `advice` what the user should change where they do not fit. `said` is what ComfyUI's code has
    warned of meanwhile.
    """

    family: str
    bytes: int
    device: str
    uuid: str
    weights: str = ""
    advice: str = ""
    said: tuple[Said, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What a worker holds of a model: bytes of its weights, of those on the device, number of patches, settings.

    `weights` says where they are between their uses, and what they take; `recorded` how many calls of it are;
    `warnings` how often ComfyUI's code has warned while it was loaded and given its patches; `plan` what was found of
    how to share it, "" where that is written.
    """

    path: str
    family: str
    size: int
    resident: int
    patches: int
    settings: WorkerSettings
    weights: str
    recorded: int
    warnings: int
    plan: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """A worker as it is now.

    Attributes:
        host_bytes: memory of its process that no other process shares.
        device_bytes: what its process has taken of its accelerator.
        timed: whether exchanges were told apart from computing; an accelerator has both queued, and does them at once.
        predicted: speed-up over one worker that raylight.cost predicts for the last call; 0 where it cannot say.
    """

    rank: int
    device: str
    host_bytes: int
    device_bytes: int
    models: tuple[ModelReport, ...]
    timed: bool
    predicted: float


@dataclass(frozen=True, kw_only=True)
class PatchRequest:
    """The weight and object patches of a model from now on.

    `state` names the patch state; the parcel holds `(patches, object_patches)`.
    """

    spec: ModelSpec
    state: str
    patches: Parcel
    force_cast: bool


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One model call.

    The parcel holds args and kwargs of the method, callables in them as FunctionRef, and a Wrapped or None. `random`
    holds the driver's generator states (CPU, then accelerator or None) where a patch may draw. `settings` says how
    to run it, `numerics` how the driver's torch sums products (nothing: as the worker's does).
    """

    spec: ModelSpec
    method: str
    call: Parcel
    random: tuple[Any, Any] | None = None
    settings: WorkerSettings = field(default_factory=WorkerSettings)
    numerics: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ForwardReply:
    """A worker's answer: `output` is None on all ranks but the first of those that share a sequence.

    `seconds` is the model's own time in the call, `waiting` the part of it inside collectives; on an
    accelerator, the time to queue its work. `advice` is what the user should know of it, "" for nothing. `waits`
    says that its device waits for Python, which a recorded call would not. `said` is what ComfyUI's code has warned of
    since the last answer, lines that are known of the model's patches apart, and what plans were found or dropped.
    """

    output: Parcel | None
    random: tuple[Any, Any] | None
    seconds: float
    waiting: float
    advice: str = ""
    waits: bool = False
    said: tuple[Said, ...] = ()


@dataclass(frozen=True)
class FunctionRef:
    """A callable the workers already hold, by number: its closure's state lives on between calls."""

    number: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Wrapped:
    """A node's function around a model call, which the workers run, with what ComfyUI gives to it.

    Attributes:
        function: a FunctionRef on its way.
        input, timestep: latent and noise levels, as the sampler has them.
        given: names of the other arguments, with the value (in a tuple) of those that are plain; transformer_options
            are those of the call.
        more: what else it is given.
    """

    function: Any
    input: torch.Tensor
    timestep: torch.Tensor
    given: Mapping[str, tuple[Any] | None]
    more: Mapping[str, Any]


def seen(given: Mapping[str, Any]) -> dict[str, tuple[Any] | None]:
    """The arguments of a model as Wrapped has them."""
    return {key: (value,) if isinstance(value, PLAIN) else None for key, value in given.items() if key != OPTIONS}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One verb of the runner. `id` is never used twice."""

    id: int
    verb: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a request: either `value`, or `failure`."""

    id: int
    value: Any = None
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a worker tells before its answer to request `id`: `done` of `total`."""

    id: int
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """What the driver tells while it waits for the answers to request `id`: end it. It has no answer of its own."""

    id: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A Python exception of a worker, as data.

    `error` is the exception itself where it is one of ours. `collectives` counts the collectives the
    rank had entered: equal counts on all ranks of a request mean that nobody waits for anybody. `links` are those of
    its Standing, `said` is what ForwardReply has.
    """

    kind: str
    message: str
    traceback: str
    collectives: int
    error: RaylightError | None = None
    links: tuple[str, ...] = ()
    said: tuple[Said, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a worker is, as a thread beside its work says it.

    Attributes:
        waits: for how many seconds it has been waiting for other ranks in a collective; 0 while it does not.
        links: addresses of machines that acknowledge nothing it sends any more.
    """

    waits: float = 0.0
    links: tuple[str, ...] = ()
