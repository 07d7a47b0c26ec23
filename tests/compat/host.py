"""A started ComfyUI with the pack: `python -m compat.host ROOT ROWS PATTERN ...`.

Whether it starts and has the nodes, and what the pool gives against plain ComfyUI over HTTP: families, kinds of files.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from comfy_raylight.tests.e2e import interface, published
from comfy_raylight.tests.host import families, prompts
from comfy_raylight.tests.host.api import ApiClient, Prompt, PromptError
from comfy_raylight.tests.host.checkpoints import write as write_checkpoints
from comfy_raylight.tests.host.server import PACK_FOLDER, ComfyServer, ServerError
from comfy_raylight.tests.weights.files import SAFETENSORS, write_gguf, write_variant
from comfy_raylight.workers.wire.node_facts import look
from safetensors.torch import load_file, save_file

from .rows import Row, chosen, short, write, wrong

IMPORTS, NODES, SAMPLING, FILES = "imports", "nodes", "sampling", "files"
SAMPLED = ("wan", "flux2", "hunyuan", "ltxv", "ltxav", "sd3", "unet")
"""Families that are sampled over HTTP; their checkpoints are small."""
GGUF = ("Q8_0", "Q4_K")
CLOSE = 1e-5
PROMPT_S = 240
"""Seconds for one prompt; the first one starts the workers."""
WAN = "wan.safetensors"


class Trial:
    """Prompts on a running ComfyUI, and what comes of them."""

    def __init__(self, server: ComfyServer) -> None:
        self.server = server
        self.client: ApiClient = server.api
        self._count = 0

    def latent(self, prompt: Prompt) -> torch.Tensor:
        """The latent of a prompt.

        Raises:
            PromptError, TimeoutError, ServerError: there is none.
        """
        self._count += 1
        name = f"latent{self._count}"
        prompt[prompts.SAVE]["inputs"]["name"] = name
        queued = self.client.queue(prompt)
        try:
            self.client.outputs(queued, timeout=PROMPT_S)
        except TimeoutError:
            self.client.interrupt()
            raise
        return load_file(self.server.output / f"{name}.safetensors")["samples"]

    def row(self, part: str, name: str, plain: Callable[[], Prompt], pool: Callable[[], Prompt]) -> Row:
        """What the pool makes of a prompt, beside plain ComfyUI."""
        try:
            expected = self.latent(plain())
        except (PromptError, TimeoutError) as error:
            if part == SAMPLING:
                return wrong(part, name, f"nothing to compare with, plain ComfyUI: {error}")
            return Row(part=part, name=name, state="absent", detail=short(f"plain ComfyUI: {error}"))
        try:
            found = self.latent(pool())
        except TimeoutError as error:
            return wrong(part, name, str(error))
        except PromptError as error:
            refused = any(kind in error.exception for kind in ("UnsupportedError", "MisfitError", "PlanError"))
            # a file that plain ComfyUI loads wrongly is refused on purpose
            refused = refused or (part == FILES and "LoadError" in error.exception)
            if not refused:
                return wrong(part, name, str(error))
            return Row(part=part, name=name, state="refused", detail=short(str(error)), fault=part != FILES)
        if expected.shape != found.shape or not expected.isfinite().all() or expected.std() <= 1e-3:
            return wrong(part, name, f"{list(found.shape)} in place of {list(expected.shape)}, or plain has no picture")
        apart = ((found - expected).abs().max() / expected.abs().max()).item()
        if not apart <= CLOSE:
            return wrong(part, name, f"{apart:.1e} off plain ComfyUI's latent")
        return Row(part=part, name=name, state="right", detail=f"{apart:.0e} off plain ComfyUI's latent")


def node_rows(info: dict[str, object]) -> Iterator[Row]:
    """A row for each node that is not as it was recorded, and one for all others."""
    missing = published.absent(info)
    wanted = sorted(set(interface.NODES) - missing)
    different = {name: found for name in wanted if (found := published.differences(info, name))}
    for name, found in different.items():
        yield wrong(NODES, name, "; ".join(found))
    for name in sorted(missing):
        detail = f"this ComfyUI has no {interface.NODES[name].needs}"
        yield Row(part=NODES, name=name, state="absent", detail=detail)
    if wanted != list(different):
        detail = f"{len(wanted) - len(different)} of {len(wanted)} nodes are as recorded"
        yield Row(part=NODES, name="interface", state="right", detail=detail)


def import_row(server: ComfyServer, info: dict[str, object]) -> Row:
    """Whether the pack is there, and why not."""
    ours = [name for name, node in info.items() if PACK_FOLDER in str(node["python_module"])]  # type: ignore[index]
    if ours:
        return Row(part=IMPORTS, name="the pack in ComfyUI", state="right", detail=f"{len(ours)} nodes")
    found = re.findall(r"^\w*(?:Error|Exception)\b.*$", server.log(), re.MULTILINE)
    return wrong(IMPORTS, "the pack in ComfyUI", found[-1] if found else server.tail())


def sampled(version: str) -> list[str]:
    """Families of SAMPLED that this ComfyUI has."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    return [name for name in SAMPLED if families.FAMILIES[name].since <= numbers]


def main(root: str, out: str, *patterns: str) -> None:
    """Write the rows of a started ComfyUI."""
    path = Path(out)
    version = look(root, "")["ComfyUI"]

    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(Path(root), base=Path(folder), threads=max(1, (os.cpu_count() or 2) // 2))
        names = [name for name in sampled(version) if chosen(patterns, SAMPLING, name)]
        kinds = [name for name in (*SAFETENSORS, *GGUF) if chosen(patterns, FILES, name)]
        needed = sorted({*names, *(["wan"] if kinds else [])})
        for name, why in unwritten(needed, server).items():
            write(path, wrong(SAMPLING, name, f"no checkpoint of it: {why}"))
            names = [each for each in names if each != name]
        try:
            server.start()
        except ServerError as error:
            write(path, wrong(IMPORTS, "ComfyUI with the pack", str(error)))
            return
        try:
            info = server.api.object_info()
            found = import_row(server, info)
            write(path, found)
            if found.fault:
                return
            for row in node_rows(info):
                if chosen(patterns, NODES, row.name):
                    write(path, row)
            trial = Trial(server)
            for row in sampling_rows(trial, names):
                write(path, row)
            for row in file_rows(trial, kinds):
                write(path, row)
        except ServerError as error:
            write(path, wrong(IMPORTS, "ComfyUI with the pack", str(error)))
        finally:
            server.stop()


def unwritten(names: list[str], server: ComfyServer) -> dict[str, str]:
    """Write the checkpoints of families; why those that this ComfyUI cannot make are not there."""
    jobs = {name: families.job(name, server.models) for name in names}
    try:
        write_checkpoints(list(jobs.values()), comfy_root=server.comfy)
    except RuntimeError:
        found = {}
        for name, job in jobs.items():  # one by one, so that the others are there
            try:
                write_checkpoints([job], comfy_root=server.comfy)
            except RuntimeError as error:
                found[name] = str(error)
        return found
    return {}


def sampling_rows(trial: Trial, names: list[str]) -> Iterator[Row]:
    """Families on two workers."""
    where = prompts.PoolCase(workers=2, through_model=True)
    for name in names:
        case = families.case(name)
        yield trial.row(SAMPLING, name, lambda: prompts.plain(case), lambda: prompts.pool(case, where))  # noqa: B023


def file_rows(trial: Trial, names: list[str]) -> Iterator[Row]:
    """One model in each kind of file."""
    base = trial.server.models / WAN
    for name in names:
        if not base.is_file():
            return
        case = prompts.Case(file=f"wan-{name}.safetensors", inputs=prompts.FAMILIES["wan"])
        file = trial.server.models / case.file

        def plain() -> Prompt:
            return prompts.plain(case)  # noqa: B023

        def pool() -> Prompt:
            found = prompts.pool(case)  # noqa: B023
            return prompts.with_gguf(found, f"wan-{name}.gguf") if name in GGUF else found  # noqa: B023

        try:
            if name in GGUF:
                _, whole = write_gguf(base, file.with_suffix(".gguf"), name)
                save_file(whole, file)  # which plain ComfyUI can load
            else:
                write_variant(base, file, name)
        except Exception as error:  # what quantises it may be missing here, or another one than the tests know
            detail = short(f"no such file can be made here: {type(error).__name__}: {error}")
            yield Row(part=FILES, name=name, state="absent", detail=detail)
            continue
        yield trial.row(FILES, name, plain, pool)


if __name__ == "__main__":
    main(*sys.argv[1:])
