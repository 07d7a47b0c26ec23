"""The weights of a model's blocks, in parts: one rank's share of them, opened on a device and closed again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ....loaders.residency import Leaf, PackedBlock, Shards, Streams, from_map, pack
from ....loaders.source import Source
from ....loaders.staging import Engine, Piece, engine_for, upload
from ....raylight.comm import Comm
from ....raylight.errors import ConfigError
from ....raylight.mesh import Mesh
from ....raylight.packing import Footprint, footprint, gigabytes
from ....raylight.residency import Rotation
from ...mapping.adopt import Home, is_layer, parts
from ...mapping.loading import normal_tensors
from .patched_block import PatchedBlock, set_data

SMALL_BYTES = 64 << 20
"""On a CPU, gathering takes the cores that compute: ahead of use it pays up to blocks of about this size."""


def divide(
    model: nn.Module, homes: Mapping[str, Home], source: Source, mesh: Mesh, *, device: torch.device
) -> BlockWeights:
    """The blocks of a model as the pool divides them.

    Raises:
        ConfigError: that would take more memory than weights that are resident.
    """
    residency, prefetch = mesh.parallel.residency, mesh.parallel.prefetch
    comm = mesh.axis("weights")
    blocks = BlockWeights(model, homes, source, comm, residency=residency, prefetch=prefetch, device=device)
    divided, whole = blocks.footprint(0), blocks.footprint(0, residency="resident")
    if divided.total >= whole.total:
        switch = "FSDP_CPU_OFFLOAD" if residency == "streamed" else "FSDP"
        raise ConfigError(
            f"{switch} would take more memory than it frees for {os.path.basename(source.path)}",
            f"its {blocks.count} blocks have {gigabytes(whole.total)}, the largest {gigabytes(blocks.largest)}; "
            f"divided over {comm.size} workers they would take {gigabytes(divided.shards)} of parts and "
            f"{gigabytes(divided.buffers)} of buffers on each",
            f"Switch {switch} off",
        )
    return blocks


class BlockWeights:
    """The blocks of one model whose weights are divided over ranks. Use it outside of inference mode.

    While it is closed the weights are at home, in the file's map; while it is open they are placeholders, and views
    of gathered bytes while their block runs inside of `rotation.call`.

    Args:
        model: the diffusion model.
        homes: where its parameters live, by their keys.
        comm: the ranks that have parts of them.
        residency: "sharded" or "streamed". Streamed weights that are patched as they are used have the patch in a
            function of ComfyUI's layers, so those of other modules, which are small, stay whole.
        prefetch: one of config.PREFETCHES.

    Attributes:
        modules: those whose weights are in parts.
        keys: of the weights in each block.
    """

    def __init__(
        self,
        model: nn.Module,
        homes: Mapping[str, Home],
        source: Source,
        comm: Comm,
        *,
        residency: str,
        prefetch: str,
        device: torch.device,
    ) -> None:
        self.residency = residency
        self._homes = homes
        self._source = source
        self._comm = comm
        self._device = device
        self._engine: Engine | None = None
        by_place = {(home.module, home.name): key for key, home in homes.items()}
        chosen: dict[int, str] = {}

        def leaf(module: nn.Module, name: str, parameter: nn.Parameter) -> Leaf | None:
            key = by_place.get((module, name))
            found = self._leaf(homes[key]) if key is not None else None
            if key is not None and found is not None:
                chosen[id(found)] = key
            return found

        self._blocks = pack(model, leaf, ranks=comm.size, device=device)
        self.keys = [[chosen[id(leaf)] for leaf in block.leaves] for block in self._blocks]
        self._plain = list(self._blocks)
        self.modules = {homes[key].module for keys in self.keys for key in keys}
        self.rotation = Rotation(comm, len(self._blocks))
        self._parts: Shards | Streams | None = None
        self._changed: dict[int, set[str]] = {}
        self.prefetch = self._prefetches(prefetch)

    @property
    def sharing(self) -> Comm:
        """The ranks that have parts of them."""
        return self._comm

    @property
    def inside(self) -> set[str]:
        """Keys of all weights that are in parts."""
        return {key for keys in self.keys for key in keys}

    def footprint(self, outside: int, *, residency: str = "") -> Footprint:
        """Bytes of a rank's weights while it is open, beside `outside` bytes that it holds whole."""
        packings = [block.packing for block in self._blocks]
        return footprint(residency or self.residency, packings, outside=outside, prefetch=self.prefetch)

    @property
    def largest(self) -> int:
        """Bytes of the largest block; 0 where there is none."""
        return max((block.packing.total for block in self._blocks), default=0)

    @property
    def count(self) -> int:
        """Blocks."""
        return len(self._blocks)

    @property
    def bytes(self) -> int:
        """What its own memory occupies now."""
        return self.rotation.bytes + (self._parts.bytes if self._parts is not None else 0)

    def open(self) -> None:
        """Take this rank's parts of the file; does nothing where it is open.

        Raises:
            torch.OutOfMemoryError: no room. It is closed then.
        """
        if self.rotation.opened:
            return
        kind: Any = Shards if self.residency == "sharded" else Streams
        more = {"ahead": self.prefetch} if self.residency == "streamed" else {}
        try:
            self._parts = kind(self._blocks, self._comm.rank, self._read, self._device, **more)
            for block, keys in zip(self._blocks, self.keys, strict=True):
                self._at_device(keys)
                block.release()  # before the next: quantised ones come whole, for their scales
            self.rotation.open(self._blocks, self._parts, self._device, prefetch=self.prefetch)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Weights are the map again, and nothing is held."""
        if self._parts is None:
            return
        self.rotation.close()
        self._parts.close()
        self._parts = None
        self._blocks[:] = self._plain
        self._changed.clear()
        for key in self.inside:
            self._homes[key].put(self._homes[key].tensor)

    def change(self, number: int, patched: Iterable[str]) -> None:
        """Take over what some parameters of a block are now, whole and on the device; the others come from the file.

        Only where parts are kept.

        Args:
            patched: keys of those parameters.
        """
        assert isinstance(self._parts, Shards)
        patched = set(patched)
        values = {index: key for index, key in enumerate(self.keys[number]) if key in patched}
        changed = {index: parts(self._homes[key].parameter)[0].detach() for index, key in values.items()}
        leaves = list(self._plain[number].leaves)
        for index, tensor in changed.items():
            leaves[index] = replace(leaves[index], dtype=tensor.dtype, shape=tensor.shape)
        block = self._plain[number]
        if changed:
            block = PackedBlock(block.name, block.module, leaves, ranks=self._comm.size, device=self._device)
        self._parts.write(number, block, changed)
        self._blocks[number] = block
        before = self._changed.get(number, set())
        modules = {self._homes[key].module for key in before | patched}
        self._changed[number] = patched
        self._at_device([key for key in self.keys[number] if self._homes[key].module in modules and key not in patched])
        block.release()
        self.rotation.resize()

    def patch_when_gathered(self, number: int, keys: Iterable[str], patch: Callable[[str], None]) -> None:
        """Have some weights of a block patched whenever it is gathered; all others are as in the file from now on.

        Only where parts are streamed.

        Args:
            patch: makes a parameter, by its key, the patched one, of the same dtype.
        """
        assert isinstance(self._parts, Streams)
        homes = {key: self._homes[key] for key in keys}
        plain = self._plain[number]
        self._blocks[number] = (
            PatchedBlock(plain, homes, patch, ranks=self._comm.size, device=self._device) if homes else plain
        )
        self._blocks[number].release()  # to the placeholders that it is known by

    def _at_device(self, keys: Sequence[str]) -> None:
        """Parameters that placeholders and views can be put into: on the device, their scales as in the file."""
        for key in keys:
            home = self._homes[key]
            if len(parts(home.tensor)) > 1:
                home.put(home.tensor.to(device=self._device))
            elif self._device.type != "cpu":
                empty = torch.empty((), dtype=home.dtype or home.tensor.dtype, device=self._device)
                home.put(empty.expand(home.tensor.shape))
            else:
                home.put(home.tensor)

    def _leaf(self, home: Home) -> Leaf | None:
        tensor = parts(home.tensor)[0]
        takes_functions = is_layer(home.module)
        if not tensor.is_contiguous() or (self.residency == "streamed" and not takes_functions):
            return None

        def put(value: torch.Tensor) -> None:
            set_data(home.parameter, value)  # patches and moves replace it

        converted = self._device.type != "cpu" and len(parts(home.tensor)) == 1
        return Leaf(tensor, (home.dtype if converted else None) or tensor.dtype, put, tensor.shape)

    def _prefetches(self, prefetch: str) -> bool:
        if prefetch != "auto":
            return prefetch == "on"
        packings = [block.packing for block in self._blocks]
        whole = footprint("resident", packings, outside=0, prefetch=True).total
        worth = packings and footprint(self.residency, packings, outside=0, prefetch=True).total < whole
        return bool(worth) and (self._device.type != "cpu" or self.largest <= SMALL_BYTES)

    def _read(self, slices: Sequence[tuple[torch.Tensor, torch.dtype]]) -> Iterable[torch.Tensor]:
        if self._device.type == "cpu":
            return from_map(slices)
        if self._engine is None:
            self._engine = engine_for(self._device)
        with normal_tensors():
            pieces = [Piece(flat, self._source.offset(flat), dtype) for flat, dtype in slices]
        return upload(self._source, pieces, self._engine)
