"""A dead link between two machines is told from a rank that computes for long; by real TCP, in two namespaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comfy_raylight.tests.host import machines
from comfy_raylight.tests.host.server import free_port

pytestmark = pytest.mark.skipif(not machines.possible(), reason="needs namespaces: Linux, and root")

PACE_S = 4.0
NOBODY = "02:00:00:00:00:01"
"""The address of no network card: what is sent to it arrives nowhere, and nobody says so."""


def test_a_dead_link_and_a_slow_rank() -> None:
    script = Path(__file__).with_name("linked.py")
    with machines.network() as (inside, first, second):
        command = [sys.executable, str(script)]
        told = [first, str(free_port()), str(PACE_S)]
        ranks = [
            subprocess.Popen([*prefix, *command, str(rank), *told], stdout=subprocess.PIPE, text=True)
            for rank, prefix in enumerate(([], inside))
        ]
        try:
            assert [_line(rank) for rank in ranks] == ["met ()"] * 2, "the slow rank was waited for"
            for prefix, there in ((["ip"], second), ([*inside, "ip"], first)):
                shown = subprocess.run(
                    [*prefix, "-o", "route", "get", there], check=True, capture_output=True, text=True
                )
                card = shown.stdout.split(" dev ")[1].split()[0]
                lost = [*prefix, "neigh", "replace", there, "lladdr", NOBODY, "dev", card, "nud", "permanent"]
                subprocess.run(lost, check=True)
            assert [_line(rank) for rank in ranks] == [f"ended ('{second}',)", f"ended ('{first}',)"]
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()


def _line(rank: subprocess.Popen[str]) -> str:
    assert rank.stdout is not None
    return rank.stdout.readline().strip()
