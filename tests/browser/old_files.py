"""Workflow files as older packs and pages have saved them: other sockets, values of other widgets, wide gaps in ids.

Each is a canvas of format 0.4 as a page of 2025 wrote it: widgets have no sockets, a node has the sockets that it had
then, and `widgets_values` what its widgets were. Wires are written as "node.output" where a node's inputs are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

BYPASSED = 4
"""Mode of a node that the page leaves out of the prompt."""
INITIALIZER = ("local", "default", 2, 2, 1, 1, False, False, False, "TORCH")
"""Values of Ray Init Actor before it had `ray_object_store_gb` and what follows."""


@dataclass(frozen=True)
class Old:
    """A node of a file.

    Attributes:
        type: of the node.
        inputs: its sockets in their order, by "NAME:TYPE", with the "ID.OUTPUT" that is wired to each or "".
        outputs: its outputs, as "NAME:TYPE".
        values: of its widgets, in their order.
        mode: of the page.
        properties: beside its name.
    """

    type: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    values: Sequence[Any] = ()
    mode: int = 0
    properties: Mapping[str, Any] = field(default_factory=dict)


ACTORS = "ray_actors:RAY_ACTORS"
REGISTRY = {"cnr_id": "raylight", "ver": "0.2.0"}


def _initializer(*values: Any) -> Old:
    return Old("RayInitializer", outputs=["ray_actors_init:RAY_ACTORS_INIT"], values=values or INITIALIZER)


def _loader(file: str, lora: str = "", **more: Any) -> Old:
    """Before it had a MODEL output, with a socket for LoRAs."""
    sockets = {"ray_actors_init:RAY_ACTORS_INIT": "900.0", "lora:RAY_LORA": lora}
    return Old("RayUNETLoader", sockets, [ACTORS], [file, "default"], **more)


def _words(encoder: str, positive: str, negative: str) -> dict[int, Old]:
    return {
        11: Old("CLIPLoader", {}, ["CLIP:CLIP"], [encoder, "wan", "default"]),
        12: Old("CLIPTextEncode", {"clip:CLIP": "11.0"}, ["CONDITIONING:CONDITIONING"], [positive]),
        214: Old("CLIPTextEncode", {"clip:CLIP": "11.0"}, ["CONDITIONING:CONDITIONING"], [negative]),
    }


def _decoded(sampler: int) -> dict[int, Old]:
    return {
        31: Old("VAELoader", {}, ["VAE:VAE"], ["old_vae.safetensors"]),
        32: Old("VAEDecode", {"samples:LATENT": f"{sampler}.0", "vae:VAE": "31.0"}, ["IMAGE:IMAGE"]),
        33: Old("PreviewImage", {"images:IMAGE": "32.0"}),
    }


PROMPTED = {"positive:CONDITIONING": "12.0", "negative:CONDITIONING": "214.0"}
LATENT = Old("EmptyLatentImage", {}, ["LATENT:LATENT"], [1024, 1024, 1])
VIDEO = Old("EmptyHunyuanLatentVideo", {}, ["LATENT:LATENT"], [832, 480, 33, 1])
STEPS = ("enable", 81, "randomize", 20, 3.5, "euler", "simple", 0, 10000, "disable")

FILES: Mapping[str, Mapping[int, Old]] = MappingProxyType(
    {
        # a chain of LoRAs in the loader, a compiler that is bypassed, the registry's id of a pack
        "lora_chain": {
            900: _initializer(),
            901: Old("RayLoraLoader", {"prev_ray_lora:RAY_LORA": "902.0"}, ["ray_lora:RAY_LORA"], ["a.safetensors", 1]),
            902: Old(
                "RayLoraLoader",
                {"prev_ray_lora:RAY_LORA": ""},
                ["ray_lora:RAY_LORA"],
                ["b.safetensors", 0.5],
                properties=REGISTRY,
            ),
            8: _loader("old_wan.safetensors", "901.0", properties=REGISTRY),
            9: Old("RayTorchCompileModel", {ACTORS: "8.0"}, [ACTORS], ["inductor"], mode=BYPASSED),
            10: Old("RayModelSamplingSD3", {ACTORS: "9.0"}, [ACTORS], [8]),
            **_words("old_t5.safetensors", "a lake at dawn", "blurred"),
            20: VIDEO,
            46: Old(
                "XFuserKSamplerAdvanced",
                {ACTORS: "10.0", **PROMPTED, "latent_image:LATENT": "20.0"},
                ["LATENT:LATENT"],
                STEPS,
            ),
            **_decoded(46),
        },
        # seeds that belonged to a list of eight, and a sampler whose values are those of other widgets
        "data_parallel": {
            900: _initializer("local", "default", 2, 2, 1, True, False, False, False, "TORCH"),
            55: _loader("old_flux.safetensors"),
            67: Old("DPNoiseList", {}, ["NOISE:NOISE"], [0, "randomize"] * 8),
            **_words("old_clip.safetensors", "a lighthouse", ""),
            20: LATENT,
            66: Old(
                "DPKSamplerAdvanced",
                {ACTORS: "55.0", "noise_list:NOISE": "67.0", **PROMPTED, "latent_image:LATENT": "20.0"},
                ["LATENT:LATENT"],
                ["enable", 0, "randomize", 0, "randomize", 0, "randomize", 0],
            ),
            **_decoded(66),
        },
        # sigmas and a sampler of their own, one switch where a number belongs
        "custom_sampling": {
            900: _initializer("local", "default", 2, 2, 1, True, False, False, False, "TORCH"),
            761: _loader("windows/old_chroma.safetensors"),
            764: Old("RayModelSamplingAuraFlow", {ACTORS: "761.0"}, [ACTORS], [1]),
            766: Old("RayBetaSamplingScheduler", {ACTORS: "764.0"}, ["SIGMAS:SIGMAS"], [30, 0.4, 0.4]),
            767: Old("KSamplerSelect", {}, ["SAMPLER:SAMPLER"], ["euler"]),
            **_words("old_t5.safetensors", "a paper boat", "text"),
            20: LATENT,
            765: Old(
                "XFuserSamplerCustom",
                {
                    ACTORS: "764.0",
                    **PROMPTED,
                    "sampler:SAMPLER": "767.0",
                    "sigmas:SIGMAS": "766.0",
                    "latent_image:LATENT": "20.0",
                },
                ["output:LATENT", "denoised_output:LATENT"],
                [True, 796567098644297, "randomize", 3.5],
            ),
            **_decoded(765),
        },
        # quantised, with two types; a scheduler of the pool
        "gguf": {
            900: _initializer(),
            73: Old(
                "RayGGUFLoader",
                {"ray_actors_init:RAY_ACTORS_INIT": "900.0", "lora:RAY_LORA": ""},
                [ACTORS],
                ["old_flux.gguf", "default", "default"],
            ),
            74: Old("RayBasicScheduler", {ACTORS: "73.0"}, ["SIGMAS:SIGMAS"], ["simple", 10, 1]),
            767: Old("KSamplerSelect", {}, ["SAMPLER:SAMPLER"], ["euler"]),
            **_words("old_clip.safetensors", "a red kite", ""),
            20: LATENT,
            70: Old(
                "XFuserSamplerCustom",
                {
                    ACTORS: "73.0",
                    **PROMPTED,
                    "sampler:SAMPLER": "767.0",
                    "sigmas:SIGMAS": "74.0",
                    "latent_image:LATENT": "20.0",
                },
                ["output:LATENT", "denoised_output:LATENT"],
                [True, 1002306010547213, "randomize", 1],
            ),
            **_decoded(70),
        },
        # an initializer with a kernel where it had a switch, and conditions in two groups
        "kernel_for_a_switch": {
            900: _initializer("local", "default", 2, 1, 1, 2, False, False, "TORCH", "TORCH"),
            51: _loader("old_sdxl.safetensors"),
            **_words("old_clip.safetensors", "a fox", "a dog"),
            20: LATENT,
            46: Old(
                "XFuserKSamplerAdvanced",
                {ACTORS: "51.0", **PROMPTED, "latent_image:LATENT": "20.0"},
                ["LATENT:LATENT"],
                STEPS,
            ),
            **_decoded(46),
        },
    }
)


def write(folder: Path) -> list[Path]:
    """Write all of them; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json" for name in FILES]
    for path in paths:
        path.write_text(json.dumps(canvas(FILES[path.stem]), indent=1) + "\n", encoding="utf-8")
    return paths


def canvas(nodes: Mapping[int, Old]) -> dict[str, Any]:
    """A file as the page saves it."""
    links: list[list[Any]] = []
    for target, node in nodes.items():
        for socket, (name, origin) in enumerate(node.inputs.items()):
            if origin:
                number, output = map(int, origin.split("."))
                links.append([300 + len(links), number, output, target, socket, name.partition(":")[2]])
    return {
        "last_node_id": max(nodes),
        "last_link_id": 300 + len(links),
        "nodes": [_saved(number, place, node, links) for place, (number, node) in enumerate(nodes.items())],
        "links": links,
        "groups": [{"title": "all", "bounding": [0, 0, 2000, 900], "color": "#3f789e", "font_size": 24, "flags": {}}],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _saved(number: int, place: int, node: Old, links: Sequence[Sequence[Any]]) -> dict[str, Any]:
    inputs, outputs = [], []
    for socket, entry in enumerate(node.inputs):
        name, _, kind = entry.partition(":")
        wired = [link[0] for link in links if (link[3], link[4]) == (number, socket)]
        inputs.append({"name": name, "type": kind, "link": wired[0] if wired else None})
    for output, entry in enumerate(node.outputs):
        name, _, kind = entry.partition(":")
        wired = [link[0] for link in links if (link[1], link[2]) == (number, output)]
        outputs.append({"name": name, "type": kind, "links": wired or None, "slot_index": output})
    return {
        "id": number,
        "type": node.type,
        "pos": [40 + 330 * (place % 6), 40 + 260 * (place // 6)],
        "size": [300, 220],
        "flags": {},
        "order": place,
        "mode": node.mode,
        "inputs": inputs,
        "outputs": outputs,
        "properties": {"Node name for S&R": node.type, **node.properties},
        "widgets_values": list(node.values),
    }
