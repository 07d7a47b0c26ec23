"""What a checkpoint has beside the diffusion model: its text encoder and its VAE, as ComfyUI loads them."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import comfy.model_detection
import comfy.sd
import folder_paths

from ...raylight.config import ModelSpec
from ...raylight.errors import LoadError
from ..mapping import meta_model

ENCODER = ("text encoder", "Load CLIP (DualCLIPLoader and others for models with several)")
VAE = ("VAE", "Load VAE")


class MissingPartError(LoadError, AttributeError):
    """A node uses a part of a file that the file does not have."""


class Missing:
    """Stands for such a part: whoever uses it is told what to do.

    Args:
        file: name of the file.
        part: what it lacks, and the node that has it.
    """

    def __init__(self, file: str, part: tuple[str, str]) -> None:
        self._file, self._part = file, part

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        what, node = self._part
        raise MissingPartError(
            f"There is no {what} in {self._file}",
            "it holds a diffusion model alone",
            f"Add {node}, and connect it in the place of this output",
        )


def parts_of(spec: ModelSpec) -> tuple[Any, Any]:
    """The text encoder and the VAE of a file, in ComfyUI's process; a `Missing` for one that it does not have.

    They are ComfyUI's own, from the same mapped file; its diffusion model is not built again.

    Raises:
        LoadError: the file cannot be loaded.
    """
    name = os.path.basename(spec.path)
    nothing = Missing(name, ENCODER), Missing(name, VAE)
    if not _is_checkpoint(spec):
        return nothing
    try:
        _, encoder, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            spec.path,
            output_vae=True,
            output_clip=True,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            output_model=False,
        )
    except RuntimeError as error:
        raise LoadError(
            f"ComfyUI cannot load the text encoder and the VAE of {name}",
            str(error),
            "Choose another file, or one that holds the diffusion model alone",
        ) from error
    if getattr(vae, "first_stage_model", None) is None:
        vae = nothing[1]
    return nothing[0] if encoder is None else encoder, vae


def _is_checkpoint(spec: ModelSpec) -> bool:
    """Whether a file has more than a diffusion model."""
    if spec.path.lower().endswith(".gguf") or spec.others:
        return False
    state, _ = meta_model.header(spec)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    inside = sum(key.startswith(prefix) for key in state)
    return 0 < inside < len(state)
