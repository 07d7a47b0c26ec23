"""What only the model on a pool of two cfg groups can show: who works when, what crosses, how it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from comfy_raylight.tests.dropin.driver import must
from comfy_raylight.tests.sweep.sweep import difference

from .cfg_bench import GROUPS, WAN, WAN4, Bench, infos
from .cfg_checks import around_model, drawing

Fact = Callable[[Bench], None]

FACTS: dict[str, tuple[Fact, tuple[str, ...]]] = {}
"""By name: a function whose AssertionError tells what is wrong, and the settings to ask it in."""


def fact(*settings: str) -> Callable[[Fact], Fact]:
    def register(function: Fact) -> Fact:
        FACTS[function.__name__.replace("_", " ")] = (function, settings)
        return function

    return register


@fact(WAN)
def random_numbers_for_two_are_refused(bench: Bench) -> None:
    from comfy_raylight.raylight.errors import UnsupportedError

    for add in (None, around_model):
        patched = drawing(bench.far)
        if add is not None:
            add(patched, lambda seen: None)
        try:
            bench.picture(patched)
        except UnsupportedError as error:
            must("cfg_degree to 1" in str(error), f"no remedy: {error}")
        else:
            raise AssertionError("it was not refused")


# ---- what only the pool shows --------------------------------------------------------------------


@fact(WAN, WAN4)
def groups_work_at_the_same_time(bench: Bench) -> None:
    """Each rank waits inside the model for a sign of all others."""
    folder, world = str(bench.folder), bench.config.parallel.world

    def meet(attention: Any, *args: Any, **more: Any) -> Any:
        import os
        import time

        import torch

        with open(f"{folder}/met{torch.distributed.get_rank()}", "w"):
            end = time.monotonic() + 20
        while sum(name.startswith("met") for name in os.listdir(folder)) < world:
            if time.monotonic() > end:
                raise TimeoutError("the other group does not come")
            time.sleep(0.01)
        return attention(*args, **more)

    patched = bench.far.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = meet
    apart = difference(bench.picture(patched), bench.first)
    must(apart == 0, f"the picture differs by {apart:.1e}")


@fact(WAN)
def a_condition_crosses_once_and_to_its_group_only(bench: Bench) -> None:
    positive, negative = bench.text(31), bench.text(32, tokens=2 * bench.family.tokens)
    sizes = [positive[0][0].nbytes, negative[0][0].nbytes]
    before, steps = bench.sent(), 6
    bench.picture(bench.far, positive=positive, negative=negative, steps=steps)
    latents = steps * bench.noise()["samples"].nbytes
    sent = [now - then - latents for now, then in zip(bench.sent(), before, strict=True)]
    must(
        all(size <= found < 1.2 * size for size, found in zip(sizes, sent, strict=True)),
        f"{sent} bytes besides latents, the conditions have {sizes}",
    )


@fact(WAN)
def nothing_to_divide_is_said_once(bench: Bench) -> None:
    for run in range(2):
        with infos() as lines:
            bench.picture(bench.far, cfg=1.0, steps=3)
        said = [line for line in lines if "cfg_degree=2 has nothing to divide" in line]
        must(len(said) == 1, f"run {run}: it was said {len(said)} times")
    with infos() as lines:
        bench.picture(bench.far)
    must(not lines, f"it was said at cfg 4: {lines}")


@fact(WAN)
def a_group_whose_device_waits_for_python_records(bench: Bench) -> None:
    """The other one does not."""
    from comfy_raylight.tests.workers.faults import end_waiting, in_worker, wait_for_python
    from comfy_raylight.workers.driver import report
    from comfy_raylight.workers.pool.pool import REGISTRY

    usual, pool = bench.picture(bench.far, steps=6), REGISTRY[bench.config]
    in_worker(pool, wait_for_python, rank=1)
    try:
        apart = difference(bench.picture(bench.far, steps=6), usual)
        workers = report.collect(bench.far.rpc).workers
    finally:
        in_worker(pool, end_waiting, rank=1)
        bench.far.rpc._groups().parts[1]._recorded.clear()
    recorded = [sum(model.recorded for model in worker.models) for worker in workers]
    must(recorded == [0, 1], f"the groups recorded {recorded} calls")
    must(apart == 0, f"the picture differs by {apart:.1e}")


def failing(bench: Bench, first: int) -> str:
    """Sample with a patch that fails on ranks from `first` on, while the others take their time; the error."""
    from comfy_raylight.raylight.errors import WorkerError
    from comfy_raylight.tests.workers.faults import fail

    def override(attention: Any, *args: Any, **more: Any) -> Any:
        import time

        import torch

        if torch.distributed.get_rank() >= first:
            fail()
        time.sleep(0.4)
        return attention(*args, **more)

    patched = bench.far.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    try:
        bench.picture(patched)
    except WorkerError as error:
        return str(error)
    raise AssertionError("it did not fail")


@fact(WAN, WAN4)
def failure_of_a_whole_group_leaves_the_pool(bench: Bench) -> None:
    """The other group ends its call first, though it takes longer than the ranks of one group wait for another."""
    from comfy_raylight.workers.pool.pool import REGISTRY

    pool, size = REGISTRY[bench.config], bench.config.parallel.sequence
    error = failing(bench, size)
    must(f"Worker {size} failed" in error and "a patch went wrong" in error, error)
    must(REGISTRY.get(bench.config) is pool and pool.alive(), "the pool was lost")


@fact(WAN4)
def failure_of_a_part_of_a_group_ends_the_pool(bench: Bench) -> None:
    from comfy_raylight.workers.pool.pool import REGISTRY

    error = failing(bench, 3)
    must("Worker 3 failed" in error and "a patch went wrong" in error, error)
    must(bench.config not in REGISTRY, "the pool is still there")


@fact(WAN)
def what_cannot_be_sent_for_one_group_leaves_the_other_right(bench: Bench) -> None:
    """The first group's parcel is packed when the second's fails."""
    from comfy_raylight.raylight.errors import UnsupportedError

    def wrapper(executor: Any, model: Any, conds: Any, *more: Any) -> Any:
        return executor(model, conds, *more)

    import comfy.conds

    positive, negative = bench.text(41), bench.text(42)
    original = bench.far.model.extra_conds

    def with_lock(**given: Any) -> Any:
        found = original(**given)
        if given["cross_attn"].flatten()[0] == negative[0][0].flatten()[0]:
            found["lock"] = comfy.conds.CONDConstant(threading.Lock())
        return found

    bench.far.model.extra_conds = with_lock
    try:
        bench.picture(bench.far, positive=positive, negative=negative)
    except UnsupportedError as error:
        must("cannot be sent" in str(error), str(error))
    else:
        raise AssertionError("it was sent")
    finally:
        del bench.far.model.extra_conds
    expected = bench.picture(bench.plain, positive=positive, negative=negative)
    apart = difference(bench.picture(bench.far, positive=positive, negative=negative), expected)
    must(apart <= 1e-5, f"then the picture differs by {apart:.1e}")


@fact(WAN)
def killed_worker_ends_the_call_and_a_new_pool_works(bench: Bench) -> None:
    import os
    import signal

    from comfy_raylight.raylight.errors import WorkerError
    from comfy_raylight.workers.pool.pool import REGISTRY

    last = bench.config.parallel.world - 1

    def override(attention: Any, *args: Any, **more: Any) -> Any:
        import torch

        if torch.distributed.get_rank() == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return attention(*args, **more)

    patched = bench.far.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    try:
        bench.picture(patched)
    except WorkerError as error:
        must(f"Worker {last} " in str(error) and "died" in str(error), str(error))
    else:
        raise AssertionError("it did not fail")
    must(bench.config not in REGISTRY, "the pool is still there")


@fact(WAN, WAN4)
def interrupt_between_the_conditions(bench: Bench) -> None:
    """Both conditions wait for their answers when ComfyUI's flag is set; all of its code unwinds."""
    from comfy import model_management

    link: Any = bench.far.rpc
    usual, ended = link.answer, []

    def answer(calls: Any, **more: Any) -> Any:
        must(len(calls) == GROUPS, f"{len(calls)} conditions wait")
        model_management.interrupt_current_processing()
        return usual(calls, **more)

    def sampling(sampler: Any) -> Any:
        class Watched(type(sampler)):  # type: ignore[misc]
            def calculate_input(self, *given: Any) -> Any:
                try:
                    return super().calculate_input(*given)
                finally:
                    ended.append(threading.get_ident())

        return Watched

    patched = bench.far.clone()
    original = patched.model.model_sampling
    object_patch = sampling(original)(patched.model.model_config)
    patched.add_object_patch("model_sampling", object_patch)
    link.answer = answer
    before = threading.active_count()
    try:
        bench.picture(patched)
    except model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("it was not interrupted")
    finally:
        del link.answer
        model_management.interrupt_current_processing(False)
    must(set(ended) == {threading.get_ident()}, "ComfyUI's code ran in another thread")
    must(threading.active_count() == before, "a thread is left")


@fact(WAN)
def unloading_all_models_reaches_both_groups(bench: Bench) -> None:
    from comfy import model_management
    from comfy_raylight.workers.pool.pool import REGISTRY

    bench.picture(bench.far)
    pool: Any = REGISTRY[bench.config]
    asked: list[Any] = []

    def call_groups(verb: str, groups: Any) -> Any:
        asked.append((verb, [list(ranks) for ranks, _ in groups]))
        return type(pool).call_groups(pool, verb, groups)

    pool.call_groups = call_groups
    try:
        model_management.unload_all_models()
    finally:
        del pool.call_groups
    must(asked == [("offload", [[0], [1]])], f"the workers were asked {asked}")
