"""Two users, 150 prompts: every picture is right, and nothing grows."""

from __future__ import annotations

import random
import threading

import psutil
from comfy_raylight.tests.conftest import SLOW
from comfy_raylight.tests.host.client import PromptError
from comfy_raylight.tests.host.prompts import FAMILIES, INIT, Case, pool
from comfy_raylight.tests.host.server import ComfyServer

PROMPTS, SEEDS = 75, 5
MEMORY = 128 << 20
"""Bytes that ComfyUI and its workers may have more in the end: caches that were not full yet."""

pytestmark = SLOW


def case(who: str, number: int) -> Case:
    # ComfyUI answers an equal prompt from its cache
    sampling = {"seed": number % SEEDS, "end": 10000 - number}
    return Case(file="wan.safetensors", inputs=FAMILIES["wan"], name=f"soak_{who}_{number}", **sampling)  # type: ignore[arg-type]


def held(server: ComfyServer) -> tuple[int, int, int]:
    """Processes, descriptors and private bytes of ComfyUI and all it has started."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    memory = sum(process.memory_full_info().uss for process in family)
    return len(family), sum(process.num_fds() for process in family), memory


def use(server: ComfyServer, who: str, numbers: range, seen: list[str]) -> None:
    """What one user does: mostly good prompts, some that cannot be, some cancelled."""
    choose = random.Random(who)
    with server.client() as client:
        for number in numbers:
            prompt = pool(case(who, number))
            way = choose.random()
            if way < 0.1:
                prompt[INIT]["inputs"]["GPU"] = 10**12
            prompt_id = client.queue(prompt)
            if 0.1 <= way < 0.2:
                client.interrupt()
            try:
                client.wait(prompt_id)
                seen.append("done")
            except PromptError as error:
                seen.append(error.kind)
                assert error.kind == "interrupted" or "GPU is larger" in error.text, error.text


def test_soak(server: ComfyServer) -> None:
    seen: list[str] = []
    wanted: dict[int, bytes] = {}
    with server.client() as client:
        for number in range(SEEDS):
            client.run(pool(case("first", number)))
            wanted[number] = (server.output / f"soak_first_{number}.safetensors").read_bytes()
    use(server, "warm", range(10), [])
    before = held(server)
    users = [threading.Thread(target=use, args=(server, who, range(PROMPTS), seen)) for who in ("one", "two")]
    for user in users:
        user.start()
    for user in users:
        user.join()
    after = held(server)
    assert len(seen) == 2 * PROMPTS and seen.count("done") > PROMPTS
    for who in ("one", "two"):
        for number in range(PROMPTS):
            path = server.output / f"soak_{who}_{number}.safetensors"
            assert not path.exists() or path.read_bytes() == wanted[number % SEEDS], path.name
    assert after[0] == before[0], "processes"
    assert after[1] <= before[1] + 16, "descriptors"
    assert after[2] <= before[2] + MEMORY, "memory"
