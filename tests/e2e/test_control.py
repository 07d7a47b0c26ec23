"""ControlNets whose residuals the workers compute: latents equal those of plain ComfyUI with its own."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.client import ComfyClient, Prompt, PromptError
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.prompts import LOADER, SAMPLER, Case, PoolCase, plain, pool, with_gguf
from comfy_raylight.tests.host.server import ComfyServer
from comfy_raylight.tests.weights.adapters import write_adapter
from comfy_raylight.tests.weights.files import write_gguf
from safetensors.torch import save_file

from .test_data_parallel import SEEDS, Bench, parallel, same
from .test_sampling import FP32, latent

SD3 = Case(file="control-sd3.safetensors", inputs=families.FAMILIES["sd3"].inputs, seed=5)
FLUX = Case(file="control-flux.safetensors", inputs=families.FAMILIES["flux"].inputs, seed=5)
SD35 = Case(file="control-sd35.safetensors", inputs=dataclasses.replace(SD3.inputs, pooled=2048), seed=5)
UNET = Case(file="control-unet.safetensors", inputs=families.FAMILIES["unet"].inputs, seed=5)
LORA = ("LoraLoaderModelOnly", {"lora_name": "control-unet.safetensors", "strength_model": 0.8})
SENT = "its residuals"


@dataclass(frozen=True)
class Control:
    """One ControlNet in a workflow: its file, how it is applied, and whether on the pool ComfyUI's own is used."""

    file: str = "sd3.safetensors"
    apply: Mapping[str, Any] = field(default_factory=dict)
    stock: bool = False
    vae: bool = True


@pytest.fixture(scope="module")
def files(server: ComfyServer, comfy_root: Path) -> Iterator[Path]:
    """Models, ControlNets and a VAE, and files that are none."""
    folder, python = server.base / "models" / "controlnet", Path(sys.executable)
    size = families.FAMILIES["flux"].size
    jobs = [
        Job(family="sd3", path=server.models / SD3.file, seed=1),
        Job(family="control_sd3", path=folder / "sd3.safetensors", seed=2),
        Job(family="control_sd3", path=folder / "sd3-other.safetensors", seed=3),
        Job(family="control_sd3", path=folder / "sd3-bf16.safetensors", seed=4, dtype="bfloat16"),
        Job(family="unet", path=server.models / UNET.file, seed=1),
        Job(family="control_unet", path=folder / "unet.safetensors", seed=2, dtype="float16"),
        Job(family="control_lora", path=folder / "lora.safetensors", seed=2),
        Job(family="sd3", path=server.models / SD35.file, seed=1, size={"pooled": 2048}),
        Job(family="control_sd35", path=folder / "sd35.safetensors", seed=2),
        Job(family="control_sd35_large", path=folder / "sd35-large.safetensors", seed=2),
        Job(family="taesd3", path=server.base / "models" / "vae" / "taesd3.safetensors"),
    ]
    if version_of(comfy_root) != "0.3.75" or LARGE:
        jobs += [
            Job(family="flux", path=server.models / FLUX.file, seed=1, size=size),
            Job(family="control_flux", path=folder / "flux.safetensors", seed=2, size=size, dtype="bfloat16"),
        ]
    write(jobs, comfy_root=comfy_root, python=python)
    write_adapter(server.models / UNET.file, server.models.parent / "loras" / UNET.file, "lora", part="attn")
    save_file({"some.weight": torch.zeros(4, 4)}, folder / "other.safetensors")
    (folder / "text.safetensors").write_text("this is a text file\n" * 100)
    yield folder
    for job in jobs:
        os.unlink(job.path)


def controlled(prompt: Prompt, controls: tuple[Control, ...], *, on_pool: bool) -> Prompt:
    """The prompt with ControlNets on its conditioning, one after the other."""

    def add(name: str, class_type: str, **inputs: Any) -> str:
        prompt[name] = {"class_type": class_type, "inputs": inputs}
        return name

    positive, negative = (prompt[SAMPLER]["inputs"][name] for name in ("positive", "negative"))
    image = [add("picture", "RLTestPixels", frames=1, height=200, width=248, channels=3, smooth=True), 0]
    vae = [add("vae", "VAELoader", vae_name="taesd3.safetensors"), 0]
    for number, control in enumerate(controls):
        ours = on_pool and not control.stock
        loader = add(
            f"control{number}",
            "RayControlNetLoader" if ours else "ControlNetLoader",
            control_net_name=control.file,
            **({"ray_actors": [LOADER, 0]} if ours else {}),
        )
        given = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **control.apply, "image": image}
        named = {"ray_control_net": [loader, 0]} if ours else {"control_net": [loader, 0]}
        if control.vae:
            named["ray_vae" if ours else "vae"] = vae
        apply = add(
            f"apply{number}",
            "RayControlNetApply" if ours else "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            **named,
            **given,
        )
        positive, negative = [apply, 0], [apply, 1]
    prompt[SAMPLER]["inputs"].update(positive=positive, negative=negative)
    return prompt


def compared(
    server: ComfyServer, client: ComfyClient, sampling: Case, where: PoolCase, *controls: Control
) -> tuple[float, float]:
    """Difference of the pool's latent and of one without ControlNets from plain's, over its largest value."""
    found = {}
    for name, prompt in {
        "plain": controlled(plain(sampling), controls, on_pool=False),
        "pool": controlled(pool(sampling, where), controls, on_pool=True),
        "without": plain(sampling),
    }.items():
        prompt["save"]["inputs"]["name"] = name
        client.run(prompt, timeout=400)
        found[name] = latent(server, name)
    expected = found["plain"]
    largest = expected.abs().max()
    assert expected.isfinite().all()
    return tuple(((found[name] - expected).abs().max() / largest).item() for name in ("pool", "without"))  # type: ignore[return-value]


CASES = {
    "two ranks": (SD3, PoolCase(workers=2), [Control()]),
    "ring, batch": (dataclasses.replace(SD3, batch=2), PoolCase(workers=2, ulysses=1, ring=2), [Control()]),
    "cfg groups, part of the schedule": (
        dataclasses.replace(SD3, steps=4),
        PoolCase(workers=2, cfg=2),
        [Control(apply={"strength": 0.6, "start_percent": 0.2, "end_percent": 0.8})],
    ),
    "uneven, two at a time": (SD3, PoolCase(workers=3, ulysses=3), [Control(), Control(file="sd3-other.safetensors")]),
    "a UNet by rows": (
        dataclasses.replace(UNET, batch=2),
        PoolCase(workers=2),
        [Control(file="unet.safetensors", vae=False)],
    ),
    "bf16 file, beside one of ComfyUI's": (
        SD3,
        PoolCase(workers=2),
        [Control(file="sd3-bf16.safetensors"), Control(file="sd3-other.safetensors", stock=True)],
    ),
}


ON_DEMAND = ("two ranks", "ring, batch")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in ON_DEMAND else ()) for name in CASES])
def test_equals_plain(server: ComfyServer, client: ComfyClient, name: str) -> None:
    sampling, where, controls = CASES[name]
    before = len(server.log())
    difference, effect = compared(server, client, sampling, where, *controls)
    assert difference <= FP32
    assert effect > 1e-2, "without the ControlNet it would be the same"
    assert server.log()[before:].count(SENT) == sum(control.stock for control in controls)


@pytest.mark.usefixtures("files")
def test_flux(server: ComfyServer, client: ComfyClient, comfy_root: Path) -> None:
    """Without a VAE, and with blocks that the ranks share."""
    if version_of(comfy_root) == "0.3.75" and not LARGE:
        pytest.skip("this ComfyUI has it in one size only, of 0.7 GB: RAYLIGHT_TEST_LARGE=1 tries it")
    control = Control(file="flux.safetensors", vae=False)
    difference, effect = compared(server, client, FLUX, PoolCase(workers=2), control)
    assert difference <= FP32 and effect > 1e-2


@pytest.mark.usefixtures("files")
def test_pictures_side_by_side(server: ComfyServer, client: ComfyClient) -> None:
    """Each replica computes the residuals of its own picture."""
    bench = Bench(server, client)
    found = bench.many(controlled(parallel(SD3), (Control(),), on_pool=True))[:2]
    expected = []
    for seed in SEEDS[:2]:
        client.run(controlled(plain(dataclasses.replace(SD3, seed=seed, name="plain")), (Control(),), on_pool=False))
        expected.append(latent(server, "plain"))
    same(found, expected)


@pytest.mark.usefixtures("files")
def test_offload_and_a_new_pool(server: ComfyServer, client: ComfyClient) -> None:
    """The ControlNet comes back where its workers have gone, with the same bits."""
    wanted = None
    for number in range(3):
        prompt = controlled(pool(dataclasses.replace(SD3, end=9000 - number)), (Control(),), on_pool=True)
        client.run(prompt, timeout=400)
        found = latent(server, "latent")
        wanted = found if wanted is None else wanted
        assert torch.equal(found, wanted)
        if number == 0:
            client.free(unload_models=True, free_memory=False)
        else:
            kill = {"ray_actors": [LOADER, 0], "kill_mode": "Kill Workers Only"}
            client.run({**{name: prompt[name] for name in ("init", LOADER)}, "kill": _node("RayKill", kill)})


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "file,says",
    [
        ("lora.safetensors", "cannot be loaded on the workers"),
        ("other.safetensors", "does not recognise a ControlNet"),
        ("text.safetensors", "safetensors"),
    ],
)
def test_what_is_refused(server: ComfyServer, client: ComfyClient, file: str, says: str) -> None:
    prompt = controlled(pool(SD3), (Control(file=file),), on_pool=True)
    with pytest.raises(PromptError, match=says) as caught:
        client.run(prompt)
    assert caught.value.node == "control0"


BORROWING = {
    "Control-LoRA": (UNET, "lora"),
    "Control-LoRA, a LoRA in what it borrows": (dataclasses.replace(UNET, model_nodes=(LORA,)), "lora"),
    "SD3.5, its x_embedder": (SD35, "sd35"),
    "SD3.5, its y_embedder": (SD35, "sd35-large"),
}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", BORROWING)
def test_what_borrows_weights_of_the_model(server: ComfyServer, client: ComfyClient, name: str) -> None:
    """Loaded by ComfyUI's own node, and run in its process."""
    sampling, file = BORROWING[name]
    control = Control(file=f"{file}.safetensors", stock=True, vae=sampling is SD35)
    difference, effect = compared(server, client, sampling, PoolCase(workers=2, through_model=True), control)
    assert difference <= FP32 and effect > 1e-2


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("borrows", [False, True], ids=["alone", "lending"])
def test_a_merged_model(server: ComfyServer, client: ComfyClient, borrows: bool) -> None:
    """Of a family that has a buffer among its keys; what it lends is merged as well."""
    controls = (Control(file="sd35.safetensors", stock=True, vae=True),) if borrows else ()
    found = {}
    for name, prompt in {
        "plain": controlled(plain(SD35), controls, on_pool=False),
        "pool": controlled(pool(SD35, PoolCase(through_model=True)), controls, on_pool=True),
    }.items():
        model = prompt[SAMPLER]["inputs"]["model"]
        prompt["merged"] = _node("ModelMergeAdd", {"model1": model, "model2": model})
        prompt[SAMPLER]["inputs"]["model"] = ["merged", 0]
        prompt["save"]["inputs"]["name"] = name
        client.run(prompt, timeout=400)
        found[name] = latent(server, name)
    assert (found["pool"] - found["plain"]).abs().max() <= FP32 * found["plain"].abs().max()


@pytest.mark.usefixtures("files")
def test_quantised_weights_cannot_be_lent(server: ComfyServer, client: ComfyClient) -> None:
    control = Control(file="sd35.safetensors", stock=True)
    prompt = controlled(pool(SD35, PoolCase(through_model=True)), (control,), on_pool=True)
    path = server.models / "control-sd35.gguf"
    write_gguf(server.models / SD35.file, path, "Q8_0", quantised=lambda name, _: "joint_blocks.1" in name)
    with pytest.raises(PromptError, match=r"(?s)Control-LoRA, SD3.5.*quantised") as caught:
        client.run(with_gguf(prompt, path.name))
    assert caught.value.node == SAMPLER


def _node(class_type: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
