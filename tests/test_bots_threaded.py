"""The shards in threads, in the libraries that threaded bots use, against the gateway."""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
from contextlib import closing, contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import recipes
from gateway import TOKEN, Close, Gateway, Weather
from processes import until

from gateway_queue_sync import (
    LargeBotQueue,
    LocalQueue,
    NoOpQueue,
    PermitReported,
    Report,
    SessionStartLimit,
)
from gateway_queue_sync.recipes import betterdisco, threaded

PATIENCE = 30.0
WINDOW = {"interval": 0.2, "margin": 0.3}
STORM = Weather(
    connect_delay=0.05,
    jitter=0.05,
    lost=0.1,
    dropped=0.3,
    dropped_within=0.3,
    forgotten=0.5,
    asked=0.3,
)


@pytest.fixture(params=recipes.LIBRARIES)
def library(request):
    return request.param


@contextmanager
def running(library, gateway, queue, shards, token=TOKEN):
    """Run a thread for each shard, and have the gateway end them all by resetting the token."""
    shard = recipes.threaded_bot(library)
    bots = [shard(queue, token, shard_id, shards) for shard_id in range(shards)]
    threads = [threading.Thread(target=bot.run, args=(gateway.url,), daemon=True) for bot in bots]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        gateway.revoke()
        queue.close()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a shard goes on without a token"


@pytest.mark.slow
def test_48_shards_are_ready_in_a_storm_without_a_refusal(library):
    seed = random.randrange(1 << 32)
    print(f"{seed=}")
    rules = {"shards": 48, "max_concurrency": 16, "interval": WINDOW["interval"]}
    with Gateway(**rules, heartbeat=0.5, weather=STORM, seed=seed) as gateway:
        queue = LargeBotQueue.from_token(TOKEN, base_url=gateway.api, **WINDOW)
        with running(library, gateway, queue, 48):
            seen = "resumed", "not resumed", "asked"
            until(lambda: all(gateway.seen[what] for what in seen), "the storm")
            gateway.wait_for(set(range(48)))
            left, judge = queue.snapshot().limit, gateway.referee
            assert judge.refusals == []
            assert judge.accepted == gateway.seen["ready"] >= 48
            assert gateway.seen["resumed elsewhere"] == 0
            assert gateway.seen["timed out"] == 0
            assert left.total - left.remaining == judge.accepted + gateway.seen["lost"]


def test_a_heartbeat_is_sent_when_the_gateway_asks_for_it(library):
    """Its own would come within an hour."""
    with Gateway(heartbeat=3600.0, weather=Weather(asked=1.0)) as gateway:
        with running(library, gateway, NoOpQueue(), 1):
            until(lambda: gateway.seen["heartbeats"], "a heartbeat")


def test_without_a_queue_the_same_bot_is_refused(library):
    with Gateway(interval=60.0) as gateway, running(library, gateway, NoOpQueue(), 4):
        until(lambda: gateway.referee.refused >= 3, "refusals")
        assert len(gateway.started) == 1


def test_a_shard_that_must_identify_again_goes_ahead_of_a_cold_start(library):
    queue = LocalQueue(interval=0.2, margin=0.8)
    with Gateway(interval=0.2) as gateway, running(library, gateway, queue, 4):
        until(lambda: gateway.online and queue.snapshot().waiting == 3, "the cold start")
        gateway.sessions.clear()
        gateway.drop(online=True)
        until(lambda: len(gateway.started) == 2, "the second start")
        assert gateway.started[0] == gateway.started[1]


def test_a_refused_shard_tells_the_queue_and_comes_again_later(library):
    events = []
    with Gateway(interval=0.5) as gateway:
        queue = LocalQueue(interval=0.2, margin=0.1, observer=events.append)
        gateway.referee.identify(0)  # somebody else's, which this queue knows nothing of
        with running(library, gateway, queue, 1):
            gateway.wait_for({0})
    reports = [event.report for event in events if isinstance(event, PermitReported)]
    # The refusal may come before the thread that has sent the IDENTIFY says so.
    assert reports in (
        [Report.SENT, Report.REJECTED, Report.SENT],
        [Report.REJECTED, Report.SENT],
    )
    assert gateway.referee.shortest_gap < 0.5
    assert (gateway.referee.accepted, gateway.referee.refused) == (2, 1)


def test_a_connection_that_is_lost_in_line_costs_no_session_start(library):
    limit = SessionStartLimit(10, 10, 600.0, 1)
    with Gateway(interval=0.2) as gateway, LargeBotQueue(limit, interval=0.4, margin=0.1) as queue:
        queue.acquire(0)
        with running(library, gateway, queue, 1):
            until(lambda: queue.snapshot().waiting, "the shard")
            gateway.drop(online=False)
            gateway.wait_for({0})
        assert queue.snapshot().limit.remaining == 8


class Dying:
    """A connection whose first heartbeat fails, after ``before`` was called."""

    def __init__(self, sock, before):
        self.socket, self._before, self._ended = sock, before, threading.Event()
        self._messages = [json.dumps({"op": 10, "d": {"heartbeat_interval": 0}})]

    def receive(self):
        if self._messages:
            return self._messages.pop()
        assert self._ended.wait(PATIENCE)
        raise threaded.Closed(4004)

    def send(self, data):
        assert json.loads(data)["op"] == 1
        self._before()
        self._ended.set()
        raise ConnectionResetError

    def close(self, code):
        self._ended.set()

    def release(self):
        pass


def test_a_permit_that_comes_while_a_heartbeat_fails_is_given_back(clock):
    futures = []

    class Asked(LargeBotQueue):
        def enqueue(self, *args, **options):
            futures.append(super().enqueue(*args, **options))
            return futures[-1]

    def granted():
        clock.advance(10.0)
        assert futures[0].exception(PATIENCE) is None

    here, there = socket.socketpair()
    limit = SessionStartLimit(10, 10, 600.0, 1)
    with closing(here), closing(there), Asked(limit, clock=clock) as queue:
        queue.acquire(0)
        shard = threaded.Shard(queue, TOKEN, 0, 1, connect=lambda _: Dying(here, granted))
        shard.run("")
        until(lambda: futures[0].result().reported is Report.UNUSED, "the permit's return")
        assert queue.snapshot().limit.remaining == 9


def test_a_client_of_betterdisco_identifies_once_even_if_that_times_out(monkeypatch):
    sent, failed = [], threading.Event()

    class GatewayClient:
        ws = SimpleNamespace(is_closed=False)
        handle_invalid_session = None

        def send(self, op, data):
            sent.append(data)
            if len(sent) == 1:
                raise TimeoutError
            failed.set()

    module = ModuleType("disco.gateway.client")
    module.GatewayClient = GatewayClient
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(threading, "excepthook", lambda _: failed.set())
    betterdisco.queue_identify(NoOpQueue())
    GatewayClient().send(betterdisco.IDENTIFY, {"shard": [0, 1]})
    assert failed.wait(PATIENCE)
    assert len(sent) == 1


def test_a_wrong_token_ends_a_bot(library):
    with Gateway() as gateway, running(library, gateway, NoOpQueue(), 1, "wrong") as threads:
        threads[0].join(PATIENCE)
        assert not threads[0].is_alive()
    assert gateway.seen[Close.AUTHENTICATION_FAILED.name] == 1
