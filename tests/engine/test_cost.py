"""The cost model: what it must say whatever the rates are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from comfy_raylight.raylight import cost

MACHINE = cost.Machine(linear=1e14, attention=8e13, link=1e10, latency=5e-5, call=4e-3)
VIDEO = cost.Work(tokens=32768, width=4096, blocks=40, weights=2e8)


def test_ulysses_and_ring_send_the_same_between_two() -> None:
    sent = cost.attention_bytes(VIDEO, ulysses=2, ring=1)
    # 4 tensors of half the tokens, half of which leave
    assert sent == 40 * 4 * 32768 / 2 * 4096 * 2 / 2
    assert cost.attention_bytes(VIDEO, ulysses=1, ring=2) == sent
    assert cost.attention_bytes(VIDEO, ulysses=1, ring=4) == 2 * cost.attention_bytes(VIDEO, ulysses=4, ring=1)


def test_one_rank_sends_nothing_and_gains_nothing() -> None:
    assert cost.attention_bytes(VIDEO, ulysses=1, ring=1) == cost.exit_bytes(VIDEO, ranks=1) == 0
    assert cost.speedup([VIDEO], MACHINE) == 1


@pytest.mark.parametrize("ranks", (2, 4, 8))
def test_speed_up_lies_between_none_and_perfect(ranks: int) -> None:
    gain = cost.speedup([VIDEO], MACHINE, ulysses=ranks)
    assert 1 < gain < ranks
    free = replace(MACHINE, link=float("inf"), latency=0.0, call=0.0)
    assert cost.speedup([VIDEO], free, ulysses=ranks) == pytest.approx(ranks)
    assert cost.speedup([replace(VIDEO, tokens=131072)], MACHINE, ulysses=ranks) > gain


def test_advice_is_for_short_sequences_only() -> None:
    least = cost.enough_tokens(VIDEO, MACHINE, ulysses=8)
    assert cost.advice([replace(VIDEO, tokens=least)], MACHINE, ulysses=8) == ""
    text = cost.advice([replace(VIDEO, tokens=least // 4)], MACHINE, ulysses=8)
    assert f"{least // 4} tokens" in text and "8 workers" in text and "cfg_degree" in text
    assert cost.advice([replace(VIDEO, tokens=1)], MACHINE) == cost.advice([], MACHINE, ulysses=2) == ""


def test_a_fast_device_waits_for_its_host() -> None:
    """However many ranks share a block, each has to start it."""
    short = replace(VIDEO, tokens=64)
    slow = replace(MACHINE, launch=1e-3, launch_shared=2e-3)
    assert cost.seconds([short], slow) == pytest.approx(40 * 1e-3)
    for ranks in (2, 8):
        assert cost.seconds([short], slow, ulysses=ranks) == pytest.approx(40 * 2e-3 + MACHINE.call)
    assert cost.speedup([VIDEO], slow, ulysses=8) == cost.speedup([VIDEO], MACHINE, ulysses=8)


def test_gathers_hide_behind_long_blocks() -> None:
    machine = replace(MACHINE, latency=0.0)
    whole = 2e8 * 2  # bytes of a block in bf16
    assert cost.gather_seconds(VIDEO, machine, ranks=4, weight_bytes=2) == pytest.approx(whole * 3 / 4 / 1e10)
    assert cost.gather_seconds(VIDEO, machine, ranks=4, weight_bytes=1) == pytest.approx(whole * 3 / 8 / 1e10)
    least = {ranks: cost.hidden_from(VIDEO, machine, ranks=ranks, weight_bytes=2) for ranks in (2, 4, 8)}
    assert least[2] < least[4] < least[8]
    # linear layers alone would take L * 4e8 / 1e14 / 2 s; the gather of 2 ranks takes 0.02 s
    assert least[2] / 2 < 10000
    assert cost.hidden_from(VIDEO, replace(machine, link=float("inf")), ranks=8, weight_bytes=2) == 64
