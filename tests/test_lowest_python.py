"""The lowest Python that the pack declares: what linters take it to be, and a real one where there is any."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("raylight", "patches", "loaders", "vae", "workers", "nodes")
CHECK = """
import ast, importlib.util, sys
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        tree = compile(file.read(), path, "exec", ast.PyCF_ONLY_AST)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            asked = [(name.name, "") for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            asked = [(node.module, name.name) for name in node.names]
        else:
            continue
        for module, name in asked:
            if module.partition(".")[0] in sys.stdlib_module_names:
                found = importlib.import_module(module)
                inside = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}")
                assert not name or hasattr(found, name) or inside, f"{path}: {module} has no {name}"
"""


def lowest() -> str:
    match = re.search(r'^requires-python = ">=(\d+\.\d+)"$', project(), re.M)
    assert match
    return match[1]


def project() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def installed() -> str:
    """An interpreter of that version, or ""."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python{lowest()}"), *map(str, pyenv.glob(f"versions/{lowest()}.*/bin/python"))]
    for python in filter(None, found):
        # a shim may stand for a version that is not there
        if subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0:
            return python
    return ""


def test_linters_know_the_lowest_python() -> None:
    """ruff refuses syntax that came later, mypy what the standard library got later."""
    assert f'target-version = "py{lowest().replace(".", "")}"' in project()
    assert f'python_version = "{lowest()}"' in project()


def test_the_pack_on_the_lowest_python() -> None:
    """Syntax, and every name that is imported from the standard library."""
    python = installed()
    if not python:
        pytest.skip(f"there is no Python {lowest()} here; lint and types are checked for it all the same")
    files = [ROOT / "__init__.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    command = [python, "-c", CHECK, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
