"""Deadlines hold, and no call blocks, while a ledger or Discord does not respond.

Times are those of the fastest of a few tries: on a machine that has other work, one may be slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time

import pytest
import redis_servers
from accounts import backend_of
from memory_backend import MemoryBackend, queue_on
from test_sqlite_faults import Holder

from gateway_queue_sync import (
    HttpQueue,
    LedgerError,
    QueueClosed,
    RedisQueue,
    SessionStartLimit,
    SqliteQueue,
    serve,
)
from gateway_queue_sync.aio import acquire
from gateway_queue_sync.clock import SYSTEM_CLOCK
from gateway_queue_sync.ledgers.shared import inquiry

QUICK = {"interval": 0.05, "margin": 0.05}
SETTINGS = {"limit": SessionStartLimit(1000, 1000, 0.0, 16), **QUICK}
PATIENCE = 20.0  # s a test waits for what must come
TIMEOUT = 0.3  # s
TRIES = 10


def with_permits(queue):
    """Return a queue, and some permits that it has granted."""
    return queue, [queue.acquire(shard_id, timeout=PATIENCE) for shard_id in range(2 * TRIES)]


@contextlib.contextmanager
def a_stopped_process_holds_the_file(folder):
    with SqliteQueue(folder / "q.sqlite3", **SETTINGS) as queue:
        made = with_permits(queue)
        holder = Holder(folder / "q.sqlite3", "BEGIN IMMEDIATE")
        try:
            yield made
        finally:
            holder.kill()


@contextlib.contextmanager
def redis_is_stopped(folder):
    if redis_servers.BINARY is None:
        pytest.skip(redis_servers.WITHOUT)
    server = redis_servers.RedisServer(folder)
    try:
        with RedisQueue(server.url, **SETTINGS) as queue:
            made = with_permits(queue)
            server.send(signal.SIGSTOP)
            yield made
            server.send(signal.SIGCONT)
    finally:
        server.stop()


class Relay:
    """A port before another, through which replies come one byte per second once ``drips`` is set."""

    def __init__(self, port):
        self._port = port
        self.drips, self.ends = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads, self._sockets = [], [self._listener]
        self._start(self._accept)

    def _start(self, function, *args):
        self._threads.append(threading.Thread(target=function, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, server]
                self._start(self._pump, client, server, self.ends)
                self._start(self._pump, server, client, self.drips)

    def _pump(self, source, target, drips):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                for at in range(len(data) if drips.is_set() else 1):
                    target.sendall(data[at : at + 1] if drips.is_set() else data)
                    if drips.is_set() and self.ends.wait(1.0):
                        return
            target.shutdown(socket.SHUT_WR)

    def close(self):
        self.ends.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        for one in self._sockets:
            one.close()


@contextlib.contextmanager
def a_broker_sends_a_byte_per_second(folder):
    with SqliteQueue(folder / "q.sqlite3", **SETTINGS) as own, serve(own, port=0) as broker:
        with (
            contextlib.closing(Relay(broker.port)) as relay,
            HttpQueue(relay.url, **QUICK) as queue,
        ):
            made = with_permits(queue)
            relay.drips.set()
            yield made


@contextlib.contextmanager
def discord_does_not_answer(folder):
    """At a reset, which waits for it for 5 seconds."""
    asked, ends = threading.Event(), threading.Event()

    def refresh():
        asked.set()
        ends.wait()
        raise OSError

    limit = SessionStartLimit(2 * TRIES, 2 * TRIES, 0.0, 16)
    settings = {"refresh": refresh, "period": 1.0, **QUICK}
    with SqliteQueue(folder / "q.sqlite3", limit, **settings) as queue:
        made = with_permits(queue)
        queue.enqueue(0)
        assert asked.wait(PATIENCE)
        yield made
        ends.set()


FAULTS = (
    a_stopped_process_holds_the_file,
    redis_is_stopped,
    a_broker_sends_a_byte_per_second,
    discord_does_not_answer,
)


@pytest.fixture(params=FAULTS, ids=lambda fault: fault.__name__)
def faulty(request, tmp_path):
    """A queue whose ledger (or Discord) does not respond from now on, and its permits."""
    with request.param(tmp_path) as made:
        yield made


def soonest(calls, within):
    """Return how long the fastest of some calls takes. None is made after one that took ``within``."""
    times = []
    for call in calls:
        began = time.monotonic()
        with contextlib.suppress(Exception):
            call()
        times.append(time.monotonic() - began)
        if times[-1] < within:
            break
    return min(times)


def test_a_timeout_is_kept_within_50_ms(faulty):
    queue, _ = faulty
    calls = [lambda: queue.acquire(0, timeout=TIMEOUT)] * TRIES
    took = soonest(calls, within=TIMEOUT + 0.05)
    assert TIMEOUT <= took < TIMEOUT + 0.05


def test_a_try_takes_half_a_second_at_most(faulty):
    queue, _ = faulty
    assert soonest([lambda: queue.try_acquire(0)] * TRIES, within=0.55) < 0.55


class Interrupt(BaseException):
    """What Ctrl-C raises, without pytest's taking notice."""


def test_ctrl_c_ends_a_wait_within_100_ms(faulty):
    queue, _ = faulty

    def handler(signum, frame):
        raise Interrupt

    def wait():
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupt):
            queue.acquire(0)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        assert soonest([wait] * TRIES, within=0.3) < 0.3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("when_unreachable", ["wait", "raise"])
def test_a_queue_is_made_within_five_seconds_whatever_its_client_does(
    monkeypatch, caplog, when_unreachable
):
    """Such as a client that has no timeout, on a server that is stopped."""
    monkeypatch.setattr(inquiry, "MAX_OPEN_US", 300_000)
    backend, goes_on = MemoryBackend(), threading.Event()
    backend.before = lambda: goes_on.wait(PATIENCE)
    since = time.monotonic()
    try:
        if when_unreachable == "raise":
            with pytest.raises(LedgerError, match="did not answer within 5 s"):
                queue_on(backend, when_unreachable="raise", **SETTINGS)
            assert time.monotonic() - since < PATIENCE / 4
            return
        queue = queue_on(backend, **SETTINGS)
        assert time.monotonic() - since < PATIENCE / 4
        assert "did not answer within 5 s; no permit is granted" in caplog.text
    finally:
        goes_on.set()
    with queue:
        assert queue.acquire(0, timeout=PATIENCE).remaining == 999


def test_a_queue_that_was_just_made_has_no_thread_when_its_process_forks(monkeypatch):
    answer = inquiry._answer

    def lingers(*args):
        answer(*args)
        time.sleep(0.05)

    monkeypatch.setattr(inquiry, "_answer", lingers)
    with queue_on(MemoryBackend(), **SETTINGS):
        assert "gateway-queue-open" not in {one.name for one in threading.enumerate()}


def test_closing_takes_no_time_and_ends_every_wait(faulty, crew):
    queue, permits = faulty
    call, future = crew(queue.acquire, 0), queue.enqueue(1)
    permits[0].sent()
    assert soonest([queue.close], within=0.5) < 0.5
    assert call.exception(PATIENCE) is not None
    assert future.exception(PATIENCE) is not None


@pytest.mark.accounts("sqlite", "redis", "http")
def test_closing_completes_futures_while_the_worker_is_in_a_call(account, crew, monkeypatch):
    """Even if that never returns, such as one of a client without a timeout."""
    queue = account.local(clock=SYSTEM_CLOCK, **QUICK)
    backend, asks, goes_on = backend_of(queue), threading.Event(), threading.Event()
    ask = backend.ask

    def ask_late(request):
        asks.set()
        goes_on.wait()
        return ask(request)

    monkeypatch.setattr(backend, "ask", ask_late)
    try:
        futures, call = [queue.enqueue(shard_id) for shard_id in range(3)], crew(queue.acquire, 3)
        assert asks.wait(PATIENCE)
        queue.close()
        for one in (*futures, call):
            assert isinstance(one.exception(PATIENCE), QueueClosed)
    finally:
        goes_on.set()


def test_nothing_that_an_event_loop_calls_does_io(faulty):
    queue, permits = faulty
    given_back, used = permits[:TRIES], permits[TRIES:]

    async def call_all():
        return {
            "enqueue": soonest([lambda: queue.enqueue(0)] * TRIES, within=0.005),
            "sent": soonest([permit.sent for permit in used], within=0.005),
            "unused": soonest([permit.unused for permit in given_back], within=0.005),
        }

    times = asyncio.run(call_all())
    assert {name: took for name, took in times.items() if took >= 0.005} == {}


def test_an_event_loop_goes_on_while_tasks_wait_for_a_ledger_and_one_that_is_cancelled_leaves_no_waiter(
    faulty,
):
    queue, _ = faulty

    async def longest_pause():
        """Return the longest time without an iteration of the loop, while tasks ask and give up."""
        tasks = [asyncio.ensure_future(acquire(queue, shard_id)) for shard_id in range(8)]
        tasks += [asyncio.ensure_future(acquire(queue, shard_id, 0.1)) for shard_id in range(8)]
        before, pauses = time.monotonic(), []
        while before < began + 0.3:
            await asyncio.sleep(0.001)
            pauses.append(-before + (before := time.monotonic()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() or task.exception() for task in tasks)
        return max(pauses)

    for _ in range(TRIES):
        waiting, began = repr(queue).split()[1], time.monotonic()
        longest = asyncio.run(longest_pause())
        assert waiting in repr(queue)
        if longest < 0.05:
            return
    pytest.fail(f"the loop paused for {longest:.3f} s")
