"""Files that workflows name, so that a ComfyUI has them in its lists: empty ones, for prompts that are not run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
OLD = sorted((ROOT.parent / "shared" / "workflows").glob("*.json"))
"""Files of the earlier pack, as its users have them, where a folder beside this one has some."""
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
PROMPTS = sorted((ROOT / "examples" / "api").glob("*.json"))
FOLDERS = ("diffusion_models", "checkpoints", "vae", "text_encoders", "loras", "clip_vision")
NAMED = re.compile(r'"([^"\n:\\]+\.(?:safetensors|gguf|png|jpg))"')


def copy_demo(base: Path) -> None:
    """What the README says: the demo's files into the folder that has ComfyUI's models."""
    (base / "models").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "examples" / "install_demo.py"), str(base)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def demo_prompt(words: Sequence[str], name: str = "demo") -> dict[str, Any]:
    """A prompt of the examples for the demo's model, with other words: colour, shape and direction."""
    prompt: dict[str, Any] = json.loads((ROOT / "examples" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    (text,) = (node for node in prompt.values() if node.get("_meta", {}).get("title") == "Prompt")
    text["inputs"]["text"] = " ".join(words)
    return prompt


def write_named(base: Path, workflows: Iterable[Path]) -> None:
    """Empty models and grey pictures of the names in these files; those that are there stay."""
    for workflow in workflows:
        for name in NAMED.findall(workflow.read_text(encoding="utf-8")):
            if name.endswith((".png", ".jpg")):
                path = base / "input" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 64), "grey").save(path)
                continue
            for folder in FOLDERS:
                path = base / "models" / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    path.touch()
