"""HttpQueue: what may go wrong between it and its broker, and who stands in one line with it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import socket
import socketserver
import threading
import time
import traceback

import pytest
from accounts import ledger_of
from proxy import Fault, Proxy
from redis_servers import free_port, until
from test_process import needs_fork
from wire_clients import clients_of, first_to_hear, wait_for_line

from gateway_queue_sync import (
    AcquireTimeout,
    HttpQueue,
    LedgerError,
    QueueClosed,
    SessionStartLimit,
    SqliteQueue,
    serve,
)
from gateway_queue_sync.ledgers import http
from gateway_queue_sync.ledgers.wire import reply_as_json, reply_from_json
from gateway_queue_sync.messages import Outcome, Reply, Waiter
from gateway_queue_sync.testing import Referee

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


# --- one line -------------------------------------------------------------------------------------


def test_remote_queues_and_the_plain_wire_stand_in_one_line(broker, queue):
    queue.update(limit(1000, 0, 60.0))
    with clients_of(broker.port) as client, HttpQueue(broker.url, **SHORT) as other:
        order = []
        futures = []
        for number in range(6):
            if number % 3 == 2:
                futures.append(client(f"/?shard={number}"))
            else:
                future = (queue, other)[number % 3].enqueue(number)
                future.add_done_callback(lambda future: order.append(future.result().shard_id))
                futures.append(future)
            wait_for_line(broker.queue, number + 1)
        threads = [
            threading.Thread(target=lambda n=n, one=one: (one.read(), order.append(n)))
            for n, one in ((2, futures[2]), (5, futures[5]))
        ]
        for thread in threads:
            thread.start()
        broker.queue.update(limit())
        until(lambda: len(order) == 6, "six permits")
        assert order == [0, 1, 2, 3, 4, 5]
        for thread in threads:
            thread.join()


def test_spacing_holds_at_all_callers(broker):
    referee = Referee(1, interval=SHORT["interval"])
    with contextlib.ExitStack() as stack:
        queues = [stack.enter_context(HttpQueue(broker.url, **SHORT)) for _ in range(3)]
        lock = threading.Lock()

        def shard(queue, number):
            queue.acquire(number, timeout=PATIENCE)
            with lock:
                referee.identify(number)

        threads = [
            threading.Thread(target=shard, args=(queue, number))
            for number, queue in enumerate(queues * 3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert referee.refused == 0
    assert referee.shortest_gap >= SHORT["interval"]


def test_an_update_and_the_budget_are_seen_by_all(broker, queue):
    queue.update(limit(50, 10, 3600.0))
    with clients_of(broker.port) as client:
        assert client("/?shard=0").granted
    assert queue.snapshot().limit.remaining == 9
    permit = queue.acquire(1, timeout=PATIENCE)
    permit.unused()
    until(lambda: broker.queue.snapshot().limit.remaining == 9)


def test_the_brokers_reserve_binds_all(state):
    with running(state, reserve=998) as broker, HttpQueue(broker.url, **SHORT) as queue:
        for number in (0, 1):
            queue.acquire(number, timeout=PATIENCE)
        with pytest.raises(AcquireTimeout):
            queue.acquire(2, timeout=0.3)
        assert broker.queue.snapshot().limit.remaining == 998


def test_a_larger_reserve_of_ones_own_counts(broker):
    with HttpQueue(broker.url, **SHORT, reserve=999) as queue:
        queue.acquire(0, timeout=PATIENCE)
        with pytest.raises(AcquireTimeout):
            queue.acquire(1, timeout=0.3)


def test_a_limit_that_the_brokers_reserve_uses_up_is_refused(state):
    with running(state, reserve=100) as broker, HttpQueue(broker.url, **SHORT) as queue:
        with pytest.raises(LedgerError, match=r"400: .*reserve"):
            queue.update(limit(100, 50))
        assert broker.queue.snapshot().limit.total == 1000


def test_a_broker_takes_no_order_for_more_buckets_than_are_sane(broker, queue):
    many = limit(max_concurrency=10_001)
    with pytest.raises(LedgerError, match="400: max_concurrency must be at most 10000"):
        queue.update(many)
    with pytest.raises(LedgerError, match="400"):
        HttpQueue(broker.url, many, **SHORT)
    assert len(broker.queue.snapshot().buckets) == 1


def test_a_broker_whose_queue_is_closed_grants_nothing(broker, queue):
    broker.queue.close()
    with pytest.raises(LedgerError, match="503: the queue is closed"):
        queue.try_acquire(0)
    assert broker.queue.snapshot().granted == 0


# --- what may go wrong ----------------------------------------------------------------------------


def test_a_broker_that_is_not_there_says_so_at_once():
    port = free_port()
    with pytest.raises(LedgerError, match=f"broker http://127.0.0.1:{port}: .*refused") as caught:
        HttpQueue(f"http://127.0.0.1:{port}")
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://h", "http://", "http://h:x", "http://h:99999",
    "http://h/?a=b", "http://h/#a", "http://h\n", "http://h:0", "http://[::1"])  # fmt: skip
def test_an_unreadable_url_is_refused(url):
    with pytest.raises(ValueError, match="url must be like"):
        HttpQueue(url)


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="secret=") as caught:
        HttpQueue("http://user:hunter2@host")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("secret", ["", "a b", "\n", "ä"])
def test_a_secret_that_cannot_be_sent_is_refused(secret):
    with pytest.raises(ValueError, match="secret must be"):
        HttpQueue("http://127.0.0.1:1", secret=secret)


def test_a_broker_has_one_account(broker):
    with pytest.raises(ValueError, match="one account"):
        HttpQueue(broker.url, name="other")


def test_no_secret_is_shown(state):
    with running(state, secret="hunter2") as broker:
        with HttpQueue(broker.url, secret="hunter2", **SHORT) as queue:
            assert "hunter2" not in repr(queue) + repr(ledger_of(queue)) + repr(broker)
            with pickle.loads(pickle.dumps(queue)) as again:
                assert again.try_acquire(0) is not None
        for wrong in ("hunter3", None):
            with pytest.raises(LedgerError, match="401: the secret is wrong or missing") as caught:
                HttpQueue(broker.url, secret=wrong, **SHORT)
            assert "hunter" not in "".join(traceback.format_exception(caught.value))


ANSWERS = {
    "nothing": b"",
    "no http": b"SSH-2.0-OpenSSH\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[1,0,1",
    "no json": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "another answer": b"HTTP/1.1 200 OK\r\nContent-Length: 44\r\n\r\n"
    b'{"message": "You\'re free to connect now! :)"}',
    "a list": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]",
    "a status": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://h/\r\nContent-Length: 0\r\n\r\n",
    "an error": b'HTTP/1.1 503 Busy\r\nContent-Length: 16\r\n\r\n{"error":"busy"}',
    "an early answer": b"HTTP/1.1 102 Processing\r\n\r\n",
    "a huge number": b"HTTP/1.1 200 OK\r\nContent-Length: 6000\r\n\r\n[" + b"9" * 5998 + b"]",
}


FINE = Reply(
    *(1, False, True, True, 1000, 999, 0, 1, 0, 1, 5_000_000, 250_000, 86_400_000_000, 0),
    *(Outcome(1, 10, 1, 0, 999, 0), ((0, 10),), 0, (Waiter(2, 0, -5, -(1 << 51)),), 7),
)


def test_a_reply_survives_the_way():
    row = json.loads(json.dumps(reply_as_json(FINE)))
    assert reply_from_json(row) == FINE
    assert reply_from_json([1, 0, 1, 1, *row[4:]]) == FINE  # as Lua writes it


NO_NUMBERS = ["1e999", "NaN", "1.0", "0.5", "true", '"7"', "null", "[]", "{}", "1" + "0" * 400]


@pytest.mark.parametrize("field", [name for name in Reply._fields if name != "asked_us"])
@pytest.mark.parametrize("wrong", NO_NUMBERS)
def test_a_reply_that_is_not_of_whole_numbers_is_no_reply(field, wrong):
    row = json.loads(json.dumps(reply_as_json(FINE)))
    at = Reply._fields.index(field)
    if field in ("void", "known", "booked"):
        wrong = wrong.replace("true", "2")
    elif field in ("ready_in_us", "waiting"):
        wrong = f"[[{wrong}]]"
    elif field == "outcome":
        wrong = f"[1, {wrong}, 1, 0, 999, 0]"
    row[at] = json.loads(wrong)
    with pytest.raises(ValueError, match="must be"):
        reply_from_json(row)


@pytest.mark.parametrize(
    "wrong",
    [FINE._replace(remaining=-1), FINE._replace(resets_in_us=1 << 53), FINE._replace(granted=-1),
     FINE._replace(outcome=Outcome(1, -10)), FINE._replace(outcome=Outcome(9)),
     FINE._replace(outcome=Outcome(2, 1 << 60)), FINE._replace(ready_in_us=((0, -1),)),
     FINE._replace(waiting=(Waiter(1, -1, 0, 0),)), FINE._replace(others_ready_in_us=-1)],
)  # fmt: skip
def test_a_reply_with_a_number_out_of_range_is_no_reply(wrong):
    with pytest.raises(ValueError, match="must be"):
        reply_from_json(json.loads(json.dumps(reply_as_json(wrong))))


@pytest.mark.parametrize("wrong", [None, 5, "x", {"a": 1}, [], [1] * 99])
def test_what_is_no_list_of_a_replys_length_is_no_reply(wrong):
    with pytest.raises(ValueError, match="must be"):
        reply_from_json(wrong)


class Liar(socketserver.ThreadingTCPServer):
    """Answers everything with the same bytes."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):
                    self.request.recv(65536)
                    self.request.sendall(answer)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_only_a_whole_valid_answer_counts(answer):
    with Liar(answer) as liar:
        with pytest.raises(LedgerError, match="broker http://") as caught:
            HttpQueue(f"http://127.0.0.1:{liar.server_address[1]}")
        assert caught.value.__cause__ is not None or "answered" in str(caught.value)
        liar.shutdown()


def test_a_deadline_is_kept_when_the_broker_is_gone(state):
    with running(state) as broker:
        queue = HttpQueue(broker.url, **SHORT)
    with queue:
        start = time.monotonic()
        with pytest.raises(LedgerError, match="refused"):
            queue.acquire(0, 0.3)
        assert time.monotonic() - start < 2.0
        with pytest.raises(LedgerError):
            queue.try_acquire(0)
        with pytest.raises(LedgerError):
            queue.snapshot()


def test_a_black_hole_is_given_up(monkeypatch):
    monkeypatch.setattr(http, "SOCKET_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as hole:
        start = time.monotonic()
        with pytest.raises(LedgerError, match="timed out"):
            HttpQueue(f"http://127.0.0.1:{hole.getsockname()[1]}")
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize("whole", [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b""])
def test_an_answer_that_trickles_in_is_given_up(monkeypatch, whole):
    """The whole call has one deadline, and each byte that comes puts off nothing."""
    monkeypatch.setattr(http, "SOCKET_TIMEOUT", 0.3)

    class Trickle(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(whole)
                for _ in range(100):
                    self.request.sendall(b"x")
                    time.sleep(0.05)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Trickle) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        start = time.monotonic()
        with pytest.raises(LedgerError, match="timed out"):
            HttpQueue(f"http://127.0.0.1:{server.server_address[1]}")
        assert time.monotonic() - start < 1.5
        server.shutdown()


def test_who_waits_goes_on_when_the_broker_is_back_and_nobody_comes_early(state):
    port = free_port()
    referee = Referee(1, interval=SHORT["interval"])
    with running(state, port) as broker:
        queue = HttpQueue(broker.url, **SHORT)
        queue.acquire(0)
        referee.identify(0)
        futures = [queue.enqueue(number) for number in (1, 2)]
        for future in futures:
            future.add_done_callback(lambda done: referee.identify(done.result().shard_id))
    with queue, running(state, port) as broker:
        for future in futures:
            future.result(PATIENCE)
        assert referee.refused == 0
        assert broker.queue.snapshot().limit.remaining == 997


def test_a_connection_that_was_closed_meanwhile_is_replaced(broker, queue):
    queue.acquire(0)
    for one in list(broker._service.connections):
        broker._loop.call_soon_threadsafe(one.close)
    until(lambda: not broker._service.connections)
    assert queue.acquire(1, timeout=PATIENCE).shard_id == 1


def test_connections_that_died_in_silence_cost_one_timeout(broker, queue, monkeypatch):
    """As behind a router that forgets: nothing comes back, and nothing says so."""
    monkeypatch.setattr(http, "SOCKET_TIMEOUT", 0.4)
    holes = [socket.socketpair() for _ in range(5)]
    for hole, _ in holes:
        connection = ledger_of(queue)._connection()
        connection.sock = hole
        ledger_of(queue)._idle.append((time.monotonic(), connection))
    start = time.monotonic()
    queue.acquire(0, timeout=PATIENCE)
    assert time.monotonic() - start < 1.1
    for _, end in holes:
        end.close()


def test_a_connection_that_was_idle_for_long_is_not_used(broker, queue, monkeypatch):
    queue.snapshot()
    ((since, before),) = ledger_of(queue)._idle
    ledger_of(queue)._idle[0] = (since - http.MAX_IDLE, before)
    queue.snapshot()
    ((_, after),) = ledger_of(queue)._idle
    assert after is not before
    assert before.sock is None


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


def test_the_account_is_the_brokers(broker, queue):
    """Its snapshot is that of the broker's own queue."""
    queue.update(limit(100, 0, 60.0))
    future = queue.enqueue(3)
    wait_for_line(broker.queue, 1)
    ours, theirs = queue.snapshot(), broker.queue.snapshot()
    assert ours.waiting == theirs.waiting == 1
    assert ours.buckets[0].shards[0].shard_id == theirs.buckets[0].shards[0].shard_id == 3
    future.cancel()
    with clients_of(broker.port) as client:
        status = json.loads(client("/status.json").read()[2])
    assert status["limit"]["total"] == 100


def test_first_to_hear_and_time_are_real(broker):
    """Two stalled clients, one window apart, in their order."""
    with clients_of(broker.port) as client:
        assert client("/?shard=0").granted
        start = time.monotonic()
        waiting = {number: client(f"/?shard={number}") for number in (1, 2)}
        for expected in (1, 2):
            number = first_to_hear(waiting)
            assert waiting.pop(number).granted
            assert {1, 2} >= {expected}
    assert time.monotonic() - start >= 2 * SHORT["interval"]


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


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.RESET], ids=lambda fault: fault.name)
@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_call_whose_reply_is_lost_costs_one_permit(broker, proxy, far, fault, times):
    proxy.next.extend([fault] * times)
    assert far.acquire(3, timeout=PATIENCE).shard_id == 3
    # One that was on its way for too long has been given back, and granted anew.
    until(lambda: broker.queue.snapshot().limit.remaining == 999)


@pytest.mark.parametrize(
    "nonsense",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b"HTTP/1.1 200 OK\r\n\r\n", b"\0" * 99],
)
def test_nonsense_in_between_costs_nothing(broker, proxy, far, nonsense, monkeypatch):
    monkeypatch.setattr(http, "SOCKET_TIMEOUT", 0.3)
    proxy.next.append(nonsense)
    assert far.acquire(3, timeout=PATIENCE).shard_id == 3
    assert broker.queue.snapshot().limit.remaining == 999


def test_a_permit_that_nobody_hears_of_is_given_back(broker, proxy, far):
    """Its caller gave up before; the ledger is told with the next call."""
    proxy.always = Fault.LOST
    with pytest.raises(LedgerError):
        far.acquire(1, timeout=0.3)
    proxy.always = None
    far.snapshot()
    until(lambda: broker.queue.snapshot().limit.remaining == 1000)
    assert broker.queue.snapshot().waiting == 0


def test_losses_all_the_time_break_no_spacing(broker, proxy):
    referee = Referee(1, interval=SHORT["interval"])
    lock = threading.Lock()
    seed = 20261124
    print(f"seed {seed}")
    rng = random.Random(seed)
    faults = [Fault.LOST, Fault.RESET, None, None, None]
    proxy.next.extend(rng.choice(faults) for _ in range(400))
    with contextlib.ExitStack() as stack:
        url = f"http://127.0.0.1:{proxy.port}"
        proxy.next.extendleft([None] * 3)  # making a queue is not tried again
        queues = [stack.enter_context(HttpQueue(url, **SHORT)) for _ in range(3)]

        def shard(queue, number):
            queue.acquire(number, timeout=PATIENCE)
            with lock:
                referee.identify(number)

        threads = [threading.Thread(target=shard, args=(queues[n % 3], n)) for n in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert referee.refused == 0
    until(lambda: broker.queue.snapshot().limit.remaining == 991)
