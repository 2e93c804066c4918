"""A ``RedisQueue`` while its server or the network fails. The servers are real.

Where the clock is one driven by hand, the server goes by it, too. What is lost on the way is lost by the
proxy of ``proxy.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import multiprocessing
import pickle
import re
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import redis
import redis.asyncio
from accounts import NEVER_HEARD_OF, backend_of, wait_for_workers
from proxy import Fault, Proxy
from redis_servers import BINARY, RedisCluster, RedisServer, free_port, needs_redis, until
from test_interruptions import Interrupt, is_whole
from test_process import needs_fork, python
from test_waiting import in_line, limit, order

from gateway_queue_sync import AcquireTimeout, LedgerError, RedisQueue
from gateway_queue_sync.ledgers import remote
from gateway_queue_sync.ledgers.shared import inquiry
from gateway_queue_sync.ledgers.shared.messages import Reply
from gateway_queue_sync.ledgers.shared.store_redis import KEYS
from gateway_queue_sync.queue import scheduler_of
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.testing import Referee

pytestmark = needs_redis

WINDOW = 5.25
MARGIN = 0.25
MOMENT = 0.000_001
QUICK = {"interval": 0.05, "margin": 0.1}  # where time is real
TEN = limit(10, 10, 600.0)
IMPATIENT = 0.3  # s of a socket's timeout, where it is waited for
BUSY = 2.0  # s that a machine which does other things may add to anything
LATE = 0.05 + 0.4  # s after its deadline that a call may return, and what such a machine may add
SECRET = "hunter2"


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def server(lasting):
    """An empty server, to be stopped and started as one likes."""
    if lasting.process is None:
        lasting.start()
    with lasting.client() as client:
        client.flushall()
    yield lasting
    if lasting.process is not None:
        lasting.send(signal.SIGCONT)


@pytest.fixture
def own(tmp_path):
    """A server to be set up as one likes."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def make(crew, clock):
    """Make queues, and close them in the end: before it is asked whether the crew is home."""
    queues = []

    def make(target, given=None, **settings):
        queues.append(RedisQueue(target, given, **settings))
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()
    wait_for_workers(clock)  # what they have to tell is not for the next test's server


def begun(make, target, clock, given=TEN, **settings):
    """Make a queue on a new account that is past its first window."""
    for _ in range(5):  # the machine may be too busy for an impatient client
        queue = make(target, given, clock=clock, lease=NEVER_HEARD_OF, **settings)
        if not is_out_of_reach(queue):
            break
    clock.advance(WINDOW)
    return queue


def is_out_of_reach(queue):
    return scheduler_of(queue).ledger._session.failure is not None


def url_of(proxy, timeout=1.0):
    return f"redis://127.0.0.1:{proxy.port}/0?socket_timeout={timeout}"


def take(queue, shard):
    """Return the permit of a shard that need not wait: where time stands still, nobody may."""
    permit = queue.try_acquire(shard)
    assert permit is not None
    return permit


def key(name):
    return f"gateway_queue_sync:{{default}}:{name}"


def answers(queue):
    """Return a look at the account, if its server is within reach."""
    with contextlib.suppress(LedgerError):
        return queue.snapshot()


def look(queue, crew, clock):
    """Return a snapshot, and let time go by until it comes."""
    call = crew(queue.snapshot)
    drive(clock, call)
    return call.now()


def remaining(queue):
    return queue.snapshot().limit.remaining


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def at_rest(clock, *calls):
    """Wait until each call is parked on the clock or done, the queues' workers parked, no limit read."""

    def are_at_rest():
        left = sum(not call.done() for call in calls)
        with contextlib.suppress(AssertionError):
            clock.settle(left, timeout=0.05)
            reading = any(one.name == "gateway-queue-limit" for one in threading.enumerate())
            return not reading and left == sum(not call.done() for call in calls)
        return False

    until(are_at_rest, "rest")


def drive(clock, *calls):
    """Let time go by until all calls are done."""
    for _ in range(2_000):
        at_rest(clock, *calls)
        if all(call.done() for call in calls):
            return
        clock.advance(0.05)
    raise AssertionError("there is no end of waiting")


# --- 1. a server that comes back empty ------------------------------------------------------------


def restart(server):
    server.stop()
    server.start()


def flush(server):
    with server.client() as client:
        client.flushall()


loses_everything = pytest.mark.parametrize("lose", [restart, flush])


def test_a_claim_of_another_process_delays_who_waits_and_is_no_outage(server, caplog):
    with (
        RedisQueue(server.url, TEN, interval=0.05, margin=0.05) as queue,
        server.client() as client,
    ):
        queue.acquire(0)
        client.set(key("claim"), "another", px=1_000)
        assert queue.acquire(0, timeout=20.0).waited > 0.5
    assert warnings_in(caplog) == []


@loses_everything
def test_a_server_that_lost_everything_grants_nothing_for_one_window(server, make, clock, lose):
    queue = begun(make, server.url, clock)
    take(queue, 0)
    clock.advance(WINDOW)
    lose(server)
    assert queue.try_acquire(1) is None
    clock.advance(WINDOW - MOMENT)
    assert queue.try_acquire(1) is None
    clock.advance(MOMENT)
    assert queue.try_acquire(1) is not None


@loses_everything
def test_who_waits_goes_on_by_itself_when_everything_is_lost(server, make, clock, crew, lose):
    queue = begun(make, server.url, clock)
    take(queue, 0)
    calls = in_line(queue, crew, clock, [1, 2, 3])
    lose(server)
    for number, call in enumerate(calls):
        clock.advance(WINDOW)  # at first to learn of the loss
        clock.settle(3 - number)
        clock.advance(WINDOW - MOMENT)
        clock.settle(3 - number)
        assert not call.done()
        clock.advance(MOMENT)
        assert call.now().shard_id == number + 1
        clock.settle(2 - number)
        lose(server)


@loses_everything
def test_a_line_is_known_again_to_a_server_that_lost_it(server, make, clock, crew, lose):
    queue = begun(make, server.url, clock)
    take(queue, 0)
    calls = in_line(queue, crew, clock, [3, 1, 2])
    lose(server)
    clock.advance(WINDOW)
    clock.settle(3)
    assert order(queue.snapshot()) == [3, 1, 2]
    drive(clock, *calls)


@loses_everything
def test_the_budget_is_not_filled_by_a_loss(server, make, clock, lose):
    queue = begun(make, server.url, clock, limit(10, 8, 600.0))
    take(queue, 0)
    lose(server)
    left = queue.snapshot().limit
    assert (left.total, left.remaining) == (10, 7)
    assert left.resets_in == pytest.approx(600, abs=WINDOW)


@loses_everything
def test_the_limit_is_read_anew_after_a_loss(server, make, clock, crew, lose):
    calls = []

    def read():
        calls.append(1)
        return limit(20, 15, 300.0)

    queue = begun(make, server.url, clock, refresh=read)
    take(queue, 0)
    assert not calls
    lose(server)
    call = crew(queue.acquire, 1)
    drive(clock, call)
    assert call.now().remaining == 14
    assert len(calls) == 1


def test_a_loss_while_the_limit_is_read_adds_nothing_to_it(server, make, clock, crew):
    """What was granted meanwhile is taken off: a number that must not be negative."""

    def read():
        flush(server)
        return limit(10, 10, 600.0)

    queue = begun(make, server.url, clock, limit(10, 10, 4 * WINDOW), refresh=read)
    for _ in range(3):
        take(queue, 0)
        clock.advance(WINDOW)
    call = crew(queue.acquire, 0)
    drive(clock, call)
    assert call.now().remaining <= 9


def test_who_begins_after_a_loss_without_a_limit_fills_no_budget(server, make, clock):
    """A restarted process knows nothing: those that live on do."""
    queue = begun(make, server.url, clock, limit(10, 3, 600.0))
    take(queue, 0)
    flush(server)
    make(server.url, clock=clock)
    queue.snapshot()
    assert remaining(queue) == 2


# --- 2. a server that comes back with its data ----------------------------------------------------


@pytest.fixture
def keeping(tmp_path):
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.stop()


def test_what_is_kept_on_disk_survives_a_killed_server(keeping, make, clock):
    queue = begun(make, keeping.url, clock, limit(10, 8, 600.0, max_concurrency=3))
    for shard in range(3):
        take(queue, shard)
        clock.advance(1)
    restart(keeping)
    seen = queue.snapshot()
    assert (seen.granted, seen.limit.remaining, len(seen.buckets)) == (3, 5, 3)


def test_a_server_that_was_restarted_grants_nothing_for_one_window(keeping, make, clock):
    """What it has kept may be older than what it has answered, and nobody may know."""
    queue = begun(make, keeping.url, clock)
    take(queue, 0)
    clock.advance(1)
    restart(keeping)
    assert queue.try_acquire(1) is None
    clock.advance(WINDOW - MOMENT)
    assert queue.try_acquire(1) is None
    clock.advance(MOMENT)
    assert queue.try_acquire(1) is not None


def test_who_only_looks_after_a_restart_changes_nothing(keeping, make, clock):
    queue = begun(make, keeping.url, clock)
    take(queue, 0)
    restart(keeping)
    with keeping.client() as client:
        before = client.hgetall(key("ledger"))
        assert inquiry.peek(backend_of(queue), Settings(clock=clock)).granted == 1
        assert client.hgetall(key("ledger")) == before
    clock.advance(WINDOW)
    assert queue.try_acquire(1) is None  # the loss is still found by the next that takes part


def test_a_line_stands_where_the_data_was_kept(keeping, make, clock, crew):
    queue = begun(make, keeping.url, clock)
    take(queue, 0)
    calls = in_line(queue, crew, clock, [3, 1, 2])
    restart(keeping)
    assert order(queue.snapshot()) == [3, 1, 2]
    drive(clock, *calls)
    assert crew.returned == [call.now() for call in calls]


# --- 3. a server that loses some keys -------------------------------------------------------------


@pytest.mark.parametrize(
    "lost",
    [
        *((name,) for name in KEYS if name not in ("replaced", "probe")),
        ("session", "recent"),
        ("ledger", "recent"),
    ],
    ids=" ".join,
)
def test_whatever_keys_are_lost_nothing_comes_early(server, make, clock, crew, lost):
    """As it is with a server that may evict any of them (``allkeys-*``)."""
    referee = Referee(clock=clock)
    one = begun(make, server.url, clock, limit(100, 100, 6000.0))
    other = make(server.url, clock=clock, lease=NEVER_HEARD_OF)

    def start(queue, shard):
        permit = queue.acquire(shard)
        if shard % 4 == 3:
            permit.unused()
            return
        referee.identify(shard)
        (permit.sent, permit.rejected, lambda: None)[shard % 4]()

    with server.client() as client:
        referee.identify(take(one, 0).shard_id)
        calls = [crew(start, (one, other)[shard % 2], shard) for shard in range(8)]
        for _ in range(6):
            at_rest(clock, *calls)
            clock.advance(WINDOW / 3)
            for name in lost:
                client.delete(key(name), *client.keys(key(f"{name}:*")))
        drive(clock, *calls)
    assert all(call.exception() is None for call in calls)
    assert referee.refused == 0


def test_a_ledger_that_is_lost_alone_is_closed_for_one_window(server, make, clock):
    one = begun(make, server.url, clock)
    other = make(server.url, clock=clock, lease=NEVER_HEARD_OF)
    take(one, 0)
    with server.client() as client:
        client.delete(key("ledger"))
    assert other.try_acquire(1) is None
    clock.advance(WINDOW - MOMENT)
    assert other.try_acquire(1) is None
    clock.advance(MOMENT)
    take(other, 1)


@pytest.mark.parametrize("report", ["sent", "unused", "rejected"])
def test_a_report_on_a_permit_of_a_lost_account_opens_no_window(server, make, clock, report):
    """Permits are counted anew from what a process knows, so there is another one of that number."""
    one = begun(make, server.url, clock)
    other = make(server.url, clock=clock, lease=NEVER_HEARD_OF)
    old = take(one, 0)
    with server.client() as client:
        client.delete(key("ledger"))
    other.snapshot()
    clock.advance(WINDOW)
    new = take(other, 1)
    assert new.serial == old.serial
    getattr(old, report)()
    assert one.try_acquire(2) is None


# --- 4. a server that forgets its scripts ---------------------------------------------------------


def test_a_forgotten_script_is_brought_again(server, make, clock):
    queue = begun(make, server.url, clock)
    with server.client() as client:
        client.script_flush()
        assert take(queue, 0).remaining == 9


def test_scripts_that_are_forgotten_all_the_time_make_no_difference(server, make, crew):
    queue = make(server.url, limit(100, 100, 600.0, max_concurrency=4), **QUICK)
    referee = Referee(4, interval=QUICK["interval"])

    def start_often(shard):
        for _ in range(2):
            queue.acquire(shard)
            referee.identify(shard)

    calls = [crew(start_often, shard) for shard in range(8)]
    flushes = 0
    with server.client() as client:
        while not all(call.done() for call in calls):
            client.script_flush()
            flushes += 1
    assert all(call.exception() is None for call in calls)
    assert (referee.accepted, referee.refused, remaining(queue)) == (16, 0, 84)
    assert flushes > 16


# --- 5. a server without memory -------------------------------------------------------------------


@contextlib.contextmanager
def without_memory(server):
    with server.client() as client:
        client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)


def test_a_server_without_memory_grants_nothing(server, make, clock, crew):
    queue = begun(make, server.url, clock)
    with without_memory(server):
        call = crew(queue.acquire, 0, timeout=1.0)
        drive(clock, call)
    with pytest.raises(LedgerError, match=rf"127\.0\.0\.1:{server.port}.*maxmemory"):
        call.now()
    seen = look(queue, crew, clock)  # what was in flight is given back
    assert (seen.limit.remaining, seen.buckets[0].ready_in) == (10, 0)


def test_when_there_is_memory_again_who_waits_goes_on(server, make, clock, crew):
    queue = begun(make, server.url, clock)
    with without_memory(server):
        call = crew(queue.acquire, 0)
        at_rest(clock, call)
        assert not call.done()
    drive(clock, call)
    assert call.now().remaining == 9


def test_a_server_that_evicts_keys_grants_nothing_early(own, make, clock):
    queue = begun(make, own.url, clock)
    referee = Referee(clock=clock)
    evictions = 0
    with own.client() as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", used + 500_000)
        for step in range(60):
            for number in range(80) if step % 15 == 7 else ():
                client.set(f"other:{step}:{number}", "x" * 20_000)
            evictions += not client.exists(key("ledger"))
            if queue.try_acquire(0) is not None:
                referee.identify(0)
            clock.advance(1)
    assert evictions >= 2
    assert referee.accepted >= 4
    assert referee.refused == 0


# --- 6. replies that are lost ---------------------------------------------------------------------


def of_a_url(port):
    return f"redis://127.0.0.1:{port}/0?socket_timeout={IMPATIENT}"


def with_redis_pys_retries(port):
    return redis.Redis(port=port, socket_timeout=IMPATIENT)


@pytest.fixture(params=[of_a_url, with_redis_pys_retries])
def target(request, proxy):
    target = request.param(proxy.port)
    yield target
    if isinstance(target, redis.Redis):
        target.close()


loses_replies = pytest.mark.parametrize("fault", [Fault.LOST, Fault.UNANSWERED])


@loses_replies
def test_a_permit_whose_reply_is_lost_is_granted_once(proxy, target, make, clock, crew, fault):
    queue = begun(make, target, clock)
    calls = proxy.calls
    proxy.next.append(fault)
    call = crew(queue.acquire, 0)
    drive(clock, call)
    assert proxy.calls >= calls + 2
    assert call.now().remaining == 9
    now = queue.snapshot()
    assert (now.granted, now.limit.remaining) == (1, 9)


def test_a_permit_that_arrives_at_last_is_not_too_old(proxy, target, make, clock, crew):
    queue = begun(make, target, clock)
    proxy.on_loss = lambda: clock.advance(MARGIN + MOMENT)
    proxy.next.append(Fault.LOST)
    call = crew(queue.acquire, 0)
    drive(clock, call)
    assert call.now().remaining == 9
    assert queue.snapshot().buckets[0].ready_in >= WINDOW - MARGIN
    assert remaining(queue) == 9


def test_a_permit_that_arrives_in_time_at_last_keeps_its_window(proxy, target, make, clock, crew):
    queue = begun(make, target, clock)
    proxy.on_loss = lambda: clock.advance(MARGIN / 2)
    proxy.next.append(Fault.LOST)
    call = crew(queue.acquire, 0)
    drive(clock, call)
    assert call.now().remaining == 9
    assert WINDOW - MARGIN <= queue.snapshot().buckets[0].ready_in < WINDOW


def test_replies_that_are_lost_all_the_time_cost_nothing(proxy, target, make, crew):
    queue = make(target, limit(100, 100, 600.0), **QUICK)
    referee = Referee(interval=QUICK["interval"])

    def start_often(shard):
        for _ in range(2):
            queue.acquire(shard)
            referee.identify(shard)

    proxy.next.extend([Fault.LOST, None] * 50)
    calls = [crew(start_often, shard) for shard in range(2)]
    assert all(call.exception(20) is None for call in calls)
    proxy.next.clear()
    assert (referee.accepted, referee.refused, remaining(queue)) == (4, 0, 96)


def test_a_report_whose_reply_is_lost_is_booked_once(proxy, target, make, clock):
    """A rejection that counted twice would close the bucket for twice as long."""
    queue = begun(make, target, clock)
    permit = take(queue, 0)
    proxy.next.append(Fault.LOST)
    permit.rejected()
    assert queue.snapshot().buckets[0].ready_in == 2 * WINDOW


@loses_replies
def test_what_was_granted_to_nobody_is_given_back(proxy, make, clock, crew, fault):
    queue = begun(make, url_of(proxy, IMPATIENT), clock)
    proxy.always = fault
    call = crew(queue.acquire, 0, timeout=0.1)
    drive(clock, call)
    assert isinstance(call.exception(), LedgerError)
    proxy.always = None
    proxy.cut()
    now = look(queue, crew, clock)
    assert (now.limit.remaining, now.waiting) == (10, 0)
    assert queue.try_acquire(1) is not None


def test_a_call_that_gets_through_after_its_caller_gave_up_takes_nothing(
    server, proxy, make, clock, crew
):
    """What a network does that sends again and again what it has lost."""
    queue = begun(make, url_of(proxy, IMPATIENT), clock)
    proxy.next.append(Fault.HELD)
    call = crew(queue.acquire, 0, timeout=0.01)
    drive(clock, call)
    assert isinstance(call.exception(), LedgerError)
    look(queue, crew, clock)
    let_it_get_through(server, proxy)
    now = look(queue, crew, clock)
    assert (now.limit.remaining, now.waiting) == (10, 0)


def test_an_update_that_gets_through_late_does_not_override_a_later_one(
    server, proxy, make, clock, crew
):
    queue = begun(make, url_of(proxy, IMPATIENT), clock)
    proxy.next.append(Fault.HELD)
    call = crew(queue.update, limit(1000, 900, 600.0))
    drive(clock, call)
    queue.update(limit(1000, 3, 600.0))
    let_it_get_through(server, proxy)
    assert remaining(queue) == 3


def let_it_get_through(server, proxy):
    with server.client() as client:

        def count():
            return client.info("commandstats")["cmdstat_evalsha"]["calls"]

        before = count()
        proxy.release()
        until(lambda: count() > before, "the call")


@pytest.mark.parametrize("single", [False, True])
def test_a_call_that_breaks_off_leaves_no_reply_for_the_next_one(server, make, clock, single):
    """Between the sending and the reading: the connection must not be used again."""
    with server.client(single_connection_client=single) as client:
        queue = begun(make, client, clock)

        def broken(*args, **kwargs):
            del client.parse_response
            raise RuntimeError("broken off")

        client.parse_response = broken
        with pytest.raises(LedgerError, match="broken off"):
            queue.try_acquire(0)
        permits = [queue.try_acquire(1), queue.try_acquire(2)]
        assert permits[1] is None
        assert permits[0].remaining == 9


def with_another(**fields):
    def garbled(answer):
        values = json.loads(answer)
        for name, value in fields.items():
            values[Reply._fields.index(name)] = value
        return json.dumps(values)

    return garbled


NONSENSE = {
    "nothing": lambda answer: None,
    "OK": lambda answer: b"OK",
    "a number": lambda answer: 7,
    "an empty list": lambda answer: b"[]",
    "half an answer": lambda answer: answer[: len(answer) // 2],
    "a list of words": lambda answer: b'["yes", "no"]',
    "a shorter answer": lambda answer: json.dumps(json.loads(answer)[:-1]),
    "a word for a number": lambda answer: json.dumps(["yes", *json.loads(answer)[1:]]),
    "bytes that are no text": lambda answer: b"\xff\xfe",
    "less than nothing left": with_another(remaining=-2),
    "no bucket at all": with_another(max_concurrency=0),
    "a permit for nobody": with_another(permits=[[12345, 9, 0, 0, 0, 9, 0]]),
    "an unknown status": with_another(status=9),
    "an unknown reason": with_another(permits=[], waits=[[0, 1, 1, 9, 0, 0]]),
}


@pytest.mark.parametrize("garble", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_no_permit(server, make, clock, monkeypatch, garble):
    queue = begun(make, server.url, clock)
    client = backend_of(queue)._client
    evalsha = client.evalsha
    with monkeypatch.context() as patches:
        patches.setattr(client, "evalsha", lambda *given: garble(evalsha(*given)))
        with pytest.raises(LedgerError, match=f"{server.port}.* sent an invalid reply"):
            queue.try_acquire(0)
    assert queue.try_acquire(1).remaining == 9


# --- 7. a server that is out of reach -------------------------------------------------------------


class Outage:
    def __init__(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self.begin = begin
        self.end = end


@pytest.fixture(params=["refused", "reset", "black hole", "stopped"])
def outage(request, server, proxy):
    def fault(fault):
        proxy.always = fault
        proxy.cut()

    return {
        "refused": Outage(proxy.refuse, proxy.accept),
        "reset": Outage(lambda: fault(Fault.RESET), lambda: fault(None)),
        "black hole": Outage(lambda: fault(Fault.HOLE), lambda: fault(None)),
        "stopped": Outage(lambda: server.send(signal.SIGSTOP), lambda: server.send(signal.SIGCONT)),
    }[request.param]


def test_a_deadline_is_kept_whatever_the_sockets_timeout(proxy, make, outage):
    queue = make(f"redis://127.0.0.1:{proxy.port}/0", **QUICK)
    outage.begin()
    begin = time.monotonic()
    with pytest.raises(LedgerError, match=rf"within 0\.3 s: .*127\.0\.0\.1:{proxy.port}"):
        queue.acquire(0, timeout=0.3)
    took = time.monotonic() - begin
    outage.end()
    assert 0.3 <= took < 0.3 + LATE


@pytest.mark.parametrize("outage", ["refused", "black hole"], indirect=True)
def test_deadlines_are_kept_by_all_who_wait_when_it_begins(proxy, make, crew, outage):
    queue = make(url_of(proxy, IMPATIENT), interval=30.0)
    begin = time.monotonic()
    calls = [crew(queue.acquire, shard, timeout=0.8) for shard in range(12)]
    until(lambda: line_of(queue) == 12, "a line")
    outage.begin()
    for call in calls:
        assert isinstance(call.exception(20), LedgerError | AcquireTimeout)
    took = time.monotonic() - begin
    outage.end()
    assert took < 0.8 + LATE


def line_of(queue):
    """Return how many waiters the ledger has stored."""
    return queue.snapshot().waiting


def test_holders_who_report_in_an_outage_do_not_wait_for_each_other(proxy, make, crew, outage):
    given = limit(100, 100, 600.0, max_concurrency=20)
    queue = make(url_of(proxy, IMPATIENT), given, **QUICK)
    permits = [queue.acquire(shard) for shard in range(20)]
    outage.begin()
    begin = time.monotonic()
    for call in [crew(permit.sent) for permit in permits]:
        call.now()
    took = time.monotonic() - begin
    outage.end()
    assert took < BUSY  # and not 20 * IMPATIENT


def test_trying_says_that_it_is_out_of_reach(proxy, make, outage):
    queue = make(url_of(proxy, IMPATIENT), **QUICK)
    outage.begin()
    begin = time.monotonic()
    with pytest.raises(LedgerError, match=rf"127\.0\.0\.1:{proxy.port}"):
        queue.try_acquire(0)
    took = time.monotonic() - begin
    outage.end()
    assert took < 0.5 + LATE


def test_who_waits_without_a_deadline_goes_on_when_it_is_back(proxy, make, clock, crew, outage):
    queue = begun(make, url_of(proxy, IMPATIENT), clock)
    outage.begin()
    call = crew(queue.acquire, 0)
    at_rest(clock, call)
    clock.advance(2)
    at_rest(clock, call)
    assert not call.done()
    outage.end()
    drive(clock, call)
    assert call.now().remaining == 9
    assert remaining(queue) == 9


@pytest.mark.parametrize("outage", ["refused", "stopped"], indirect=True)
def test_each_outage_is_warned_of_once_and_so_is_its_end(proxy, make, clock, crew, outage, caplog):
    queue = begun(make, url_of(proxy, IMPATIENT), clock, limit(100, 100, 6000.0, max_concurrency=2))
    for _ in range(2):
        outage.begin()
        calls = [crew(queue.acquire, shard) for shard in range(2)]
        for _ in range(2):
            at_rest(clock, *calls)
            clock.advance(2)
        at_rest(clock, *calls)
        outage.end()
        drive(clock, *calls)
        clock.advance(WINDOW)
    first, second = f"127.0.0.1:{proxy.port}/0", "can be asked again"
    messages = warnings_in(caplog)
    assert all(first in message for message in messages)
    assert [second in message for message in messages] == [True, False] * 2
    assert [("answers again" in message) for message in messages] == [False, True] * 2


@pytest.mark.parametrize("outage", ["refused", "reset", "stopped"], indirect=True)
def test_nothing_is_missing_after_an_outage(proxy, make, clock, crew, outage):
    queue = begun(make, url_of(proxy, IMPATIENT), clock, limit(10, 10, 600.0, max_concurrency=3))
    outage.begin()
    calls = [crew(queue.acquire, shard, timeout=0.1) for shard in range(3)]
    drive(clock, *calls)
    assert all(isinstance(call.exception(), LedgerError) for call in calls)
    outage.end()
    now = look(queue, crew, clock)
    assert (now.limit.remaining, now.waiting) == (10, 0)
    assert [bucket.ready_in for bucket in now.buckets] == [0, 0, 0]


@pytest.fixture
def interrupt_soon():
    """Have an exception raised into the main thread, as Ctrl-C does."""

    def handler(signum, frame):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_an_interrupt_ends_the_wait_for_a_server_that_is_out_of_reach(
    proxy, make, outage, interrupt_soon
):
    queue = make(url_of(proxy, IMPATIENT), TEN, **QUICK)
    outage.begin()
    interrupt_soon()
    begin = time.monotonic()
    with pytest.raises(Interrupt):
        queue.acquire(0)
    took = time.monotonic() - begin
    outage.end()
    until(lambda: answers(queue))
    assert took < 0.2 + IMPATIENT + BUSY
    assert is_whole(queue)
    assert remaining(queue) == 10


@pytest.mark.parametrize("outage", ["refused", "stopped"], indirect=True)
@pytest.mark.parametrize("call", ["snapshot", "update"])
def test_what_has_no_timeout_waits_for_a_while_and_then_says_so(
    proxy, make, outage, call, monkeypatch
):
    queue = make(url_of(proxy, IMPATIENT), TEN, **QUICK)
    monkeypatch.setattr(remote, "MAX_REQUEST_US", 400_000)
    outage.begin()
    begin = time.monotonic()
    with pytest.raises(LedgerError, match="did not answer"):
        {"snapshot": queue.snapshot, "update": lambda: queue.update(TEN)}[call]()
    took = time.monotonic() - begin
    outage.end()
    assert 0.4 <= took < 0.4 + LATE


@pytest.mark.parametrize("outage", ["refused", "stopped"], indirect=True)
def test_closing_does_not_wait_for_a_server_that_is_out_of_reach(proxy, make, outage):
    queue = make(url_of(proxy, IMPATIENT), TEN, **QUICK)
    permit = queue.acquire(0)
    outage.begin()
    begin = time.monotonic()
    permit.sent()
    queue.close()
    took = time.monotonic() - begin
    outage.end()
    assert took < LATE


def test_a_queue_on_a_silent_server_is_made_within_seconds_and_waits_for_it(
    server, make, caplog, monkeypatch
):
    monkeypatch.setattr(
        inquiry, "WARN_AFTER", 0.2
    )  # before the client's own timeout, which is 1 s, too
    server.send(signal.SIGSTOP)
    begin = time.monotonic()
    queue = make(server.url, TEN, **QUICK)
    assert time.monotonic() - begin < 2 + BUSY
    waits, message = warnings_in(caplog)
    assert "waiting for Redis server" in waits
    assert "no permit is granted until it can be asked" in message
    server.send(signal.SIGCONT)
    assert queue.acquire(0, timeout=20).remaining == 9


def test_a_queue_on_a_server_that_is_not_there_waits_for_it(server, make, caplog):
    server.stop()
    queue = make(server.url, TEN, **QUICK)
    (message,) = warnings_in(caplog)
    assert f"127.0.0.1:{server.port}" in message
    assert "no permit is granted until it can be asked" in message
    with pytest.raises(LedgerError, match=rf"127\.0\.0\.1:{server.port}"):
        queue.try_acquire(0)
    server.start()
    assert queue.acquire(0, timeout=20).remaining == 9
    (_, message) = warnings_in(caplog)
    assert "answers again" in message


# --- 8. a server that refuses ---------------------------------------------------------------------


def with_a_password(server, password, user="default"):
    return f"redis://{user}:{password}@127.0.0.1:{server.port}/0"


def of_a_wrong_password(server, client, proxy):
    client.config_set("requirepass", SECRET)
    return with_a_password(server, f"not-{SECRET}")


def of_no_password(server, client, proxy):
    client.config_set("requirepass", SECRET)
    return server.url


def of_an_unknown_user(server, client, proxy):
    return with_a_password(server, SECRET, "bob")


def of_a_user_with_other_keys(server, client, proxy):
    client.acl_setuser(
        "bob", enabled=True, passwords=f"+{SECRET}", keys=["bob:*"], categories=["+@all"]
    )
    return with_a_password(server, SECRET, "bob")


def of_a_user_without_scripts(server, client, proxy):
    client.acl_setuser(
        "bob", enabled=True, passwords=f"+{SECRET}", keys=["*"], categories=["+@all", "-@scripting"]
    )
    return with_a_password(server, SECRET, "bob")


def of_a_replica(server, client, proxy):
    client.replicaof("127.0.0.1", proxy.port)
    return server.url


def of_a_server_that_loads(server, client, proxy):
    proxy.always = b"-LOADING Redis is loading the dataset in memory\r\n"
    return f"redis://:{SECRET}@127.0.0.1:{proxy.port}/0"


def of_a_full_disk(server, client, proxy):
    client.config_set("save", "3600 1")
    shutil.rmtree(server.folder)
    client.bgsave()
    until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    return server.url


def of_no_memory(server, client, proxy):
    client.config_set("maxmemory", 1)
    return server.url


def of_no_such_database(server, client, proxy):
    return f"redis://127.0.0.1:{server.port}/99"


REFUSALS = {
    of_a_wrong_password: "invalid username-password",
    of_no_password: "[Aa]uthentica",
    of_an_unknown_user: "invalid username-password",
    of_a_user_with_other_keys: "permission",
    of_a_user_without_scripts: "permission",
    of_no_such_database: "DB index",
}
PASSING = {
    of_a_replica: "read only replica",
    of_a_server_that_loads: "loading the dataset",
    of_a_full_disk: "MISCONF",
    of_no_memory: "maxmemory",
}


@pytest.mark.parametrize(("get_refused", "words"), REFUSALS.items(), ids=lambda it: "")
def test_a_refusal_names_its_server_and_its_reason_and_no_password(
    own, proxy, make, get_refused, words, caplog
):
    caplog.set_level(logging.DEBUG)
    with own.client() as client:
        url = get_refused(own, client, proxy)
        with pytest.raises(LedgerError, match=rf"127\.0\.0\.1:{own.port}/\d+: .*{words}") as caught:
            make(url)
    assert "\n" not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + caplog.text


@pytest.mark.parametrize(("get_refused", "words"), PASSING.items(), ids=lambda it: "")
def test_a_server_that_cannot_answer_yet_is_named_in_a_warning_with_its_reason(
    own, proxy, make, get_refused, words, caplog
):
    caplog.set_level(logging.DEBUG)
    with own.client() as client:
        url = get_refused(own, client, proxy)
        port = proxy.port if str(proxy.port) in url else own.port
        queue = make(url)
        (message,) = warnings_in(caplog)
        assert re.search(rf"127\.0\.0\.1:{port}/\d+: .*{words}", message)
        assert "no permit is granted until it can be asked" in message
        with pytest.raises(LedgerError, match=words) as caught:
            queue.try_acquire(0)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value.__cause__, redis.RedisError)
        assert SECRET not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_who_waits_goes_on_when_a_right_that_was_taken_away_is_given_back(own, make, clock, crew):
    with own.client() as client:
        client.acl_setuser(
            "bob", enabled=True, passwords=f"+{SECRET}", keys=["*"], categories=["+@all"]
        )
        queue = begun(make, with_a_password(own, SECRET, "bob"), clock)
        client.execute_command("ACL SETUSER", "bob", "-hset")
        with pytest.raises(LedgerError, match="can't run this command") as caught:
            queue.try_acquire(0)
        assert SECRET not in str(caught.value)
        call = crew(queue.acquire, 1)
        for _ in range(20):
            at_rest(clock, call)
            clock.advance(0.05)
        assert not call.done()
        client.execute_command("ACL SETUSER", "bob", "+hset")
        drive(clock, call)
    assert call.now().remaining == 9


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        f"http://:{SECRET}@localhost",
        f"redis://:{SECRET}@localhost:port",
        f"redis://:{SECRET}@localhost/0?socket_timeout={SECRET}",
        f"redis://:{SECRET}@localhost/0?no_such_setting={SECRET}",
        f"redis://:{SECRET}@localhost/0?protocol={SECRET}",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_and_not_shown(make, url):
    with pytest.raises(ValueError, match="the URL must be like redis://") as caught:
        make(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("mark", "/?#")
def test_a_password_that_is_not_percent_encoded_is_refused_and_not_shown(make, mark):
    with pytest.raises(ValueError, match="percent-encode the password") as caught:
        make(f"redis://:44{mark}{SECRET}@localhost/0")
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    make(f"redis://:44%{ord(mark):X}{SECRET}@localhost:1/0")  # nothing is there, but it can be read


@pytest.mark.parametrize(
    ("client", "kind"),
    [
        (None, "NoneType"),
        (b"redis://localhost", "bytes"),
        (object(), "object"),
        (redis.ConnectionPool(), "ConnectionPool"),
        (redis.asyncio.Redis(), r"redis\.asyncio\.client\.Redis"),
        (redis.Redis, "must be a redis.Redis"),
    ],
    ids=lambda it: "",
)
def test_what_is_no_client_is_refused(make, client, kind):
    with pytest.raises(TypeError, match=kind):
        make(client)


def test_a_client_of_an_asyncio_cluster_is_refused(make):
    async def refused():
        client = redis.asyncio.RedisCluster(host="127.0.0.1")
        with pytest.raises(TypeError, match="RedisCluster"):
            make(client)

    asyncio.run(refused())


@pytest.mark.parametrize("name", ["", "my bot", "{tag}", "x" * 65, "böt", "a\n"])
def test_a_name_that_could_not_be_a_key_is_refused(server, make, name):
    with pytest.raises(ValueError, match="name must be"):
        make(server.url, name=name)


def test_without_redis_py_it_says_what_to_install():
    result = python(
        """
        import sys
        sys.modules["redis"] = None  # an import finds nothing
        from gateway_queue_sync import RedisQueue
        try:
            RedisQueue("redis://localhost")
        except ImportError as error:
            print(error.name, error)
        """
    )
    assert result.stderr == ""
    assert result.stdout.startswith("redis ")
    assert "pip install gateway-queue-sync[redis]" in result.stdout


# --- 9. a server that has gone back ---------------------------------------------------------------


@pytest.fixture
def replica(tmp_path, server):
    with server.client() as client:
        client.config_set("repl-diskless-sync", "no")  # which waits for others to join
    folder = tmp_path / "replica"
    folder.mkdir()
    replica = RedisServer(folder, "--replicaof", "127.0.0.1", str(server.port))
    yield replica
    replica.stop()


def fail_over(proxy, replica):
    proxy.server_port = replica.port
    proxy.cut()


def promote(replica):
    """Make a primary of a replica that has seen the account, and will see no more of it."""
    with replica.client() as client:
        until(lambda: client.exists(key("ledger")), "the replica's copy")
        client.replicaof("NO", "ONE")


def test_a_replica_that_missed_a_grant_grants_nothing_early(proxy, replica, make, clock):
    queue = begun(make, url_of(proxy), clock)
    promote(replica)
    take(queue, 0)
    fail_over(proxy, replica)
    clock.advance(WINDOW - MOMENT)
    assert queue.try_acquire(1) is None
    clock.advance(WINDOW)
    take(queue, 1)


def test_a_replica_that_missed_grants_gives_no_budget_back(proxy, replica, make, clock):
    queue = begun(make, url_of(proxy), clock)
    promote(replica)
    take(queue, 0)
    clock.advance(WINDOW)
    take(queue, 0)
    fail_over(proxy, replica)
    clock.advance(WINDOW)
    queue.try_acquire(0)
    assert remaining(queue) <= 8


def test_a_replica_that_saw_everything_goes_on_after_a_window(server, proxy, replica, make, clock):
    queue = begun(make, url_of(proxy), clock)
    take(queue, 0)
    with server.client() as client:
        client.wait(1, 10_000)
    promote(replica)
    clock.advance(1)
    fail_over(proxy, replica)
    assert queue.snapshot().buckets[0].ready_in == WINDOW
    clock.advance(WINDOW)
    assert take(queue, 1).remaining == 8


def test_what_a_server_undid_itself_does_not_hold(server, make, clock):
    queue = begun(make, server.url, clock)
    take(queue, 0).unused()
    take(queue, 0)


class Offset:
    """A server's clock: that of the processes, set back."""

    def __init__(self, clock):
        self._clock, self.by = clock, 0

    def now_us(self):
        return self._clock.now_us() - self.by

    wall_us = now_us


def test_a_servers_clock_that_is_set_back_sends_nobody_to_the_end_of_the_line(
    server, make, clock, crew
):
    """Places are reckoned from the clocks of those who wait, which did not move."""
    one = begun(make, server.url, clock, limit(100, 100, 6000.0))
    other = make(server.url, clock=clock, lease=NEVER_HEARD_OF)
    served = Offset(clock)
    for queue in (one, other):
        backend_of(queue)._clock = served
    take(one, 0)
    (first,) = in_line(one, crew, clock, [1])
    clock.advance(1)
    served.by = 60_000_000
    later = in_line(other, crew, clock, [2, 3])
    drive(clock, first, *later)
    assert crew.returned == [first.now(), *(call.now() for call in later)]


def test_a_bucket_that_is_ahead_of_the_server_costs_one_window_at_most(server, make, clock):
    queue = begun(make, server.url, clock)
    take(queue, 0)
    with server.client() as client:
        row = json.loads(client.hget(key("ledger"), "0"))
        row["last_us"] = clock.now_us() + 3_600_000_000
        client.hset(key("ledger"), "0", json.dumps(row))
    assert queue.try_acquire(0) is None
    clock.advance(WINDOW)
    assert queue.try_acquire(0) is not None


@pytest.fixture
def saving(tmp_path):
    """A server that keeps its data as Redis does by default: up to an hour behind."""
    server = RedisServer(tmp_path, "--save", "3600 1")
    yield server
    server.stop()


def test_an_old_snapshot_gives_no_budget_back(saving, make, clock):
    queue = begun(make, saving.url, clock)
    with saving.client() as client:
        client.save()
    for _ in range(5):
        take(queue, 0)
        clock.advance(WINDOW)
    restart(saving)
    queue.try_acquire(0)
    assert remaining(queue) <= 5


@pytest.mark.parametrize("who", ["it lives on", "it begins"])
def test_an_old_snapshot_grants_nothing_early_to_who_saw_no_more_of_it(saving, make, clock, who):
    queue = begun(make, saving.url, clock)
    other = make(saving.url, clock=clock, lease=NEVER_HEARD_OF)
    with saving.client() as client:
        client.save()
    take(queue, 0)
    restart(saving)
    if who == "it begins":
        other = make(saving.url, TEN, clock=clock)
    assert other.try_acquire(1) is None
    clock.advance(WINDOW - MOMENT)
    assert other.try_acquire(1) is None
    clock.advance(MOMENT)
    take(other, 1)


def test_the_limit_is_read_anew_after_a_restart(saving, make, clock, crew):
    queue = begun(make, saving.url, clock, refresh=lambda: limit(20, 15, 300.0))
    with saving.client() as client:
        client.save()
    restart(saving)
    call = crew(queue.acquire, 1)
    drive(clock, call)
    assert call.now().remaining == 14


def test_who_left_before_a_restart_does_not_wait_after_it(saving, make, clock, crew):
    queue = begun(make, saving.url, clock, limit(10, 10, 600.0, max_concurrency=2))
    take(queue, 0)
    take(queue, 1)
    calls = in_line(queue, crew, clock, [2, 3])
    with saving.client() as client:
        client.save()
    clock.advance(WINDOW)
    assert {call.now().shard_id for call in calls} == {2, 3}
    restart(saving)
    assert queue.snapshot().waiting == 0
    clock.advance(WINDOW)
    take(make(saving.url, clock=clock), 0)


@pytest.mark.parametrize("rights", [["+@all"], ["+@all", "-info"]])
def test_a_server_that_tells_its_run_for_the_first_time_is_no_other_one(own, make, clock, rights):
    queue = begun(make, own.url, clock)
    with own.client() as client:
        row = json.loads(client.hget(key("ledger"), "account"))
        client.hset(key("ledger"), "account", json.dumps(row | {"run": "", "replid": ""}))
        client.execute_command("ACL SETUSER", "bob", "on", f">{SECRET}", "~*", *rights)
    bob = make(with_a_password(own, SECRET, "bob"), clock=clock, lease=NEVER_HEARD_OF)
    take(bob, 0)
    for _ in range(3):
        clock.advance(WINDOW)
        take(queue, 0)
        clock.advance(WINDOW)
        take(bob, 0)


# --- 10. Sentinel ---------------------------------------------------------------------------------


@pytest.fixture
def sentinel(server, replica, tmp_path):
    """The port of a Sentinel that watches over a server and its replica."""
    port, settings = free_port(), tmp_path / "sentinel.conf"
    settings.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nlogfile {tmp_path}/sentinel.log\n"
        f"sentinel monitor mine 127.0.0.1 {server.port} 1\n"
        "sentinel down-after-milliseconds mine 300\nsentinel failover-timeout mine 2000\n"
    )
    process = subprocess.Popen([BINARY, settings, "--sentinel"])
    with redis.Redis(port=port) as client:

        def knows_the_replica():
            with contextlib.suppress(redis.RedisError):
                return client.execute_command("SENTINEL REPLICAS", "mine")

        until(knows_the_replica, "Sentinel")
    yield port
    process.kill()
    process.wait()


def test_who_waits_goes_on_with_the_server_that_sentinel_names(
    server, sentinel, make, crew, caplog
):
    watchers = redis.sentinel.Sentinel([("127.0.0.1", sentinel)], socket_timeout=IMPATIENT)
    client = watchers.master_for("mine", socket_timeout=IMPATIENT)
    queue = make(client, TEN, **QUICK)
    with pytest.raises(TypeError, match="cluster or Sentinel cannot be pickled: make one in each"):
        pickle.dumps(queue)
    assert queue.acquire(0, timeout=20).remaining == 9
    assert client.wait(1, 10_000) == 1
    server.stop()
    with pytest.raises(LedgerError, match="Sentinel's service mine"):
        queue.try_acquire(1)
    assert crew(queue.acquire, 1).now().remaining == 8
    lost, again = warnings_in(caplog)[:2]
    assert "Sentinel's service mine" in lost
    assert "no permit is granted until it can be asked again" in lost
    assert "answers again" in again or "has lost requests" in again
    client.close()


# --- 11. a cluster --------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)  # it takes two seconds to come up
def cluster(tmp_path_factory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster_client(cluster):
    client = cluster.client()
    yield client
    client.close()


names = itertools.count()


def test_a_cluster_keeps_an_account(cluster_client, make, clock, crew):
    queue = begun(make, cluster_client, clock, name=f"bot-{next(names)}")
    assert take(queue, 0).remaining == 9
    (call,) = in_line(queue, crew, clock, [1])
    assert order(queue.snapshot()) == [1]
    queue.update(limit(20, 20, 600.0, max_concurrency=2))
    drive(clock, call)
    assert call.now().remaining == 19


def test_all_keys_of_an_account_are_in_one_slot_wherever_that_is(cluster_client, make, clock):
    places = set()
    for number in range(8):
        name = f"slot-{number}"
        queue = begun(make, cluster_client, clock, name=name)
        take(queue, 0)
        slots = {
            cluster_client.cluster_keyslot(f"gateway_queue_sync:{{{name}}}:{key}") for key in KEYS
        }
        assert len(slots) == 1
        places.add(cluster_client.get_node_from_key(f"{{{name}}}").port)
    assert len(places) > 1


def test_a_cluster_that_forgets_its_scripts_is_brought_them_again(cluster_client, make, clock):
    queue = begun(make, cluster_client, clock, name=f"bot-{next(names)}")
    cluster_client.script_flush()  # of all nodes
    assert take(queue, 0).remaining == 9


def test_errors_of_a_cluster_name_where_it_was_looked_for(cluster, cluster_client, make, clock):
    queue = begun(make, cluster_client, clock, name=f"bot-{next(names)}")
    with contextlib.ExitStack() as full:
        for node in cluster.nodes:
            full.enter_context(without_memory(node))
        with pytest.raises(LedgerError, match=rf"cluster of .*:{cluster.nodes[0].port}.*maxmemory"):
            queue.try_acquire(0)


def test_a_queue_on_a_clusters_client_says_why_it_does_not_pickle(cluster_client, make, clock):
    queue = begun(make, cluster_client, clock, name=f"bot-{next(names)}")
    with pytest.raises(TypeError, match="cluster or Sentinel cannot be pickled: make one in each"):
        pickle.dumps(queue)


# --- 12. clients of other kinds, other processes --------------------------------------------------


@pytest.fixture
def with_a_socket(tmp_path):
    server = RedisServer(tmp_path, "--unixsocket", str(tmp_path / "redis.sock"))
    yield server
    server.stop()


def socket_of(server):
    return f"{server.folder}/redis.sock"


CLIENTS = {
    "that decodes": lambda server: server.client(decode_responses=True),
    "of RESP2": lambda server: server.client(protocol=2),
    "of RESP3": lambda server: server.client(protocol=3),
    "of RESP3 that decodes": lambda server: server.client(protocol=3, decode_responses=True),
    "with one connection": lambda server: server.client(single_connection_client=True),
    "with a blocking pool": lambda server: redis.Redis(
        connection_pool=redis.BlockingConnectionPool(port=server.port, max_connections=1)
    ),
    "on a unix socket": lambda server: redis.Redis(unix_socket_path=socket_of(server)),
    "of a unix socket's URL": lambda server: f"unix://{socket_of(server)}?db=3",
    "of another database": lambda server: f"redis://127.0.0.1:{server.port}/3",
}


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_any_client_will_do(with_a_socket, make, clock, crew, client):
    target = client(with_a_socket)
    queue = begun(make, target, clock)
    assert take(queue, 0).remaining == 9
    (call,) = in_line(queue, crew, clock, [1])
    assert order(queue.snapshot()) == [1]
    queue.update(limit(20, 20, 600.0, max_concurrency=2))
    drive(clock, call)
    assert call.now().remaining == 19
    if isinstance(target, redis.Redis):
        target.close()


def test_a_client_that_is_handed_in_is_not_closed(server, clock):
    with server.client() as client:
        connection = client.client_id()
        RedisQueue(client, clock=clock).close()
        assert client.client_id() == connection


def test_a_closed_queue_that_still_looks_keeps_no_connection(own, make, clock):
    queue = begun(make, own.url, clock)
    queue.close()
    queue.snapshot()
    with own.client() as client:
        until(lambda: len(client.client_list()) == 1, "the connection's end", within=2)


def take_elsewhere(queue, shard):
    """What another process does with a queue that it was handed."""
    with queue:
        return queue.acquire(shard, timeout=20).remaining


def in_a_child(queue):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as children:
        return children.submit(take_elsewhere, queue, 1).result(20)


def test_a_child_works_on_with_a_url(server, make):
    queue = make(server.url, TEN, **QUICK)
    queue.acquire(0)
    assert in_a_child(queue) == 8
    assert remaining(queue) == 8


def test_a_child_works_on_with_a_client_and_its_password(own, make):
    with own.client() as admin:
        admin.config_set("requirepass", SECRET)
    with own.client(password=SECRET, db=2) as client:
        queue = make(client, TEN, **QUICK)
        queue.acquire(0)
        assert in_a_child(queue) == 8
        assert remaining(queue) == 8


def test_a_client_on_a_socket_is_handed_on_with_its_settings(with_a_socket, make):
    with redis.Redis(
        unix_socket_path=socket_of(with_a_socket), db=5, socket_timeout=7, decode_responses=True
    ) as client:
        queue = make(client, limit(10, 7, 600.0), **QUICK)
        with pickle.loads(pickle.dumps(queue)) as copy:
            theirs = backend_of(copy)._client
            assert remaining(copy) == 7
            assert repr(backend_of(copy)) == repr(backend_of(queue))
            assert theirs.connection_pool.connection_kwargs["socket_timeout"] == 7
            theirs.close()


@needs_fork
def test_a_forked_child_works_on_and_so_does_its_parent(server):
    result = python(
        f"""
        import os, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from gateway_queue_sync import RedisQueue, SessionStartLimit
        limit = SessionStartLimit(10, 10, 600, 1)
        queue = RedisQueue("{server.url}", limit, interval=0.05, margin=0.1)
        queue.acquire(0)
        waiting = threading.Thread(target=queue.acquire, args=(1,))
        waiting.start()
        child = os.fork()
        if child == 0:
            permit = queue.acquire(2, timeout=10)
            queue.close()
            os._exit(0 if permit.shard_id == 2 else 1)
        queue.acquire(3, timeout=10)
        status = os.waitpid(child, 0)[1]
        waiting.join()
        print(os.waitstatus_to_exitcode(status), queue.snapshot().limit.remaining)
        queue.close()
        """
    )
    assert (result.stdout.strip(), result.stderr) == ("0 6", "")


@needs_fork
def test_children_that_are_forked_in_the_midst_of_calls_work_on(server):
    result = python(
        f"""
        import os, signal, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from gateway_queue_sync import RedisQueue, SessionStartLimit
        queue = RedisQueue("{server.url}", interval=0.05, margin=0.1)
        stop = threading.Event()
        def look():
            while not stop.is_set():
                queue.snapshot()
        lookers = [threading.Thread(target=look, daemon=True) for _ in range(3)]
        for looker in lookers:
            looker.start()
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(5)
                queue.snapshot()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        for looker in lookers:
            looker.join()
        queue.close()
        print("done")
        """
    )
    assert (result.stdout.strip(), result.stderr) == ("done", "")


@needs_fork
def test_a_child_does_not_wait_for_what_the_parent_has_locked_in_a_clusters_client(cluster):
    cluster.client().close()  # the servers know each other
    result = python(
        f"""
        import os, redis, signal, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from gateway_queue_sync import RedisQueue
        client = redis.RedisCluster(host="127.0.0.1", port={cluster.nodes[0].port})
        queue = RedisQueue(client, name="bot-{next(names)}")
        nodes = client.nodes_manager
        held, forked = threading.Event(), threading.Event()
        def hold():
            pools = [node.redis_connection.connection_pool for node in nodes.nodes_cache.values()
                     if node.redis_connection]
            with client._lock, nodes._initialization_lock, nodes._lock, pools[0]._lock:
                held.set()
                forked.wait()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            queue.snapshot()
            os._exit(0)
        forked.set()
        holder.join()
        print(os.waitpid(child, 0)[1])
        queue.close()
        """
    )
    assert (result.stdout.strip(), result.stderr) == ("0", "")
