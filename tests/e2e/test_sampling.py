"""Prompts through ComfyUI's HTTP API: the pool's latents equal plain ComfyUI's."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, Prompt, Result
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.prompts import FAMILIES, LOADER, SAMPLER, Case, PoolCase, plain, pool
from comfy_raylight.tests.host.server import ComfyServer
from safetensors.torch import load_file

FP32 = 1e-5
BF16 = 2e-2


def case(family: str, **more: object) -> Case:
    return Case(file=f"{family}.safetensors", inputs=FAMILIES[family], **more)  # type: ignore[arg-type]


WAN = case("wan")
ANCESTRAL = {"sampler": "euler_ancestral"}
SDE = {"sampler": "dpmpp_2m_sde", "steps": 3}
TOKENS = (
    ("HyperTile", {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False}),
    ("TomePatchModel", {"ratio": 0.3}),
)
NODE = PoolCase()
MODEL = PoolCase(through_model=True)

CASES = [
    pytest.param(WAN, NODE, id="wan"),
    pytest.param(case("wan", cfg=1.0), NODE, id="wan cfg 1"),
    pytest.param(case("wan", **ANCESTRAL), NODE, id="wan ancestral"),
    pytest.param(case("wan", **SDE), NODE, id="wan sde"),
    pytest.param(case("wan", batch=2), NODE, id="wan batch 2"),
    pytest.param(case("wan", add_noise=False, random_latent=True, start=1, steps=3), NODE, id="wan late start"),
    pytest.param(case("wan", leftover=True, end=2, steps=4), NODE, id="wan leftover noise"),
    pytest.param(case("wan", sigmas="1.0, 0.8, 0.3, 0.0"), NODE, id="wan sigmas"),
    pytest.param(case("wan", sampling="KSampler"), MODEL, id="wan KSampler"),
    pytest.param(case("wan", sampling="KSampler", denoise=0.6, random_latent=True, steps=4), MODEL, id="wan denoise"),
    pytest.param(case("wan", sampling="CFGGuider", **SDE), MODEL, id="wan CFGGuider"),
    pytest.param(case("wan", sampling="BasicGuider"), MODEL, id="wan BasicGuider"),
    pytest.param(case("wan", sampling="DualCFGGuider"), MODEL, id="wan DualCFGGuider"),
    pytest.param(case("wan", sampling="PerpNegGuider"), MODEL, id="wan PerpNegGuider"),
    pytest.param(case("flux", cfg=1.0), NODE, id="flux cfg 1"),
    pytest.param(case("flux", **ANCESTRAL), NODE, id="flux ancestral", marks=SLOW),
    pytest.param(case("flux", sampling="CFGGuider", **SDE), MODEL, id="flux CFGGuider sde", marks=SLOW),
    pytest.param(case("zimage", cfg=1.0), NODE, id="zimage cfg 1", marks=SLOW),
    pytest.param(case("zimage", **ANCESTRAL), NODE, id="zimage ancestral", marks=SLOW),
    pytest.param(case("zimage", sampling="CFGGuider", **SDE), MODEL, id="zimage CFGGuider sde", marks=SLOW),
    pytest.param(WAN, PoolCase(workers=3), id="wan on 3"),
    pytest.param(case("unet", batch=2), PoolCase(workers=3), id="unet on 3"),
    pytest.param(case("unet", model_nodes=TOKENS, **ANCESTRAL), MODEL, id="unet HyperTile and ToMe"),
    pytest.param(case("wan", **SDE), PoolCase(workers=3, through_model=True), id="wan sde on 3", marks=SLOW),
    pytest.param(case("flux"), PoolCase(workers=3), id="flux on 3", marks=SLOW),
    pytest.param(WAN, PoolCase(workers=3, ulysses=1), id="wan on one replica of 3", marks=SLOW),
    pytest.param(WAN, PoolCase(ring=2), id="wan ring"),
    pytest.param(case("zimage", batch=2), PoolCase(ring=2), id="zimage ring", marks=SLOW),
    pytest.param(WAN, PoolCase(workers=4, ring=2), id="wan 2 x ring 2", marks=SLOW),
    pytest.param(WAN, PoolCase(workers=2, more={"pack_qkv": True, "sync_ulysses": True}), id="wan packed"),
]


def latent(server: ComfyServer, name: str) -> torch.Tensor:
    return load_file(server.output / f"{name}.safetensors")["samples"]


def both(server: ComfyServer, client: ComfyClient, sampling: Case, where: PoolCase) -> tuple[float, Result, Result]:
    """Run a case both ways; the largest difference over the largest plain value."""
    expected = client.run(plain(dataclasses.replace(sampling, name="plain")))
    found = client.run(pool(dataclasses.replace(sampling, name="pool"), where), timeout=400)
    a, b = latent(server, "plain"), latent(server, "pool")
    assert a.shape == b.shape and a.dtype == b.dtype
    assert a.isfinite().all() and a.std() > 1e-3
    for name in ("plain", "pool"):
        Path(server.output / f"{name}.safetensors").unlink()
    return ((a - b).abs().max() / a.abs().max()).item(), expected, found


@pytest.mark.parametrize("sampling,where", CASES)
def test_equals_plain(server: ComfyServer, client: ComfyClient, sampling: Case, where: PoolCase) -> None:
    difference, _, _ = both(server, client, sampling, where)
    assert difference <= FP32


@pytest.mark.parametrize("chunks", (1, 5))
def test_feed_forward_in_chunks(server: ComfyServer, client: ComfyClient, chunks: int) -> None:
    """The chunker between loader and sampler; the next prompt without it runs as before."""
    client.run(plain(dataclasses.replace(WAN, name="plain")))
    prompt = pool(dataclasses.replace(WAN, name="pool"))
    prompt["chunker"] = {
        "class_type": "RayLTXFFNChunker",
        "inputs": {"ray_actors": [LOADER, 0], "ffn_chunks": chunks},
    }
    prompt[SAMPLER]["inputs"]["ray_actors"] = ["chunker", 0]
    client.run(prompt)
    a, b = latent(server, "plain"), latent(server, "pool")
    assert (a - b).abs().max() <= FP32 * a.abs().max()
    assert both(server, client, WAN, NODE)[0] <= FP32


def part_of_batch(prompt: Prompt, *, whole: bool = False) -> Prompt:
    """The second and third of a batch of latents, whose first frame a mask keeps; their noise is that of the batch."""
    prompt["latent"]["inputs"] |= {"batch": 3, "kept": 1}
    if not whole:
        part = {"samples": ["latent", 0], "batch_index": 1, "length": 2}
        prompt["part"] = {"class_type": "LatentFromBatch", "inputs": part}
        prompt[SAMPLER]["inputs"]["latent_image"] = ["part", 0]
    return prompt


def test_noise_mask_and_batch_index(server: ComfyServer, client: ComfyClient) -> None:
    masked = case("wan", random_latent=True, start=1, steps=3)
    client.run(part_of_batch(plain(dataclasses.replace(masked, name="plain"))))
    client.run(part_of_batch(pool(dataclasses.replace(masked, name="pool"))))
    client.run(part_of_batch(pool(dataclasses.replace(masked, name="batch")), whole=True))
    a, b, whole = latent(server, "plain"), latent(server, "pool"), latent(server, "batch")
    assert len(a) == 2 and (a - b).abs().max() <= FP32 * a.abs().max()
    # another size of the batch rounds otherwise, other noise would be as far off as the first one of the batch
    assert (b - whole[1:]).abs().max() <= FP32 * a.abs().max() < (b - whole[:2]).abs().max()
    untouched = torch.randn(3, *b.shape[1:], generator=torch.Generator().manual_seed(masked.seed + 1))[1:, :, :1]
    assert (b[:, :, :1] - untouched).abs().max() <= 1e-4 and (b[:, :, 1:] - untouched).abs().max() > 1


def test_progress_and_previews(server: ComfyServer, client: ComfyClient) -> None:
    """They are plain sampling's own, since it is plain sampling."""
    _, expected, found = both(server, client, case("wan", steps=4, seed=99), NODE)
    steps = [(value, most) for _, value, most in found.progress(SAMPLER)]
    assert steps == [(value, most) for _, value, most in expected.progress(SAMPLER)]
    assert steps[-1] == (4, 4)
    assert len(found.previews()) == len(expected.previews()) > 0


@SLOW
def test_bf16(comfy_root: Path, tmp_path: Path) -> None:
    """ComfyUI's command line reaches the workers: with --bf16-unet both sides compute in bf16."""
    server = ComfyServer(comfy_root, base=tmp_path, threads=1, args=("--bf16-unet",))
    server.models.mkdir(parents=True, exist_ok=True)
    families = ("wan", "flux") if LARGE else ("wan",)
    jobs = [Job(family=family, path=server.models / f"{family}.safetensors") for family in families]
    write(jobs, comfy_root=comfy_root, python=Path(sys.executable))
    with server, server.client() as client:
        cases = [case("wan"), case("wan", cfg=1.0, **ANCESTRAL), *([case("flux", cfg=1.0)] if LARGE else [])]
        for sampling in cases:
            difference, _, _ = both(server, client, sampling, NODE)
            assert difference <= BF16
        log = server.log()
    assert "model weight dtype torch.bfloat16" in log


def test_comfyui_warns_of_nothing(server: ComfyServer, client: ComfyClient) -> None:
    """As it does, for example, where a setting is read that its version does not have."""
    before = len(server.log())
    client.run(pool(dataclasses.replace(WAN, seed=7, name="quiet"), PoolCase(more={"mmap_cache_size": 3})))
    log = server.log()[before:]
    assert "WARNING" not in log, log


def test_different_seeds_differ(server: ComfyServer, client: ComfyClient) -> None:
    """A comparison that cannot fail would also pass here."""
    for name, seed in (("one", 1), ("two", 2)):
        client.run(pool(dataclasses.replace(WAN, name=name, seed=seed), NODE))
    a, b = latent(server, "one"), latent(server, "two")
    assert (a - b).abs().max() > 1e-2 * a.abs().max()
