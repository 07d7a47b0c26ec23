"""One member of every model family: the pool's latents equal plain ComfyUI's, or the pool refuses to split it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_raylight.patches import registry
from comfy_raylight.tests.conftest import version_of
from comfy_raylight.tests.host import families
from comfy_raylight.tests.host.checkpoints import write
from comfy_raylight.tests.host.client import ComfyClient, PromptError
from comfy_raylight.tests.host.large import LARGE
from comfy_raylight.tests.host.prompts import LOADER, PoolCase, plain, pool
from comfy_raylight.tests.host.server import ComfyServer

from .test_sampling import FP32, both

FOLDER = "families"
"""Of the checkpoints: other tests have files of the same names in other sizes."""
VERIFY = Path(__file__).resolve().parents[1] / "host" / "verify.py"
ON_TWO = PoolCase(workers=2, ulysses=2, through_model=True)


def missing(name: str, root: Path) -> str:
    """Why a family is not tried with this ComfyUI, or ""."""
    if name not in families.of_version(version_of(root), large=True):
        return "this ComfyUI does not have it, or not in a small size"
    return "" if LARGE or not families.FAMILIES[name].large else "large: RAYLIGHT_TEST_LARGE=1 tries it"


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest, server: ComfyServer, comfy_root: Path) -> Iterator[list[str]]:
    """The families that are about to be tried, with their files, which go again: together they have 2 GB."""
    folder = server.models / FOLDER
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in families.FAMILIES if not missing(name, comfy_root)]
    names = [name for name in names if name in asked] or names
    jobs = {job.path: job for job in (families.job(name, folder) for name in names)}
    write(list(jobs.values()), comfy_root=comfy_root, python=Path(sys.executable))
    yield names
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not LARGE, reason="it tests the tests' inputs, for minutes: RAYLIGHT_TEST_LARGE=1 runs it")
def test_every_input_counts(server: ComfyServer, chosen: list[str], comfy_root: Path) -> None:
    """The comparisons below would be blind to an input that leaves plain ComfyUI's result as it is."""
    names = [name for name in chosen if families.FAMILIES[name].model in registry.FAMILIES]
    command = [sys.executable, str(VERIFY), "--comfy", str(comfy_root), str(server.models / FOLDER), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(lines) == len(names), "\n".join([*lines, done.stderr[-2000:]])


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_family(server: ComfyServer, client: ComfyClient, comfy_root: Path, name: str) -> None:
    if reason := missing(name, comfy_root):
        pytest.skip(reason)
    sampling = families.case(name, folder=FOLDER)
    if families.FAMILIES[name].model not in registry.UNSPLIT:
        difference, _, _ = both(server, client, sampling, ON_TWO)
        assert difference <= FP32
    else:
        client.run(plain(dataclasses.replace(sampling, name="plain")))
        with pytest.raises(PromptError, match="cannot split the model family.*Set ulysses_degree") as caught:
            client.run(pool(sampling, ON_TWO))
        assert caught.value.node == LOADER
        # no plan is needed where nothing is divided
        for where in (dataclasses.replace(ON_TWO, ulysses=1, cfg=2), dataclasses.replace(ON_TWO, ulysses=1)):
            difference, _, _ = both(server, client, sampling, where)
            assert difference <= FP32
