"""Trains what the demo ships: a small Wan model, a LoRA, and a VAE for its latents.

    python benchmarks/train_demo.py model|lora|vae [--steps N] [--minutes M] [--device cuda] [--out DIR]

Every part is ComfyUI's own class with fewer and narrower layers, so that any ComfyUI loads the files. The model learns
ComfyUI's convention for Wan: x = (1 - sigma) latent + sigma noise, time 1000 sigma, and its output is noise - latent.
`model` and `vae` take up to an hour of one core each, `lora` minutes. On an H100 `model --device cuda` takes 27 ms per
step: 16,000 of them came near the files here, which were trained in several goes (`--resume`, the last with `--rate
0.3`). `lora` needs the model; otherwise the order does not matter. Both need a ComfyUI like the tests'
(0.3.75): the rotary embedding of later ones has no gradient where comfy_kitchen computes it. The model reads what the
text encoder of examples/install_demo.py gives.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

BENCHMARKS = Path(__file__).resolve().parent
sys.path += [str(BENCHMARKS), str(BENCHMARKS.parent / "tests"), str(BENCHMARKS.parent / "examples")]

from host import setup  # noqa: E402

if TYPE_CHECKING:
    import torch
    from demo_model.latents import Basis
    from demo_model.world import World
    from torch import Tensor

OUT = BENCHMARKS.parent / "examples" / "comfyui"
NAME = "raylight_demo"
STEPS = {"model": 12000, "lora": 1600, "vae": 6000}
RATES = {"model": 1.5e-3, "lora": 3e-3, "vae": 3e-3}
SIZE = {"dim": 256, "ffn": 448, "layers": 3}
WORD_RATE = 0.03
"""Of the usual rate, for the layer that reads words."""
VAE_WIDTH = 8
RANK = 8
BATCH, VAE_BATCH, POOL = 16, 4, 2048
SHIFT = 3.0
"""Of the noise levels that the model is shown, as ModelSamplingSD3 means it."""
UNGUIDED = 0.1
"""Share of scenes without conditioning, so that cfg above 1 works."""
log = logging.getLogger("train")


@dataclass(frozen=True)
class Limits:
    """What ends a training: whichever comes first; the learning rate falls towards it.

    Attributes:
        seconds: of processor time.
        rate: part of the usual rate of learning.
    """

    steps: int
    seconds: float
    rate: float


def main() -> None:
    """Train one part, or write the GGUF, in a process that has ComfyUI's packages."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    options = _options()
    _import_comfy(options.comfy)
    models = options.out / "models"
    base = models / "diffusion_models" / f"{NAME}.safetensors"
    limits = Limits(options.steps, options.minutes * 60, options.rate)
    match options.part:
        case "model":
            train_model(base, limits, resume=options.resume, device=options.device)
        case "lora":
            train_lora(base, models / "loras" / f"{NAME}_paper.safetensors", limits, device=options.device)
        case "vae":
            train_vae(models / "vae" / f"{NAME}_vae.safetensors", limits, resume=options.resume, device=options.device)


def train_model(path: Path, limits: Limits, *, resume: bool, device: str) -> None:
    """Train the model on the night world and write the average of its last weights, in half precision."""
    import torch
    from demo_model.world import NIGHT
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = wan()
    if resume:
        model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    else:
        _initialise(model)
    model.to(device)
    log.info("%.2f million weights", sum(weight.numel() for weight in model.parameters()) / 1e6)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    latents, words = scenes_of(NIGHT, POOL)

    def after(step: int) -> None:
        for key, value in model.state_dict().items():
            average[key].lerp_(value, max(0.005, 1 / (step + 1)))
        if step % 250 == 249:
            save(average, path)

    def loss(step: int) -> Tensor:
        return flow_loss(model, latents, words, step)

    fit(model.named_parameters(), loss, rate=RATES["model"], limits=limits, after=after)
    save(average, path)


def train_lora(base: Path, path: Path, limits: Limits, *, device: str) -> None:
    """Train a LoRA of the model's linear layers on the paper world."""
    import torch
    from demo_model.world import PAPER
    from safetensors.torch import load_file
    from torch.nn.utils import parametrize

    torch.manual_seed(1)
    model = wan()
    model.load_state_dict({key: value.float() for key, value in load_file(base).items()})
    model.requires_grad_(False)

    class Adapter(torch.nn.Module):
        def __init__(self, shape: torch.Size) -> None:
            super().__init__()
            self.down = torch.nn.Parameter(torch.randn(RANK, shape[1]) / math.sqrt(shape[1]))
            self.up = torch.nn.Parameter(torch.zeros(shape[0], RANK))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.up @ self.down

    adapters = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(("blocks.", "head.", "time_projection.")):
            adapters[name] = Adapter(layer.weight.shape)
            parametrize.register_parametrization(layer, "weight", adapters[name])
    model.to(device)
    latents, words = scenes_of(PAPER, POOL // 2)

    def loss(step: int) -> Tensor:
        return flow_loss(model, latents, words, step)

    weights = [weight for adapter in adapters.values() for weight in adapter.named_parameters()]
    fit(weights, loss, rate=RATES["lora"], limits=limits)
    file = {}
    for name, adapter in adapters.items():
        file[f"diffusion_model.{name}.lora_A.weight"] = adapter.down.detach()
        file[f"diffusion_model.{name}.lora_B.weight"] = adapter.up.detach()
    save(file, path)


def train_vae(path: Path, limits: Limits, *, resume: bool, device: str) -> None:
    """Train the VAE: its encoder to give the latents of `Basis`, its decoder to give their pictures.

    In any colours, on crops, and with some noise on the latents, since those of a model are not exact.
    """
    import comfy.latent_formats
    import comfy.ldm.wan.vae
    import torch
    from demo_model.latents import FITTED, SPACE
    from demo_model.world import FRAMES, Scenes, cover, paint
    from safetensors.torch import load_file

    torch.manual_seed(2)
    vae = comfy.ldm.wan.vae.WanVAE(
        dim=VAE_WIDTH, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]
    )
    if resume:
        vae.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    else:
        _initialise(vae)
    vae.to(device)
    log.info("%.2f million weights", sum(weight.numel() for weight in vae.parameters()) / 1e6)
    latent_format, mapped = comfy.latent_formats.Wan21(), basis()
    frames, side = FRAMES, 4

    def crop(whole: Tensor, at: Tensor, unit: int) -> Tensor:
        """A square of `side` patches of `unit` pixels from each scene, near its shape."""
        tops = at.clamp(0, FITTED // SPACE - side).tolist()
        return torch.stack(
            [
                each[..., top * unit : (top + side) * unit, left * unit : (left + side) * unit]
                for each, (top, left) in zip(whole, tops, strict=True)
            ]
        )

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        scenes = Scenes.draw(VAE_BATCH, generator, side=FITTED)
        colours, grounds = torch.rand(2, VAE_BATCH, 3, generator=generator)
        pictures = paint(cover(scenes, frames), colours, grounds)
        at = (scenes.start / SPACE).long() - torch.randint(side, (VAE_BATCH, 2), generator=generator)
        latents, pictures = crop(mapped.encode(pictures), at, 1), crop(pictures, at, SPACE)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = latents + 0.15 * torch.rand(len(latents), 1, 1, 1, 1, generator=generator) * noise
        pictures, latents = pictures.to(device), latents.to(device)
        decoded = vae.decode(latent_format.process_out(noisy).to(device))
        result = (decoded - pictures).abs().mean() + (decoded - pictures).square().mean()
        if step % 4 == 0:
            encoded = latent_format.process_in(vae.encode(pictures))
            result = result + (encoded - latents).square().mean()
        return result

    def after(step: int) -> None:
        if step % 100 == 99:
            save(vae.state_dict(), path)

    fit(vae.named_parameters(), loss, rate=RATES["vae"], limits=limits, after=after)
    save(vae.state_dict(), path)


def contexts(words: Tensor) -> Tensor:
    """What the text encoder gives for prompts of these numbers of words: (prompts, words) to (prompts, tokens, 4096).

    The order of words is nothing to the model; how many tokens say nothing is.
    """
    import install_demo
    import torch

    vectors = torch.tensor(install_demo.vectors(), dtype=torch.float32)
    result = torch.zeros(len(words), install_demo.LENGTH, 4096)
    result[:, 1 : 1 + words.shape[1], : vectors.shape[1]] = vectors[words]
    return result


def flow_loss(model: torch.nn.Module, latents: Tensor, words: Tensor, step: int) -> Tensor:
    """Mean squared error of the model's output on a batch of the scenes at noise levels of its own."""
    import torch

    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(len(latents), (BATCH,), generator=generator)
    latent, context = latents[chosen], contexts(words[chosen])
    device = next(model.parameters()).device
    guided = torch.rand(BATCH, generator=generator) >= UNGUIDED
    context = context * guided[:, None, None]
    even = (torch.arange(BATCH) + torch.rand(1, generator=generator)) / BATCH
    sigma = (SHIFT * even / (1 + (SHIFT - 1) * even)).clamp(min=1e-3)
    noise = torch.randn(latent.shape, generator=generator)
    part = sigma[:, None, None, None, None]
    noisy = (1 - part) * latent + part * noise
    output = model(noisy.to(device), (sigma * 1000).to(device), context.to(device))
    return (output - (noise - latent).to(device)).square().mean()


def scenes_of(world: World, count: int) -> tuple[Tensor, Tensor]:
    """Latents and word numbers of scenes of a world."""
    import torch
    from demo_model.world import Scenes, painted

    mapped, generator = basis(), torch.Generator().manual_seed(1)
    drawn = [Scenes.draw(64, generator).across() for _ in range(count // 64)]
    latents = torch.cat([mapped.encode(painted(scenes, world)) for scenes in drawn])
    return latents, torch.cat([scenes.words() for scenes in drawn])


def basis() -> Basis:
    """The map from pictures to normalised latents, for the preview factors of this ComfyUI."""
    import comfy.latent_formats
    import torch
    from demo_model.latents import Basis

    shown = comfy.latent_formats.Wan21()
    return Basis.fit(torch.tensor(shown.latent_rgb_factors), torch.tensor(shown.latent_rgb_factors_bias))


def wan() -> torch.nn.Module:
    """ComfyUI's Wan model of `SIZE`, as it is detected from a file of it; weights are not set."""
    from host.checkpoints.make import build
    from host.checkpoints.recipes import RECIPES

    recipe = RECIPES["wan"]
    return build(recipe, {**recipe.size, **SIZE}).to_empty(device="cpu").float()


def fit(
    named: Iterable[tuple[str, torch.nn.Parameter]],
    loss: Callable[[int], Tensor],
    *,
    rate: float,
    limits: Limits,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with a short rise and a cosine fall of its rate; `after` is called after each step.

    The layer that reads words has hundreds of inputs: a step of the others' rate would move what it makes of a word by
    several units, to where its GELU is flat, and the word is never heard of again.
    """
    import torch

    groups: dict[float, list[torch.nn.Parameter]] = {1.0: [], WORD_RATE: []}
    for name, weight in named:
        groups[WORD_RATE if name == "text_embedding.0.weight" else 1.0].append(weight)
    weights = [weight for group in groups.values() for weight in group]
    optimiser = torch.optim.AdamW(
        [{"params": group, "part": part} for part, group in groups.items() if group],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    start, mean, rise = time.process_time(), 0.0, 0.03
    for step in range(limits.steps):
        seconds = time.process_time() - start
        part = max(step / limits.steps, seconds / limits.seconds)
        if part >= 1:
            break
        falling = 0.5 * (1 + math.cos(math.pi * max(0.0, part - rise) / (1 - rise)))
        for group in optimiser.param_groups:
            group["lr"] = group["part"] * limits.rate * rate * min(part / rise + 0.01, falling + 0.01)
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        after(step)
        mean += (value.item() - mean) * max(0.03, 1 / (step + 1))
        if step < 5 or step % 25 == 24:
            log.info("step %d, loss %.4f, %.0f s, %.0f%%", step + 1, mean, seconds, 100 * part)


def save(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights in half precision."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: value.detach().to(torch.float16).contiguous() for key, value in weights.items()}, partial)
    partial.chmod(0o644)  # safetensors makes it the owner's alone
    partial.replace(path)
    log.info("%s: %.2f MB", path, path.stat().st_size / 1e6)


def _initialise(model: torch.nn.Module) -> None:
    """Usual initial values: ComfyUI's classes are made to be loaded and leave their weights unset."""
    import torch

    for name, weight in model.named_parameters():
        if name.startswith("head.head."):  # of Wan: it begins with no output
            torch.nn.init.zeros_(weight)
        elif "modulation" in name or name.startswith("time_projection."):
            torch.nn.init.normal_(weight, std=0.02)
        elif weight.ndim > 2 or (weight.ndim == 2 and weight.shape[0] > 1):
            torch.nn.init.xavier_uniform_(weight.flatten(1) if weight.is_contiguous() else weight)
        elif ("norm" in name and name.endswith("weight")) or "gamma" in name:
            torch.nn.init.ones_(weight)
        else:
            torch.nn.init.zeros_(weight)


def _import_comfy(root: Path) -> None:
    """Make `comfy` of a ComfyUI importable, on the CPU."""
    sys.path.insert(0, str(root.resolve()))
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = arguments


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(STEPS))
    parser.add_argument("--steps", type=int, help=f"steps of training (default {STEPS})")
    parser.add_argument("--minutes", type=float, default=60, help="of processor time at most (default 60)")
    parser.add_argument("--device", default="cpu", help="where to train (default cpu)")
    parser.add_argument("--resume", action="store_true", help="begin with the file that is there")
    parser.add_argument("--rate", type=float, default=1, help="part of the usual rate of learning (default 1)")
    parser.add_argument("--comfy", type=Path, default=setup.COMFY, help="root of a ComfyUI")
    parser.add_argument("--out", type=Path, default=OUT, help="folder that mirrors ComfyUI's own")
    options = parser.parse_args()
    options.steps = options.steps or STEPS[options.part]
    return options


if __name__ == "__main__":
    main()
