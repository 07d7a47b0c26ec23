"""LoRAs that widen a model's input layer, over HTTP: ComfyUI's process sees the shape that they give it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import write
from comfy_raylight.tests.host.client import Prompt
from comfy_raylight.tests.host.prompts import LOADER, SAMPLER, Case, PoolCase, plain, pool, with_gguf
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.files import is_linear, write_gguf
from comfy_raylight.tests.weights.widening import write_widening
from safetensors.torch import save_file

from .conftest import Run
from .test_residency import SHARDED, STREAMED
from .test_sampling import FP32
from .test_weights import EFFECT, apart, with_ray_loras, with_stock_loras


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widened:
    """A family whose input layer takes more channels.

    Attributes:
        image: the picture in the conditioning that they are for.
        size: of enough blocks for dividing them to free memory.
    """

    layer: str
    columns: int
    image: tuple[int, ...]
    size: Mapping[str, int]


WIDENED = {
    "wan": Widened(layer="patch_embedding", columns=32, image=(16, 3, 14, 18), size={"layers": 6, "dim": 128}),
    "flux": Widened(layer="img_in", columns=128, image=(16, 26, 30), size={"double": 2, "single": 6, "context": 64}),
    "hunyuan15": Widened(layer="img_in.proj", columns=97, image=(64, 3, 7, 9), size={"double": 2, "single": 6}),
}


@dataclasses.dataclass(frozen=True)
class Wide:
    """A sampling with a picture in its conditioning, the same without the LoRA, and the LoRA that widens the model."""

    case: Case
    bare: Case
    lora: str


@pytest.fixture(scope="module")
def wide(server: ComfyServer, comfy_root: Path) -> Any:
    """Makes the files of a family; a quantised one has its values in `-whole`, and is what is sampled."""

    def make(name: str, quant: str = "") -> Wide:
        if families.FAMILIES[name].since > tuple(map(int, version_of(comfy_root).split("."))):
            pytest.skip("this ComfyUI has it in one width only: it would have 5 GB")
        what = WIDENED[name]
        path, lora = server.models / f"wide-{name}.safetensors", f"wide-{name}.safetensors"
        job = dataclasses.replace(families.job(name, server.models), path=path, size=what.size)
        write([job], comfy_root=comfy_root, python=Path(sys.executable))
        write_widening(path, server.base / "models" / "loras" / lora, what.layer, what.columns)
        if quant:
            file = path.with_name(f"wide-{name}-{quant}.gguf")
            too = f"{what.layer}.weight"  # published files have this one quantised as well
            _, whole = write_gguf(path, file, quant, quantised=lambda key, value: key == too or is_linear(key, value))
            path = path.with_name(f"wide-{name}-{quant}-whole.safetensors")
            save_file(whole, path)
        bare = dataclasses.replace(families.case(name), file=path.name, sampling="KSamplerAdvanced")
        image = {"concat_latent_image": {"randn": [1, *what.image]}}
        wanted = dataclasses.replace(bare.inputs, extras={**bare.inputs.extras, **image})
        # where the family has none of its own, the picture is there and has no channels to go to
        unused = dataclasses.replace(bare.inputs, extras={**image, **bare.inputs.extras})
        return Wide(dataclasses.replace(bare, inputs=wanted), dataclasses.replace(bare, inputs=unused), lora)

    return make


ONE = PoolCase(workers=1)
CASES = [
    pytest.param("wan", "", PoolCase(), id="wan"),
    pytest.param("wan", "", ONE, id="wan on one", marks=SLOW),
    pytest.param("wan", "Q8_0", PoolCase(), id="wan Q8_0", marks=SLOW),
    pytest.param("wan", "", PoolCase(more=SHARDED), id="wan sharded", marks=SLOW),
    pytest.param("wan", "", PoolCase(more=STREAMED), id="wan streamed", marks=SLOW),
    pytest.param("wan", "", PoolCase(cfg=2), id="wan cfg", marks=SLOW),
    pytest.param("wan", "Q8_0", PoolCase(more=SHARDED), id="wan Q8_0 sharded", marks=SLOW),
    pytest.param("flux", "Q8_0", PoolCase(), id="flux Q8_0"),
    pytest.param("flux", "", PoolCase(), id="flux", marks=SLOW),
    pytest.param("flux", "", ONE, id="flux on one", marks=SLOW),
    pytest.param("flux", "Q8_0", PoolCase(more=STREAMED), id="flux Q8_0 streamed", marks=SLOW),
    pytest.param("flux", "", PoolCase(more=SHARDED), id="flux sharded", marks=SLOW),
    pytest.param("hunyuan15", "", PoolCase(), id="hunyuan15", marks=SLOW),
    pytest.param("hunyuan15", "", PoolCase(more=STREAMED), id="hunyuan15 streamed", marks=SLOW),
    pytest.param("hunyuan15", "Q8_0", ONE, id="hunyuan15 Q8_0 on one", marks=SLOW),
]


@pytest.mark.parametrize("name,quant,where", CASES)
def test_widened(result: Run, wide: Any, name: str, quant: str, where: PoolCase) -> None:
    """With our node, without the LoRA, and with core's node."""
    given: Wide = wide(name, quant)
    chain = [(given.lora, 0.8)]

    def pooled(*, core: bool, loras: list[tuple[str, float]]) -> Prompt:
        prompt = pool(given.case if loras else given.bare, dataclasses.replace(where, through_model=core))
        add = with_stock_loras(prompt, loras, output=1) if core else with_ray_loras(prompt, loras, both_ways=False)
        return with_gguf(add, given.case.file.replace("-whole.safetensors", ".gguf")) if quant else add

    expected = result(with_stock_loras(plain(given.case), chain))
    bare = result(plain(given.bare))
    assert apart(expected, bare) > EFFECT
    assert apart(result(pooled(core=False, loras=chain)), expected) <= FP32
    assert apart(result(pooled(core=False, loras=[])), bare) <= FP32
    assert apart(result(pooled(core=True, loras=chain)), expected) <= FP32


def test_padded(result: Run, wide: Any) -> None:
    """A node adds a difference that is larger than the weight; a merge with the model as it is widens it too."""
    given: Wide = wide("wan")
    wider = dataclasses.replace(given.case, model_nodes=(("RLTestInside", {"how": "padded"}),))
    expected = result(plain(wider))
    assert apart(expected, result(plain(given.bare))) > EFFECT
    where = PoolCase(through_model=True)
    assert apart(result(pool(wider, where)), expected) <= FP32
    merged = []
    for way, output in ((plain, 0), (lambda case: pool(case, where), 1)):
        prompt = way(wider)
        prompt["merge"] = {
            "class_type": "ModelMergeSimple",
            "inputs": {"model1": ["model0", 0], "model2": [LOADER, output], "ratio": 1.0},
        }
        prompt[SAMPLER]["inputs"]["model"] = ["merge", 0]
        merged.append(result(prompt))
    assert apart(merged[1], merged[0]) <= FP32
