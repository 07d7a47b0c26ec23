"""Every core node that takes and returns a MODEL, on the pool and plainly; the verdicts become docs/core-nodes.md."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from comfy_raylight.tests.conftest import SLOW, version_of
from comfy_raylight.tests.host import documents
from comfy_raylight.tests.host.checkpoints import Job, write
from comfy_raylight.tests.host.large import LARGE, WHY
from comfy_raylight.tests.host.reports import reporter
from comfy_raylight.tests.sweep.sweep import FINE

PACK = Path(__file__).resolve().parents[2]
SCRIPT = PACK / "tests" / "sweep" / "sweep.py"
TABLE = PACK / "docs" / "core-nodes.md"
TIMEOUT_S = 900
"""For one family, which takes one or two minutes on two cores."""
WORKERS: Mapping[str, int] = {"wan": 2, "flux": 2, "unet": 2}
"""Pool size per family."""
SIZES: Mapping[str, Mapping[str, int]] = {
    "wan": {},
    "flux": {"context": 64, "pooled": 32, "double": 2, "single": 2},
    "unet": {},
}

INTRODUCTION = """\
# ComfyUI's own nodes on the pool

Every node of ComfyUI that takes a MODEL and returns one, given to a model on the pool and to the same model in plain
ComfyUI. `RAYLIGHT_TEST_LARGE=1 python tests/run.py tests/sweep` writes this file; do not edit it.

Each node ran with its default inputs, or with others where the defaults do nothing to a model this small, and two
steps of euler at cfg 3 (ten for caches) on small random checkpoints, on CPUs. Afterwards the model without the node had
to give its first picture again. Loaders got a small LoRA or hypernetwork file and no CLIP, merging nodes a second
checkpoint, nodes with a VAE or a model patch a small stand-in.

| result | meaning |
|---|---|
| equal | the pool's picture is the plain one |
| equal (idle) | the same, but the node changed nothing in plain ComfyUI either, so this says little |
| equal (unsettled) | over 1e-5 apart, but no more than twice what the last digit of the noise changes in plain |
| same error | plain ComfyUI and the pool fail with the same kind of error: the node is not for this family |
| refused | the pool refuses with an error that names the node or what it brings, and the reason; no picture is made |
| not tried | the node needs something that the test cannot make |
"""


def families(root: Path) -> list[str]:
    """Those with a checkpoint of a few megabytes: ComfyUI before 0.4 takes every Flux to be 3072 wide."""
    narrow = "txt_ids_dims" in (root / "comfy" / "ldm" / "flux" / "model.py").read_text(encoding="utf-8")
    return [family for family in WORKERS if narrow or family != "flux"]


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs the script once per ComfyUI and family."""
    folder = tmp_path_factory.mktemp("sweep")

    def run(root: Path, family: str) -> dict[str, Any]:
        return reports[family](root)

    def arguments(family: str, root: Path) -> list[object]:
        files = [folder / f"{family}-{version_of(root)}-{seed}.safetensors" for seed in (0, 1)]
        write(
            [
                Job(family=family, path=path, dtype="float32", seed=seed, size=SIZES[family])
                for seed, path in enumerate(files)
            ],
            comfy_root=root,
            python=Path(sys.executable),
        )
        return ["--second", files[1], "--model", f"{family}={files[0]}:{WORKERS[family]}"]

    reports = {
        family: reporter(str(SCRIPT), folder, functools.partial(arguments, family), timeout=TIMEOUT_S)
        for family in WORKERS
    }
    return run


@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.parametrize("family", WORKERS)
def test_nodes_equal_plain(sweep: Any, comfy_root: Path, family: str) -> None:
    if family not in families(comfy_root):
        pytest.skip(f"this ComfyUI detects no small {family}")
    if family != "wan" and not LARGE:
        pytest.skip(WHY)
    nodes = sweep(comfy_root, family)["nodes"]
    assert "KSampler" not in nodes
    assert nodes.keys() >= {"LoraLoaderModelOnly", "ModelMergeSimple", "ModelSamplingSD3", "TorchCompileModel"}
    wrong = {name: result for name, result in nodes.items() if result["verdict"] not in FINE}
    lines = [f"{name}: {result['verdict']}: {result['reason']}" for name, result in wrong.items()]
    assert not wrong, f"{len(wrong)} of {len(nodes)} nodes:\n" + "\n".join(lines)


@pytest.mark.timeout(len(WORKERS) * TIMEOUT_S)
def test_known_limits_are_refused(sweep: Any, comfy_root: Path) -> None:
    nodes = sweep(comfy_root, "wan")["nodes"]
    wanted = {"SelfAttentionGuidance", "TorchCompileModel", "LoraLoaderBypassModelOnly", "USOStyleReference"}
    verdicts = {name: nodes[name]["verdict"] for name in wanted & nodes.keys()}
    assert set(verdicts.values()) == {"refused"}, verdicts


@pytest.mark.timeout(len(WORKERS) * TIMEOUT_S)
@SLOW
def test_table_is_written(sweep: Any, comfy_root: Path) -> None:
    reports = [sweep(comfy_root, family) for family in families(comfy_root)]
    version, section = reports[0]["comfy"], _section(reports)
    old = TABLE.read_text(encoding="utf-8") if TABLE.is_file() else ""
    new = documents.with_section(old, INTRODUCTION, version, section)
    if new != old:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(new, encoding="utf-8", newline="\n")
    assert section in TABLE.read_text(encoding="utf-8")


def _section(reports: list[dict[str, Any]]) -> str:
    """One ComfyUI's table, without anything that differs from run to run."""
    titles = [f"{report['family']}, {_count(report['workers'], 'worker')}" for report in reports]
    lines = [f"| node | {' | '.join(titles)} | remarks |", "|---" * (len(titles) + 2) + "|"]
    for name in sorted({name for report in reports for name in report["nodes"]}):
        results = {report["family"]: report["nodes"][name] for report in reports}
        cells = [_cell(result) for result in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {_remarks(results)} |")
    return "\n".join(lines) + "\n"


def _cell(result: Mapping[str, str]) -> str:
    idle = result["verdict"] == "equal" and result["reason"]
    return "equal (idle)" if idle else result["verdict"]


def _remarks(results: Mapping[str, Mapping[str, str]]) -> str:
    """The reasons of a row; families with the same one share it."""
    by_reason: dict[str, list[str]] = {}
    for family, result in results.items():
        if result["reason"] and result["verdict"] != "equal":
            by_reason.setdefault(result["reason"], []).append(family)
    parts = [
        _escaped(reason) if len(named) == len(results) else f"{', '.join(named)}: {_escaped(reason)}"
        for reason, named in by_reason.items()
    ]
    return "; ".join(parts)


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_`])", r"\\\1", text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
