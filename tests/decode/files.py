"""Writes small VAE files that ComfyUI detects: `python -m decode.files COMFYUI_ROOT FOLDER`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from comfy_raylight.tests.host.large import LARGE

TESTS = Path(__file__).resolve().parents[1]

LTXV: Mapping[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "latent_channels": 128,
    "encoder_blocks": [["res_x", 1], ["compress_all", {}], ["compress_all", {}], ["compress_all", {}]],
    "decoder_blocks": [
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", {"num_layers": 1, "inject_noise": True}],
    ],
    "decoder_base_channels": 16,
    "encoder_base_channels": 16,
    "patch_size": 4,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "timestep_conditioning": True,
}
"""The smallest of LTXV's layout that goes up 32 times in space and 8 times in time, as ComfyUI takes for granted."""


def write(folder: Path, *, comfy_root: Path, python: Path | None = None) -> None:
    """Write wan, ltxv, taesd, those of newer.py and, on demand, oobleck as FOLDER/NAME.safetensors, in a process.

    Args:
        comfy_root: the ComfyUI that must detect them.
        python: interpreter with ComfyUI's packages, by default the running one.
    """
    done = subprocess.run(
        [str(python or sys.executable), "-B", "-m", "decode.files", str(comfy_root), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent / "workers" / "import_root")))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"no VAE files for {comfy_root}:\n{done.stderr[-3000:]}")


def main(root: str, folder: str) -> None:
    """Build ComfyUI's own classes with random weights, and save them."""
    sys.path.insert(0, root)
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    from safetensors.torch import save_file

    from .families import WAN, fill, made_of
    from .newer import NEWER, make_small

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    makers: Mapping[str, tuple[Callable[[], torch.nn.Module], dict[str, str]]] = {
        "wan": (lambda: made_of("ldm.wan.vae.WanVAE", **{**WAN, "num_res_blocks": 2}), {}),
        "taesd": (lambda: made_of("taesd.taesd.TAESD", latent_channels=4), {}),
        "ltxv": (
            lambda: made_of("ldm.lightricks.vae.causal_video_autoencoder.VideoVAE", config=dict(LTXV)),
            {"config": json.dumps({"vae": dict(LTXV)})},
        ),
    }
    if LARGE:  # 600 MB: ComfyUI knows it in one width only
        makers = {**makers, "oobleck": (lambda: made_of("ldm.audio.autoencoder.AudioOobleckVAE"), {})}
    for name, (build, metadata) in makers.items():
        state = {key: value.clone().contiguous() for key, value in fill(build()).state_dict().items()}
        save_file(state, path / f"{name}.safetensors", metadata=metadata or None)
    make_small()
    for name, one in NEWER.items():
        if one.exists:
            save_file(one.state(), path / f"{name}.safetensors", metadata=dict(one.metadata) or None)


if __name__ == "__main__":
    main(*sys.argv[1:3])
