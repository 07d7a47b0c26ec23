"""ComfyUI's patcher over a model whose blocks' weights are divided over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import torch

from ...mapping.adopt import Home, is_layer
from ...mapping.gguf_ops import BlockPatch
from ...mapping.mapped_patcher import Backup, MappedPatcher, functions_of, is_blocks, outside_inference, same_patches
from .block_weights import BlockWeights

BLOCKS = "raylight_blocks"


class Divided:
    """What the clones of a patcher share of the blocks.

    Attributes:
        blocks: their weights.
        homes: where those live on the host, by key.
        applied: the patches that are in each block, by its number.
    """

    def __init__(self, blocks: BlockWeights, homes: Mapping[str, Home]) -> None:
        self.blocks = blocks
        self.homes = homes
        self.applied: dict[int, dict[str, list[Any]]] = {}

    def on_model_patcher_clone(self) -> Divided:
        return self


class BlockPatcher(MappedPatcher):
    """Opens and closes the blocks where ComfyUI loads and unloads; what it moves and patches itself is the rest."""

    @property
    def divided(self) -> Divided:
        found: Divided = self.attachments[BLOCKS]
        return found

    def model_size(self) -> int:
        """Bytes on the device."""
        if BLOCKS not in self.attachments:
            return int(super().model_size())
        return self.divided.blocks.footprint(super().model_size()).total

    @outside_inference
    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's, with the blocks opened first: it sees placeholders on the device, where they stay."""
        blocks = self.divided.blocks
        blocks.open()
        result = super().load(device_to, *args, **kwargs)
        for module in blocks.modules:
            _force_cast(module, self.force_cast_weights)
        self._patch_inside()
        self._count(kwargs.get("full_load", False))
        return result

    @outside_inference
    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        """ComfyUI's; blocks are closed before it would move placeholders, which would become full size."""
        if unpatch_weights and BLOCKS in self.attachments:
            self.divided.blocks.close()
            for number in list(self.divided.applied):
                self._take_branches(number)
            self.divided.applied.clear()
        return super().unpatch_model(device_to, unpatch_weights)

    def _load_list(self, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's list of modules to load, unload and patch, without those that come and go in parts."""
        modules = self.divided.blocks.modules
        return [entry for entry in super()._load_list(*args, **kwargs) if not modules.intersection(_modules(entry))]

    def _switch(self, device: Any) -> None:
        super()._switch(device)
        before = self.divided.blocks.bytes
        self._patch_inside()
        self.model.model_loaded_weight_memory += self.divided.blocks.bytes - before

    def _count(self, everything: bool) -> None:
        """ComfyUI has counted what it loaded by itself, or all of it."""
        if everything:
            self.model.model_loaded_weight_memory = self.model_size()
        else:
            self.model.model_loaded_weight_memory += self.divided.blocks.bytes

    def _patch_inside(self) -> None:
        """Bring the patches of the blocks' weights to this patcher's."""
        divided = self.divided
        # ComfyUI leaves parameters of modules that have others inside as they are
        every = comfy.model_patcher.ModelPatcher._load_list(self)
        reached = {f"{name}.{parameter}" for *_, name, _, names in every for parameter in names}
        for number, keys in enumerate(divided.blocks.keys):
            wanted = {key: list(self.patches[key]) for key in keys if key in self.patches and key in reached}
            applied = divided.applied.get(number, {})
            if wanted.keys() != applied.keys() or not all(same_patches(applied[key], wanted[key]) for key in wanted):
                self._patch_block(number, wanted)
                divided.applied[number] = wanted

    def _patch_block(self, number: int, wanted: Mapping[str, list[Any]]) -> None:
        divided = self.divided
        self._take_branches(number)
        for key in filter(self._is_branch, wanted):
            patch = BlockPatch(key, self.patches[key], self.weights.patch_dtype)
            functions_of(divided.homes[key]).append(patch)
        merged = {key for key in wanted if not self._is_branch(key)}
        if merged or any(not self._is_branch(key) for key in divided.applied.get(number, {})):
            if divided.blocks.residency == "streamed":
                divided.blocks.patch_when_gathered(number, merged, self._patch_here)
            else:
                self._merge(number, merged)

    def _take_branches(self, number: int) -> None:
        for key in filter(self._is_branch, self.divided.applied.get(number, {})):
            functions_of(self.divided.homes[key]).clear()

    def _is_branch(self, key: str) -> bool:
        """Whether patches are added where a layer uses the weight: a patched one would be another type than it is.

        That is so of GGUF's blocks, and of a file that a CPU computes in a wider dtype: resident, the sum is that.
        """
        home = self.divided.homes[key]
        wider = self.load_device.type == "cpu" and home.dtype not in (None, home.tensor.dtype)
        return is_blocks(home) or (wider and self.divided.blocks.residency == "streamed")

    def _merge(self, number: int, keys: set[str]) -> None:
        """Patch weights of a block as ComfyUI does, each whole, and keep this rank's part of them."""
        homes = {key: self.divided.homes[key] for key in self.divided.blocks.keys[number]}
        modules = {homes[key].module for key in keys}
        for home in homes.values():
            if home.module in modules:  # beside a weight, its scale
                home.put(self._native(home, self.load_device))
        for key in keys:
            self._patch_here(key)
        self.divided.blocks.change(number, keys)

    def _patch_here(self, key: str) -> None:
        """Patch a weight that is on the device as ComfyUI does, without a copy of what it was."""
        # a reference to the map, where ComfyUI would copy the weight off the device
        self.backup[key] = Backup(self.divided.homes[key].tensor, False)
        try:
            comfy.model_patcher.ModelPatcher.patch_weight_to_device(self, key, device_to=self.load_device)
        finally:
            del self.backup[key]


def _force_cast(module: Any, force: bool) -> None:
    """What ComfyUI's load does for its own list, where a compute dtype was chosen."""
    if not is_layer(module):
        return
    if hasattr(module, "prev_comfy_cast_weights"):
        module.comfy_cast_weights = module.prev_comfy_cast_weights
        del module.prev_comfy_cast_weights
    module.comfy_force_cast_weights = force
    if force:
        module.prev_comfy_cast_weights = module.comfy_cast_weights
        module.comfy_cast_weights = True


def _modules(entry: Any) -> set[Any]:
    """The module of an entry of ComfyUI's list, whose form differs between versions."""
    return {item for item in entry if isinstance(item, torch.nn.Module)}
