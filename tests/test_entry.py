"""The pack's entry: loaded as ComfyUI loads it, under one import name, without side effects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import asyncio, json, os, sys, threading
comfy, pack = sys.argv[1:3]
sys.argv = sys.argv[:1] + ["--cpu"]
sys.path.insert(0, comfy)
os.chdir(comfy)
import comfy.options
comfy.options.enable_args_parsing()
import nodes
before = dict(os.environ)
path = list(sys.path)
ok = asyncio.run(nodes.load_custom_node(pack))
ours = [name for name, module in sys.modules.items()
        if str(getattr(module, "__file__", "") or "").startswith(os.path.realpath(pack))
        or str(getattr(module, "__file__", "") or "").startswith(pack)]
import torch
print("RESULT " + json.dumps({
    "ok": ok,
    "nodes": sorted(n for n, c in nodes.NODE_CLASS_MAPPINGS.items() if c.__module__.startswith("comfy_raylight")),
    "modules": ours,
    "nodes module": sys.modules["nodes"].__file__,
    "heavy": sorted({"ray", "yunchang", "xfuser", "flash_attn", "sageattention"} & set(sys.modules)),
    "cuda": torch.cuda.is_initialized(),
    "environment changed": {k: v for k, v in os.environ.items() if before.get(k) != v},
    "path changed": [p for p in sys.path[: len(path)]] != path,
    "threads": [t.name for t in threading.enumerate() if "ray" in t.name.lower()],
}))
"""


def test_loaded_as_comfyui_does(comfy_root: Path, tmp_path: Path) -> None:
    pack = tmp_path / "ray.light-pack"
    pack.symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, "-c", SCRIPT, str(comfy_root), str(pack)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["ok"]
    assert {"RayInitializer", "RayInitializerAdvanced", "RayUNETLoader", "XFuserKSamplerAdvanced"} <= set(
        result["nodes"]
    )
    path_like = [name for name in result["modules"] if "/" in name or "\\" in name]
    assert path_like == [str(pack).replace(".", "_x_")], "only the root may have a name made from its path"
    assert Path(result["nodes module"]).parent == comfy_root
    assert result["heavy"] == [] and not result["cuda"] and result["threads"] == []
    assert result["environment changed"] == {} and not result["path changed"]


def test_names_of_another_comfyui(tmp_path: Path) -> None:
    """Where one is gone, the log says beside the traceback which ComfyUI this is."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "__init__.py").touch()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.99.0"\n')
    code = f"import importlib.util as u, logging, sys; sys.path.insert(0, {str(tmp_path)!r}); "
    code += f"logging.basicConfig(); s = u.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); m.NODE_CLASS_MAPPINGS"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode and "ModuleNotFoundError" in done.stderr
    assert "ComfyUI 0.99.0, newer than any that Raylight is tested with" in done.stderr


def test_root_imports_nothing_until_asked() -> None:
    """pytest imports a root with an `__init__.py`, where there may be no ComfyUI."""
    code = f"import importlib.util as u, sys; s = u.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); "
    code += "print(sorted(set(sys.modules) & {'torch', 'comfy', 'ray'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
