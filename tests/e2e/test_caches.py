"""Caches of other packs: what they swap in decides on the workers as in plain ComfyUI, or is refused by name."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, Case, PoolCase, plain, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import FP32, both, latent

FLUX = "cached-flux.safetensors"
DEEP = "cached-deep.safetensors"
ONE = PoolCase(workers=1, through_model=True)
TWO = PoolCase(through_model=True)


def case(how: str, *, family: str = "wan", cfg: float = 4.0, limit: float = 0.3, file: str = "") -> Case:
    found = families.case("flux") if family == "flux" else Case(file=f"{family}.safetensors", inputs=FAMILIES[family])
    file = FLUX if family == "flux" else file or found.file
    node = ("RLTestCache", {"how": how, "limit": limit})
    return dataclasses.replace(found, file=file, sampling="KSampler", model_nodes=(node,), steps=8, cfg=cfg)


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer, comfy_root: Path) -> None:
    """A small Flux of several blocks, and a Wan of enough of them for dividing their weights to free memory."""
    jobs = [Job(family="wan", path=server.models / DEEP, size={"layers": 6, "dim": 128})]
    if "flux" in families.of_version(version_of(comfy_root)):
        size = {"context": 64, "double": 3, "single": 2}
        jobs.append(Job(family="flux", path=server.models / FLUX, dtype="float32", size=size))
    write(jobs, comfy_root=comfy_root, python=Path(sys.executable))


@pytest.mark.parametrize(
    "sampling,where",
    [
        pytest.param(case("method"), TWO, id="method, wan"),
        pytest.param(case("method", family="flux"), TWO, id="method, flux"),
        pytest.param(case("blocks"), TWO, id="blocks, wan"),
        pytest.param(case("outputs", family="flux", cfg=1.0), TWO, id="outputs, flux cfg 1"),
        pytest.param(case("method", cfg=1.0), TWO, id="method, wan cfg 1", marks=SLOW),
        pytest.param(case("method", family="flux", cfg=1.0), TWO, id="method, flux cfg 1", marks=SLOW),
        pytest.param(case("blocks", cfg=1.0), TWO, id="blocks, wan cfg 1", marks=SLOW),
        pytest.param(case("outputs", family="flux"), TWO, id="outputs, flux", marks=SLOW),
        pytest.param(case("method"), PoolCase(workers=3, through_model=True), id="method, wan on 3", marks=SLOW),
        pytest.param(case("blocks"), PoolCase(ring=2, through_model=True), id="blocks, wan ring", marks=SLOW),
        pytest.param(case("method"), ONE, id="method, wan on one"),
        pytest.param(case("blocks", cfg=1.0), ONE, id="blocks, wan cfg 1 on one", marks=SLOW),
        pytest.param(case("method", family="flux", cfg=1.0), ONE, id="method, flux cfg 1 on one", marks=SLOW),
        pytest.param(case("outputs", family="unet", limit=0.1), ONE, id="outputs, unet on one", marks=SLOW),
        pytest.param(case("within"), ONE, id="within, wan on one", marks=SLOW),
        pytest.param(
            case("method", file=DEEP),
            PoolCase(through_model=True, more={"FSDP": True, "FSDP_prefetch": "on"}),
            id="method, wan sharded",
            marks=SLOW,
        ),
        pytest.param(
            case("blocks", file=DEEP),
            PoolCase(through_model=True, more={"FSDP": True, "FSDP_CPU_OFFLOAD": True}),
            id="blocks, wan streamed",
            marks=SLOW,
        ),
    ],
)
def test_caches_equal_plain(server: ComfyServer, client: ComfyClient, sampling: Case, where: PoolCase) -> None:
    """Twice, since such caches keep things between runs. What they leave out makes another picture."""
    if not (server.models / sampling.file).exists():
        pytest.skip(f"this ComfyUI knows {sampling.file} only in its full size")
    client.run(plain(dataclasses.replace(sampling, model_nodes=(), name="bare")))
    client.run(plain(dataclasses.replace(sampling, name="cached")))
    bare, cached = latent(server, "bare"), latent(server, "cached")
    assert (bare - cached).abs().max() > 1e-3 * bare.abs().max(), "nothing is left out"
    for seed in (7, 8):
        difference, _, _ = both(server, client, dataclasses.replace(sampling, seed=seed), where)
        assert difference <= FP32, seed


@pytest.mark.parametrize(
    "sampling,where,message",
    [
        pytest.param(
            case("method"),
            PoolCase(cfg=2, through_model=True),
            r"method .* cannot be used with cfg_degree above 1.*keeps things of all conditions",
            id="cfg_degree",
        ),
        pytest.param(case("within"), TWO, r"within.*tokens are divided.*blocks\.0\.forward.*ulysses", id="within"),
        pytest.param(case("outer"), TWO, "place of forward, half of which runs in ComfyUI's process", id="outer"),
        pytest.param(case("apart"), TWO, "apart.*decided otherwise on one worker than on another", id="apart"),
        pytest.param(case("staying"), ONE, "leaves something of its own in the place of forward_orig", id="staying"),
        pytest.param(case("given"), ONE, "changes what the model is given.*EasyCache", id="given"),
        pytest.param(case("written"), ONE, "writes into what the model is given", id="written"),
        pytest.param(case("answered"), ONE, "changes what the model gives", id="answered"),
        pytest.param(case("not called"), ONE, "answers in the place of the model", id="not called"),
        pytest.param(case("looked at"), ONE, "looks at 'c_crossattn', which only the model", id="looked at"),
        pytest.param(
            case("with model"), ONE, "A node that replaces forward_orig cannot be used.*EasyCache", id="with model"
        ),
        pytest.param(case("shared"), ONE, "shares 'count' with a function outside of it", id="shared"),
        pytest.param(
            case("filling"), ONE, r"changes transformer_options\['kept'\] inside of a model call", id="filling"
        ),
        pytest.param(case("by module"), ONE, "scaled has 'scale' in its module", id="by module"),
        pytest.param(case("collecting"), ONE, "wrapper has 'seen' in its module", id="collecting"),
        pytest.param(case("outputs", family="unet"), TWO, "outputs.*a part of the rows", id="rows", marks=SLOW),
        pytest.param(
            case("method", family="flux"),
            PoolCase(through_model=True, more={"FSDP": True}),
            "weights",
            id="weights of a block that does not run",
            marks=SLOW,
        ),
    ],
)
def test_other_caches_are_refused(
    server: ComfyServer, client: ComfyClient, sampling: Case, where: PoolCase, message: str
) -> None:
    if not (server.models / sampling.file).exists():
        pytest.skip(f"this ComfyUI knows {sampling.file} only in its full size")
    for _ in range(2):
        with pytest.raises(PromptError, match=f"(?s){message}"):
            client.run(pool(sampling, where))
    difference, _, _ = both(server, client, dataclasses.replace(sampling, model_nodes=(), steps=2), where)
    assert difference <= FP32, "nothing is left of it on the workers"
