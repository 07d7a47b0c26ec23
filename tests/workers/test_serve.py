"""The worker's loop, without a pool: a worker that stays awake for the next request answers as any other."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
from comfy_raylight.workers import serve
from comfy_raylight.workers.messages import Reply, Request

WAIT_S = 10


class Awake:
    """In the place of a runner whose device is an accelerator: answers calls with their number."""

    may_stay_awake = True
    wire: Any = None
    closed = False

    def forward(self, request: int) -> int:
        return request

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def driver() -> Iterator[Connection]:
    here, there = Pipe()
    runner = Awake()
    thread = threading.Thread(target=serve.serve, args=(there, runner), daemon=True)
    thread.start()
    yield here
    here.close()
    thread.join(WAIT_S)
    assert runner.closed, "the worker looks for requests of a driver that has hung up"


def call(driver: Connection, number: int) -> None:
    driver.send_bytes(pickle.dumps(Request(id=number, verb="forward", arguments=(number,))))
    assert driver.poll(WAIT_S)
    reply: Reply = pickle.loads(driver.recv_bytes())
    assert (reply.id, reply.value, reply.failure) == (number, number, None)


def test_answers_awake_and_asleep(driver: Connection) -> None:
    call(driver, 1)
    call(driver, 2)
    time.sleep(2 * serve.AWAKE_S)
    before = time.process_time()
    time.sleep(10 * serve.AWAKE_S)
    assert time.process_time() - before < serve.AWAKE_S, "it sleeps by now"
    call(driver, 3)
