"""A process of ComfyUI, its own loader and ours on the same files."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from comfy_raylight.workers.worker.model import WorkerModel


def boot(root: Path, *, cpu: bool = True) -> None:
    """Import a ComfyUI, on the CPU or on the accelerator it finds."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, str(root))
    import torch

    torch.set_num_threads(1)
    from comfy.cli_args import args

    args.cpu = cpu

    logging.getLogger().setLevel(logging.WARNING)


class Bench:
    """Makes models of files and runs them on the same inputs."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.base = base
        self._number = 0

    def path(self, suffix: str = ".safetensors") -> Path:
        """A name that was not used yet."""
        self._number += 1
        return self.folder / f"{self._number}{suffix}"

    def plain(self, path: Path, **options: Any) -> Any:
        """ComfyUI's own patcher, its weights its own."""
        import comfy.sd
        import comfy.utils
        import torch
        from comfy_raylight.workers.mapping.loading import load_options, normal_tensors

        _, keywords = load_options(self.spec(path))
        with normal_tensors():
            state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
            patcher = comfy.sd.load_diffusion_model_state_dict(state, options, metadata=metadata, **keywords)
        assert isinstance(patcher.model, torch.nn.Module)
        return patcher

    def plain_state(self, state: dict[str, Any], metadata: Any = None) -> Any:
        """ComfyUI's own patcher of weights in memory."""
        import comfy.sd
        from comfy_raylight.workers.mapping.loading import load_options, normal_tensors

        _, keywords = load_options(self.spec(self.base))
        with normal_tensors():
            return comfy.sd.load_diffusion_model_state_dict(dict(state), {}, metadata=metadata, **keywords)

    def spec(self, path: Path, **fields: Any) -> Any:
        from comfy_raylight.raylight.config import ModelSpec

        return ModelSpec.of(path, **fields)

    def mapped(self, path: Path, *, mesh: Any = None, **fields: Any) -> WorkerModel:
        """A worker's model, as the driver would have it loaded; by default of a pool of one."""
        from comfy_raylight.raylight.config import ParallelConfig
        from comfy_raylight.raylight.mesh import Mesh
        from comfy_raylight.workers.mapping import meta_model
        from comfy_raylight.workers.mapping.loading import normal_tensors
        from comfy_raylight.workers.worker.model import WorkerModel

        spec = self.spec(path, **fields)
        found, _, spec = meta_model.build(spec)
        with normal_tensors():
            mesh = mesh or Mesh.single(ParallelConfig(world=1))
            return WorkerModel(spec, found.get_dtype(), mesh, None)

    def run(self, model: Any) -> torch.Tensor:
        """The output of a model, brought onto its device first; of a worker's or of a patcher."""
        from comfy import model_management
        from comfy_raylight.workers.mapping.loading import normal_tensors

        with normal_tensors():
            if hasattr(model, "make_resident"):
                model.make_resident(room=model.activations(inputs()[0]))
                patcher = model.patcher
            else:
                model_management.load_models_gpu([model])
                patcher = model
        return forward(patcher.model)


def inputs() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Arguments of a small Wan's forward."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 3, 6, 8, generator=generator)
    return (x, torch.tensor([500.0]), torch.randn(1, 12, 4096, generator=generator)), {"transformer_options": {}}


def inputs_of(model: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The same on the device and in the dtype that a BaseModel computes in."""
    from comfy import model_management

    device, dtype = model_management.get_torch_device(), model.manual_cast_dtype or model.get_dtype()
    (x, t, context), kwargs = inputs()
    return (x.to(device, dtype), t.to(device), context.to(device, dtype)), kwargs


def forward(model: Any) -> torch.Tensor:
    """The diffusion model of a BaseModel, in the dtype it computes in."""
    import torch

    args, kwargs = inputs_of(model)
    with torch.inference_mode():
        output: torch.Tensor = model.diffusion_model(*args, **kwargs)
    return output.float().cpu().clone()


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert left.isfinite().all() and right.isfinite().all()
    return float((left - right).abs().max() / right.abs().max())
