"""cfg_degree 2 over HTTP: the same latents as plain ComfyUI, with something to divide and without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host.client import ComfyClient
from comfy_raylight.tests.host.prompts import FAMILIES, Case, PoolCase, plain, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import FP32, latent

GROUPS = PoolCase(workers=2, cfg=2)
FOUR = PoolCase(workers=4, cfg=2)
THROUGH_MODEL = dataclasses.replace(GROUPS, through_model=True)
UNDIVIDED = "cfg_degree=2 has nothing to divide"
LONGER = {"negative": {"tokens": 45}}


def case(family: str, **more: Any) -> Case:
    return Case(file=f"{family}.safetensors", inputs=FAMILIES[family], **{"cfg": 4.0, **more})


CASES = [
    pytest.param(case("wan"), GROUPS, {}, id="wan"),
    pytest.param(case("wan"), GROUPS, LONGER, id="wan unequal texts"),
    pytest.param(case("wan", sampling="PerpNegGuider"), THROUGH_MODEL, {}, id="wan PerpNegGuider"),
    pytest.param(case("wan", cfg=1.0), GROUPS, {}, id="wan cfg 1"),
    pytest.param(case("unet", batch=2), GROUPS, {}, id="unet batch 2"),
    pytest.param(case("unet", batch=2), FOUR, {}, id="unet on 4, batch 2"),
    pytest.param(case("wan"), FOUR, LONGER, id="wan on 4", marks=SLOW),
]


@pytest.mark.parametrize("sampling,where,changes", CASES)
def test_equals_plain(
    server: ComfyServer,
    client: ComfyClient,
    sampling: Case,
    where: PoolCase,
    changes: dict[str, dict[str, Any]],
) -> None:
    results = []
    before = server.log().count(UNDIVIDED)
    for name, make in (("plain", plain), ("pool", lambda each: pool(each, where))):
        prompt = make(dataclasses.replace(sampling, name=name))
        for node, inputs in changes.items():
            prompt[node]["inputs"].update(inputs)
        client.run(prompt, timeout=400)
        results.append(latent(server, name))
        (server.output / f"{name}.safetensors").unlink()
    expected, found = results
    assert expected.isfinite().all() and expected.std() > 1e-3
    assert (found - expected).abs().max() <= FP32 * expected.abs().max()
    assert server.log().count(UNDIVIDED) - before == (1 if sampling.cfg == 1.0 else 0)
