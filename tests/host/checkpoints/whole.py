"""Writes a checkpoint of SD1.5's kind: a UNet's file, ComfyUI's CLIP-L and a small VAE, both of random weights.

python tests/host/checkpoints/whole.py ROOT UNET FILE
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

TEXT, PICTURE, UNET = "cond_stage_model.transformer.", "first_stage_model.", "model.diffusion_model."


def write_whole(unet: Path, path: Path, *, comfy_root: Path) -> None:
    """Write the file in a process of its own, since `comfy` can be imported once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), str(comfy_root), str(unet), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no checkpoint for {comfy_root}:\n{done.stderr[-3000:]}")


def main(root: str, unet: str, path: str) -> None:
    """Join the three."""
    sys.path[0] = root
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.ops
    import comfy.sd1_clip
    import comfy.taesd.taesd
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(5)

    def random(key: str, shape: torch.Size) -> torch.Tensor:
        scale = 1 / math.sqrt(max(1, shape[1:].numel())) if len(shape) > 1 else 0.1
        made = torch.randn(shape, generator=generator) * scale
        return made + 1 if len(shape) == 1 and key.endswith("weight") else made

    state = {f"{UNET}{key.removeprefix(UNET)}": value for key, value in load_file(unet).items()}
    encoder = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float16)
    for key, value in encoder.transformer.state_dict().items():
        state[f"{TEXT}{key}"] = random(key, value.shape).half()
    for key, value in comfy.taesd.taesd.TAESD(latent_channels=4).state_dict().items():
        state[f"{PICTURE}{key}"] = random(key, value.shape) if value.ndim else value.clone()
    save_file(state, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
