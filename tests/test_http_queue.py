"""HttpQueue, with a broker whose state is in SQLite; ``test_http_backend`` tests the connection."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import re
import traceback

import pytest
from accounts import backend_of
from proxy import Fault, Proxy
from redis_servers import free_port, until
from test_process import needs_fork
from wire_clients import clients_of, wait_for_line

from gateway_queue_sync import (
    AcquireTimeout,
    HttpQueue,
    LedgerError,
    QueueClosed,
    SessionStartLimit,
    SqliteQueue,
    serve,
)
from gateway_queue_sync.ledgers import remote

SHORT = {"interval": 0.1, "margin": 0.05}
PATIENCE = 20.0


def limit(total=1000, remaining=1000, reset_after=0.0, max_concurrency=1):
    return SessionStartLimit(total, remaining, reset_after, max_concurrency)


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state.sqlite3"


@contextlib.contextmanager
def running(state, port=0, reserve=0, **settings):
    """A broker, past its first window."""
    with (
        SqliteQueue(state, reserve=reserve, **SHORT) as queue,
        serve(queue, port=port, **settings) as broker,
    ):
        until(lambda: all(bucket.ready_in == 0 for bucket in queue.snapshot().buckets))
        broker.queue = queue
        yield broker


@pytest.fixture
def broker(state):
    with running(state) as broker:
        yield broker


@pytest.fixture
def queue(broker):
    with HttpQueue(broker.url, **SHORT) as queue:
        yield queue


# --- what may go wrong ----------------------------------------------------------------------------


def test_arguments_are_checked_before_anything_is_sent():
    for arguments in ({"url": "ftp://h"}, {"url": "http://h", "secret": "a b"}):
        with pytest.raises(ValueError, match="must be"):
            HttpQueue(**arguments)


def test_one_may_be_made_before_its_broker(state, caplog):
    port = free_port()
    with HttpQueue(f"http://127.0.0.1:{port}", **SHORT) as queue:
        assert "no permit is granted until it can be asked" in caplog.text
        with running(state, port):
            assert queue.acquire(0, timeout=PATIENCE).shard_id == 0


def test_a_broker_has_one_account(broker):
    with pytest.raises(ValueError, match="one account"):
        HttpQueue(broker.url, name="other")


def test_no_secret_is_shown(state):
    with running(state, secret="hunter2") as broker:
        with HttpQueue(broker.url, secret="hunter2", **SHORT) as queue:
            assert "hunter2" not in repr(queue) + repr(backend_of(queue)) + repr(broker)
            with pickle.loads(pickle.dumps(queue)) as again:
                assert again.try_acquire(0) is not None
        for wrong in ("hunter3", None):
            with pytest.raises(LedgerError, match="401: the secret is wrong or missing") as caught:
                HttpQueue(broker.url, secret=wrong, **SHORT)
            assert "hunter" not in "".join(traceback.format_exception(caught.value))


def test_who_asks_a_broker_that_is_gone_is_told(state, monkeypatch):
    monkeypatch.setattr(remote, "MAX_REQUEST_US", 200_000)
    with running(state) as broker:
        queue = HttpQueue(broker.url, **SHORT)
    with queue:
        with pytest.raises(LedgerError, match="refused"):
            queue.acquire(0, 0.3)
        with pytest.raises(LedgerError):
            queue.try_acquire(0)
        with pytest.raises(LedgerError):
            queue.snapshot()


def test_closing_lets_go_of_the_connections_and_of_those_who_wait(broker):
    queue = HttpQueue(broker.url, **SHORT)
    queue.update(limit(1000, 0, 60.0))
    future = queue.enqueue(1)
    wait_for_line(broker.queue, 1)
    queue.close()
    with pytest.raises(QueueClosed):
        future.result(PATIENCE)
    wait_for_line(broker.queue, 0)
    until(lambda: not broker._service.connections, "the end of the connections")


def test_timeouts_cost_nothing(broker, queue):
    queue.update(limit(1000, 0, 60.0))
    with pytest.raises(AcquireTimeout) as caught:
        queue.acquire(1, timeout=0.05)
    assert caught.value.eta == pytest.approx(60.0, abs=1.0)
    assert queue.try_acquire(2) is None
    assert broker.queue.snapshot().waiting == 0


# --- processes ------------------------------------------------------------------------------------


def _acquire_in_child(queue, results):
    results.put((os.getpid(), queue.acquire(7, timeout=PATIENCE).shard_id))
    queue.close()


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=needs_fork)])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_it_can_be_handed_to_a_child(broker, queue, method):
    queue.acquire(0)
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    child = context.Process(target=_acquire_in_child, args=(queue, results))
    child.start()
    pid, shard_id = results.get()
    child.join(PATIENCE)
    assert (pid, shard_id, child.exitcode) == (child.pid, 7, 0)
    assert queue.acquire(1, timeout=PATIENCE).shard_id == 1


# --- a network between ----------------------------------------------------------------------------


class HttpProxy(Proxy):
    """Does to a queue's calls what a network may do to them."""

    CALL = b"POST /ledger"


@pytest.fixture
def proxy(broker):
    with contextlib.closing(HttpProxy(broker.port)) as proxy:
        yield proxy


@pytest.fixture
def far(proxy):
    with HttpQueue(f"http://127.0.0.1:{proxy.port}", **SHORT) as queue:
        yield queue


def test_a_permit_that_nobody_hears_of_is_given_back(broker, proxy, far):
    """Its caller gave up before; the next call says so to the ledger."""
    proxy.always = Fault.LOST
    with pytest.raises(LedgerError):
        far.acquire(1, timeout=0.3)
    proxy.always = None
    far.snapshot()
    until(lambda: broker.queue.snapshot().limit.remaining == 1000)
    assert broker.queue.snapshot().waiting == 0


def test_the_metrics_count_all_waiters_of_all_processes(broker):
    """A broker knows the first two of each line of another process, and how many more there are."""
    with (
        HttpQueue(broker.url, interval=30.0, margin=0.05) as queue,
        clients_of(broker.port) as client,
    ):
        for shard_id in range(10):
            queue.enqueue(shard_id)
        until(lambda: queue.snapshot().waiting == 10, "the lines")

        def waiting():
            metrics = client("/metrics").read()[2].decode()
            return sum(
                map(int, re.findall(r"^gateway_queue_waiting{.*} (\d+)$", metrics, re.MULTILINE))
            )

        until(lambda: waiting() == 10, "the metrics")
