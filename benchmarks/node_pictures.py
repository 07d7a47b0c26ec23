"""Draws each node as it is wired, for its help page: web/docs/pictures.

    python benchmarks/node_pictures.py [--comfy PATH] [--only NODE ...]

ComfyUI's own page draws them, which needs a Chromium (Debian's `chromium`). Afterwards `benchmarks/help.py --write`
puts new ones into the pages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import environment
from environment import setup

BEFORE = {
    "RAY_ACTORS_INIT": "RayInitializer",
    "RAY_ACTORS": "RayUNETLoader",
    "RAY_LORA": "RayLoraLoader",
    "RAY_GUIDER,GUIDER": "RayCFGGuider",
    "CONDITIONING": "CLIPTextEncode",
    "LATENT": "EmptySD3LatentImage",
    "SIGMAS": "RayBasicScheduler",
    "SAMPLER": "KSamplerSelect",
    "NOISE": "DPNoiseList",
    "IMAGE": "LoadImage",
    "VAE": "VAELoader",
    "AUDIO": "LoadAudio",
    "RAY_CONTROL_NET,CONTROL_NET": "RayControlNetLoader",
}
"""What a socket is usually connected to, by its type."""
AFTER = {
    "RAY_ACTORS_INIT": "RayUNETLoader",
    "RAY_ACTORS": "XFuserKSamplerAdvanced",
    "RAY_LORA": "RayUNETLoader",
    "RAY_GUIDER": "XFuserSamplerCustomAdvanced",
    "CONDITIONING": "DPKSamplerAdvanced",
    "LATENT": "VAEDecode",
    "SIGMAS": "XFuserSamplerCustom",
    "SAMPLER": "XFuserSamplerCustom",
    "NOISE": "DPKSamplerAdvanced",
    "IMAGE": "PreviewImage",
    "RAY_CONTROL_NET": "RayControlNetApply",
    "RAY_VAE": "",
    "VAE": "VAEDecode",
    "STRING": "PreviewAny",
    "FLOAT": "",
}
WIRE = """([type, before, after]) => {
    app.graph.clear()
    const place = (kind, x, y) => {
        const node = LiteGraph.createNode(kind)
        app.graph.add(node)
        node.pos = [x, y]
        return node
    }
    const node = place(type, 0, 0)
    const found = {}
    let y = 0
    node.inputs.forEach((input, slot) => {
        const kind = before[input.type]
        if (!kind || input.widget || kind === type) return
        const key = input.type === "CONDITIONING" ? input.name : input.type
        if (Object.keys(found).length > 5) return
        if (!found[key]) {
            found[key] = place(kind, 0, y)
            found[key].pos[0] = -found[key].size[0] - 110
            y += found[key].size[1] + 60
        }
        const outputs = found[key].outputs
        const types = input.type.split(",")
        found[key].connect(outputs.findIndex(output => types.includes(output.type)) , node, slot)
    })
    y = 0
    const used = {}
    node.outputs.forEach((output, slot) => {
        const kind = after[output.type]
        if (!kind || kind === type) return
        if (!used[kind]) {
            used[kind] = place(kind, node.size[0] + 110, y)
            y += used[kind].size[1] + 60
        }
        const free = used[kind].inputs.findIndex(input => input.link == null && (input.type === "*" ||
            input.type.split(",").includes(output.type)) && (!input.widget || kind === "PreviewAny"))
        if (free >= 0) node.connect(slot, used[kind], free)
    })
}"""


def main() -> int:
    """Set up, then draw in the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, help="root of a ComfyUI (default: the test host)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NODE")
    options = parser.parse_args()
    code = environment.within_browser(options.comfy)
    if code is not None:
        return code
    from browser import files
    from browser.canvas import opened
    from host import help_pages
    from host.server import ComfyServer

    with tempfile.TemporaryDirectory() as folder:
        files.copy_demo(Path(folder))
        with ComfyServer(options.comfy or setup.COMFY, base=Path(folder)) as server, opened(server.url) as canvas:
            with server.client() as client:
                nodes = options.only or list(help_pages.of_pack(client.object_info()))
            for name in nodes:
                canvas.page.evaluate(WIRE, [name, BEFORE, AFTER])
                canvas.picture(help_pages.PICTURES / f"{name}.jpg", quality=70, largest=1.0)
                print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
