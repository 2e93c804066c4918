"""The recipe for a queue of your own, in a framework that uses only the protocol ``Queue``."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from types import SimpleNamespace

import pytest
import recipes
from gateway import TOKEN, Gateway, Op
from processes import until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from gateway_queue_sync import AcquireTimeout, LargeBotQueue, LocalQueue, Queue, SessionStartLimit

PATIENCE = 20.0


@pytest.fixture
def make():
    names = {"math": math, "threading": threading, "time": time, "AcquireTimeout": AcquireTimeout}
    return recipes.run("class PausableQueue", names)["PausableQueue"]


def test_it_is_a_queue_of_twenty_lines(make):
    assert isinstance(make(LocalQueue()), Queue)
    code = recipes.block("python", "class PausableQueue")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20


def test_a_framework_that_only_knows_the_protocol_starts_its_shards_with_it(make):
    """The framework is the bot of the README."""

    def connect_to(shard_id):
        connection = opened.enter_context(connect(gateway.url))
        assert json.loads(connection.recv())["op"] == Op.HELLO

        def run():
            with contextlib.suppress(ConnectionClosed):
                while True:
                    connection.recv()

        return SimpleNamespace(send=connection.send, run=run)

    def identify(shard_id):
        return json.dumps({"op": Op.IDENTIFY, "d": {"token": TOKEN, "shard": [shard_id, 4]}})

    queue = make(LocalQueue(interval=0.1, margin=0.2))
    names = {"mine": queue, "connect": connect_to, "identify": identify}
    before = set(threading.enumerate())
    with Gateway(interval=0.1) as gateway, contextlib.ExitStack() as opened:
        queue.running.clear()
        code = recipes.block("python", "def run_shard").replace("= LocalQueue()", "= mine")
        exec(code, names)
        until(lambda: len(gateway.connections) == 4, "all shards")
        assert queue.queue.snapshot().granted == 0
        queue.running.set()
        gateway.wait_for(set(range(4)))
        assert gateway.referee.refusals == []
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)


def test_paused_it_times_out_and_going_on_it_does_not(make):
    queue = make(LocalQueue())
    queue.running.clear()
    for timeout in (0, 0.01):
        with pytest.raises(AcquireTimeout) as caught:
            queue.acquire(3, timeout)
        assert (caught.value.shard_id, caught.value.timeout) == (3, timeout)
    queue.running.set()
    assert queue.acquire(3, 0).shard_id == 3
    with pytest.raises(AcquireTimeout):
        queue.acquire(3, 0.01)


def test_a_permit_that_comes_while_it_is_paused_goes_back(make, clock, crew):
    inner = LargeBotQueue(SessionStartLimit(10, 10, 600.0, 1), clock=clock)
    queue = make(inner)
    queue.acquire(0)
    call = crew(queue.acquire, 1)
    clock.settle(1)
    queue.running.clear()
    clock.advance(5.25)
    until(lambda: not inner.snapshot().waiting and inner.snapshot().limit.remaining == 9, "it")
    assert not call.done()
    queue.running.set()
    assert call.now().remaining == 8
