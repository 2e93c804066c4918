"""Requests to a broker's ledger, on both sides: over real sockets, through bad networks."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import random
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from memory_backend import MemoryBackend, queue_on
from proxy import Fault, Proxy
from redis_servers import free_port, until
from test_process import needs_fork
from wire_clients import clients_of, wait_for_line

from gateway_queue_sync import AcquireTimeout, LedgerError, SessionStartLimit, serve
from gateway_queue_sync.ledgers.shared import http as module
from gateway_queue_sync.ledgers.shared.backend import Unreachable
from gateway_queue_sync.ledgers.shared.http import HttpBackend
from gateway_queue_sync.ledgers.shared.messages import (
    INTRODUCE,
    OK,
    READ,
    REFUSED,
    UPDATE,
    Granted,
    Introduction,
    Limit,
    Line,
    Look,
    Request,
    Wait,
    Waiter,
    to_wire,
)
from gateway_queue_sync.testing import Referee

SHORT = {"interval": 0.1, "margin": 0.05}
PATIENCE = 20.0
INTRODUCTION = Introduction("", "", None, 0, 0, 0, None)
FIRST = Request(
    *(1, 1_000, "one", 1, 100_000, 50_000, 86_400_000_000, 5_000_000),
    *(0, 0, 0, 0, 0),
    introduction=INTRODUCTION,
)


def limit(total=1000, remaining=1000, reset_after=0.0, max_concurrency=1):
    return SessionStartLimit(total, remaining, reset_after, max_concurrency)


def following(request, **changes):
    """The next request of a session."""
    return request._replace(
        attempt=request.attempt + 1, number=request.number + 1, introduction=None, **changes
    )


def asking(request, layout, shard_id=0):
    waiter = Waiter(7, shard_id, request.sent_us, request.sent_us)
    return following(request, layout=layout, lines=(Line(0, 0, (waiter,)),))


@contextlib.contextmanager
def running(port=0, memory=None, limit=None, reserve=0, **settings):
    """A broker, past its first window."""
    memory = memory or MemoryBackend()
    with (
        queue_on(memory, limit, reserve=reserve, **SHORT) as queue,
        serve(queue, port=port, **settings) as broker,
    ):
        time.sleep(0.16)
        broker.memory, broker.queue = memory, queue
        yield broker


@pytest.fixture
def broker():
    with running() as broker:
        yield broker


@pytest.fixture
def backend(broker):
    with contextlib.closing(HttpBackend(broker.url)) as backend:
        yield backend


@pytest.fixture
def queue(backend):
    with queue_on(backend, **SHORT) as queue:
        yield queue


# --- a broker's ledger ----------------------------------------------------------------------------


def test_a_request_arrives_as_it_was_sent_and_the_reply_as_it_was_given(broker, backend):
    introduced = backend.ask(FIRST)
    assert (introduced.status, introduced.attempt, introduced.number) == (OK, 1, 1)
    request = asking(FIRST, introduced.layout)._replace(look=1)
    (permit,) = backend.ask(request).permits
    assert (permit.waiter, permit.shard_id, permit.serial) == (7, 0, 1)
    assert broker.memory.relayed == [FIRST, request]


def test_times_are_by_the_clients_clock(broker, backend):
    """A client that booted just now, long after the broker: its waiter came two seconds ago."""
    first = FIRST._replace(sent_us=5_000_000)
    waits = Waiter(8, 1, 4_000_000, 4_000_000)
    line = Line(0, 0, (waits._replace(number=9), waits))
    request = following(first, layout=backend.ask(first).layout, sent_us=6_000_000, lines=(line,))
    backend.ask(request)
    (seen,) = backend.ask(request._replace(session="", look=1)).look.lines
    ago_us = time.monotonic() * 1e6 - seen.waiters[0].arrived_us
    assert 2_000_000 <= ago_us < 3_000_000


def test_a_request_that_is_sent_again_is_applied_once(broker, backend):
    layout = backend.ask(FIRST).layout
    request = asking(FIRST, layout)
    first = backend.ask(request)
    again = backend.ask(request._replace(attempt=9, sent_us=request.sent_us + 5))
    assert again.attempt == 9
    assert [one.serial for one in first.permits + again.permits] == [1, 1]
    assert again.permits[0].age_us > 0
    assert again.granted == 1


def test_the_recent_permits_tell_of_each_once(broker, backend):
    request = asking(FIRST, backend.ask(FIRST).layout)._replace(sent_us=3_000_000)
    for attempt in (2, 3):
        backend.ask(request._replace(attempt=attempt))
    with clients_of(broker.port) as client:
        recent = json.loads(client("/recent.json").read()[2])
        metrics = client("/metrics").read()[2].decode()
    assert [(one["shard_id"], one["bucket"]) for one in recent["grants"]] == [(0, 0)]
    assert "gateway_queue_wait_seconds_count 1\n" in metrics
    assert "gateway_queue_wait_seconds_sum 2.999\n" in metrics


@pytest.mark.parametrize(("own", "counts"), [(0, 998), (999, 999)])
def test_the_larger_reserve_counts(own, counts):
    with running(reserve=998) as broker, contextlib.closing(HttpBackend(broker.url)) as backend:
        with queue_on(backend, reserve=own, **SHORT) as queue:
            for number in range(1000 - counts):
                queue.acquire(number, timeout=PATIENCE)
            with pytest.raises(AcquireTimeout):
                queue.acquire(2, timeout=0.3)
        assert broker.queue.snapshot().limit.remaining == counts


def test_a_reserve_out_of_bounds_is_refused_and_not_raised():
    with running(reserve=5) as broker, contextlib.closing(HttpBackend(broker.url)) as backend:
        reply = backend.ask(FIRST._replace(reserve=-1))
        assert (reply.status, reply.error) == (REFUSED, f"reserve must be 0 to {1 << 52}, not -1")


def test_what_is_out_of_bounds_is_refused_with_the_ledgers_words(broker, backend):
    with pytest.raises(LedgerError, match=r"refuses this process: interval must be .* not 61 s"):
        queue_on(backend, interval=61.0)


def test_a_session_that_the_ledger_does_not_know_is_asked_to_introduce_itself(backend):
    assert backend.ask(following(FIRST)).status == INTRODUCE


def test_a_broker_on_a_broker_passes_requests_on(broker, backend, queue):
    with serve(queue, port=0) as second, contextlib.closing(HttpBackend(second.url)) as far:
        request = asking(FIRST, far.ask(FIRST).layout)
        assert len(far.ask(request).permits) == 1
    assert request in broker.memory.relayed


# --- queues on it ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_remote_queues_and_plain_clients_stand_in_one_line(broker, queue):
    """The larger window counts: so long may it take on a busy machine to hear of a permit."""
    queue.update(limit(1000, 0, 60.0))
    with (
        clients_of(broker.port) as client,
        contextlib.closing(HttpBackend(broker.url)) as backend,
        queue_on(backend, interval=0.5, margin=0.1) as other,
    ):
        order, plain = [], []
        for number in range(6):
            if number % 3 == 2:
                plain.append((number, client(f"/?shard={number}")))
            else:
                future = (queue, other)[number % 3].enqueue(number)
                future.add_done_callback(lambda future: order.append(future.result().shard_id))
            wait_for_line(broker.queue, number + 1)
        threads = [
            threading.Thread(target=lambda n=n, one=one: (one.read(), order.append(n)))
            for n, one in plain
        ]
        for thread in threads:
            thread.start()
        broker.queue.update(limit())
        until(lambda: len(order) == 6, "six permits")
        assert order == [0, 1, 2, 3, 4, 5]
        for thread in threads:
            thread.join()


def test_an_update_and_the_budget_are_seen_by_all(broker, queue):
    queue.update(limit(50, 10, 3600.0))
    with clients_of(broker.port) as client:
        assert client("/?shard=0").granted
    assert queue.snapshot().limit.remaining == 9
    queue.acquire(1, timeout=PATIENCE).unused()
    until(lambda: broker.queue.snapshot().limit.remaining == 9)
    with clients_of(broker.port) as client:
        status = json.loads(client("/status.json").read()[2])
    assert (status["limit"]["total"], status["limit"]["remaining"]) == (50, 9)


def test_spacing_holds_at_all_callers(broker):
    with contextlib.ExitStack() as stack:
        queues = [_queue_at(broker.url, stack) for _ in range(3)]
        referee = _acquire_all(queues, 9)
    assert referee.shortest_gap >= SHORT["interval"]


def _queue_at(url, stack):
    backend = stack.enter_context(contextlib.closing(HttpBackend(url)))
    return stack.enter_context(queue_on(backend, **SHORT))


def _acquire_all(queues, shards):
    """Acquire as many permits as there are shards, in threads."""
    referee, lock = Referee(1, interval=SHORT["interval"]), threading.Lock()

    def shard(queue, number):
        queue.acquire(number, timeout=PATIENCE)
        with lock:
            referee.identify(number)

    threads = [
        threading.Thread(target=shard, args=(queues[number % len(queues)], number))
        for number in range(shards)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert referee.refused == 0
    return referee


def test_who_waits_goes_on_when_the_broker_is_back():
    port, memory = free_port(), MemoryBackend()
    with contextlib.closing(HttpBackend(f"http://127.0.0.1:{port}")) as backend:
        with running(port, memory):
            queue = queue_on(backend, **SHORT)
            queue.acquire(0, timeout=PATIENCE)
            futures = [queue.enqueue(number) for number in (1, 2)]
        with queue, running(port, memory):
            assert [future.result(PATIENCE).shard_id for future in futures] == [1, 2]
            assert queue.snapshot().limit.remaining == 997


def test_a_broker_whose_queue_is_closed_is_out_of_reach(broker, backend):
    broker.queue.close()
    with pytest.raises(Unreachable, match="503: the queue is closed"):
        backend.ask(FIRST)


def test_a_broker_whose_ledger_is_out_of_reach_is_so_itself(broker, backend):
    def fail():
        raise LedgerError("gone fishing")

    broker.memory.before = fail
    with pytest.raises(Unreachable, match="503: gone fishing"):
        backend.ask(FIRST)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://h", "http://", "http://h:x", "http://h:99999",
    "http://h/?a=b", "http://h/#a", "http://h\n", "http://h:0", "http://[::1"])  # fmt: skip
def test_an_unreadable_url_is_refused(url):
    with pytest.raises(ValueError, match="url must be like"):
        HttpBackend(url)


def test_a_url_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="url must be a str"):
        HttpBackend(b"http://h")


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="secret=") as caught:
        HttpBackend("http://user:hunter2@host")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("secret", ["", "a b", "\n", "ä"])
def test_a_secret_that_cannot_be_sent_is_refused(secret):
    with pytest.raises(ValueError, match="secret must be"):
        HttpBackend("http://127.0.0.1:1", secret)


def test_a_path_in_a_url_is_kept():
    assert repr(HttpBackend("https://h:1/queue/", "s3cret")) == "broker https://h:1/queue"


def test_a_secret_that_a_broker_says_back_is_not_shown():
    said = json.dumps({"error": "not Bearer hunter2!"}).encode()
    with Liar(answer_of(said, b"403 No")) as liar, pytest.raises(LedgerError) as caught:
        HttpBackend(liar.url, "hunter2").ask(FIRST)
    assert str(caught.value).endswith("answered 403: not Bearer ***!")


# --- answers that are none ------------------------------------------------------------------------


class Liar(socketserver.ThreadingTCPServer):
    """Answers everything with the same bytes, one after the other if it is slow."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer, pause=0.0, at_once=0):
        self.calls = 0

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):
                    while self.request.recv(65536):
                        self.server.calls += 1
                        self.request.sendall(answer[:at_once])
                        for at in range(at_once, len(answer) if pause else 0):
                            self.request.sendall(answer[at : at + 1])
                            time.sleep(pause)
                        if not pause:
                            self.request.sendall(answer)
                            return

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *exc_info):
        self.shutdown()
        super().__exit__(*exc_info)


def answer_of(body, status=b"200 OK"):
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


PASSING = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[1,0,1",
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n[1,0,1",
    "an error": answer_of(b'{"error":"busy"}', b"503 Busy"),
    "too many requests": answer_of(b"", b"429 Slow Down"),
    "a bad gateway": answer_of(b"<html>", b"502 Bad Gateway"),
}
LASTING = {
    "no http": b"SSH-2.0-OpenSSH\r\n",
    "no json": answer_of(b"hello"),
    "no text": answer_of(b"\xff\xfe\xfd"),
    "another answer": answer_of(b'{"message": "You\'re free to connect now! :)"}'),
    "a list": answer_of(b"[1]"),
    "a deep list": answer_of(b"[" * 100_000),
    "a status": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a redirect": answer_of(b"", b"302 Found\r\nLocation: http://h/"),
    "an early answer": b"HTTP/1.1 102 Processing\r\n\r\n",
    "a huge number": answer_of(b"[" + b"9" * 5998 + b"]"),
    "not found": answer_of(b'{"error":"in memory"}', b"404 Not Found"),
    "malformed": answer_of(b'{"error":"attempt is wrong"}', b"400 Bad Request"),
}


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING)
def test_a_broker_that_cannot_answer_now_is_out_of_reach(answer):
    with Liar(answer) as liar, contextlib.closing(HttpBackend(liar.url)) as backend:
        with pytest.raises(Unreachable, match="broker http://") as caught:
            backend.ask(FIRST)
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("answer", LASTING.values(), ids=LASTING)
def test_what_is_no_broker_cannot_be_used(answer):
    with Liar(answer) as liar, contextlib.closing(HttpBackend(liar.url)) as backend:
        with pytest.raises(
            LedgerError, match=r"broker http://.* (answered|sent an invalid answer)"
        ) as caught:
            backend.ask(FIRST)
        assert not isinstance(caught.value, Unreachable)
        assert caught.value.__cause__ is not None


@pytest.fixture
def replies():
    """A request, and a reply to it, which a test may change."""
    memory = MemoryBackend()
    reply = memory.relay(FIRST)
    request = asking(FIRST, reply.layout)._replace(look=1)
    reply = memory.relay(request)
    assert (reply.waits, reply.permits) != ((), ())
    return request, reply


PERMIT = Granted(7, 1, 0, 0, 1, 9, 0)
WRONG = [
    {"status": 3}, {"status": -1}, {"max_concurrency": 0}, {"max_concurrency": 100_001},
    {"granted": -1}, {"remaining": -1}, {"resets_in_us": -1}, {"period": -1}, {"layout": -1},
    {"permits": (PERMIT._replace(waiter=8),)}, {"permits": (PERMIT._replace(age_us=-1),)},
    {"permits": (PERMIT._replace(shard_id=5),)}, {"permits": (PERMIT, PERMIT)},
    {"waits": (Wait(0, -1, 0, 0, 0),)}, {"waits": (Wait(0, 1, 0, 3, 0),)},
    {"look": Look((), 0, (Line(0, 5, ()),), 0, 1)},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_reply_that_no_session_could_take_in_is_none(replies, wrong):
    request, reply = replies
    body = json.dumps(to_wire(reply._replace(**wrong))).encode()
    with (
        Liar(answer_of(body)) as liar,
        pytest.raises(LedgerError, match="sent an invalid answer: "),
    ):
        HttpBackend(liar.url).ask(request)


NO_NUMBERS = ["1e999", "NaN", "1.0", "0.5", "true", "null", "{}", "1" + "0" * 400]


@pytest.mark.parametrize("wrong", NO_NUMBERS)
def test_a_reply_that_is_not_of_whole_numbers_is_none(replies, wrong):
    request, reply = replies
    for at in range(len(reply)):
        row = to_wire(reply)
        row[at] = json.loads(wrong)
        body = json.dumps(row).encode()
        with (
            Liar(answer_of(body)) as liar,
            pytest.raises(LedgerError, match="sent an invalid answer: "),
        ):
            HttpBackend(liar.url).ask(request)


@pytest.mark.parametrize("field", ["attempt", "number"])
def test_a_reply_to_another_attempt_is_not_taken_for_this_ones(replies, field):
    request, reply = replies
    other = reply._replace(**{field: getattr(reply, field) + 1})
    body = json.dumps(to_wire(other)).encode()
    with Liar(answer_of(body)) as liar, contextlib.closing(HttpBackend(liar.url)) as backend:
        with pytest.raises(Unreachable, match="answered another request"):
            backend.ask(request)
        assert not backend._idle


# --- time -----------------------------------------------------------------------------------------


def test_a_broker_that_is_not_there_says_so_at_once():
    port = free_port()
    with pytest.raises(Unreachable, match=rf"{port}: .*refused") as caught:
        HttpBackend(f"http://127.0.0.1:{port}").ask(FIRST)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(module, "CALL_TIMEOUT", 0.3)
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 1.5


@pytest.mark.usefixtures("hurried")
def test_a_black_hole_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as hole:
        with pytest.raises(Unreachable, match="timed out"):
            HttpBackend(f"http://127.0.0.1:{hole.getsockname()[1]}").ask(FIRST)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "begin", [b"", answer_of(b"")[:-7] + b"9999\r\n\r\n"], ids=["head", "body"]
)
def test_a_reply_that_comes_byte_by_byte_is_given_up(begin):
    """The whole call has one deadline, and a byte that comes does not put it off."""
    with Liar(begin + b"x" * 100, 0.03, at_once=len(begin)) as liar:
        with contextlib.closing(HttpBackend(liar.url)) as backend:
            with pytest.raises(Unreachable, match="timed out"):
                backend.ask(FIRST)
            assert not backend._idle


def test_a_slow_reply_within_the_time_counts(replies):
    request, reply = replies
    answer = answer_of(json.dumps(to_wire(reply)).encode())
    with Liar(answer, 0.001) as liar, contextlib.closing(HttpBackend(liar.url)) as backend:
        assert backend.ask(request) == reply
        assert backend.ask(request) == reply
        assert len(backend._idle) == 1


@pytest.mark.usefixtures("hurried")
def test_a_name_that_is_looked_up_for_ever_is_given_up_and_costs_one_thread(monkeypatch):
    look_up, go_on, asked = socket.getaddrinfo, threading.Event(), []

    def stuck(host, *args, flags=0, **settings):
        if flags == socket.AI_NUMERICHOST or host != "a-name":
            return look_up(host, *args, flags=flags, **settings)
        asked.append(host)
        go_on.wait(PATIENCE)
        return look_up("127.0.0.1", *args, flags=flags, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    with (
        running() as broker,
        contextlib.closing(HttpBackend(f"http://a-name:{broker.port}")) as one,
    ):
        for _ in range(2):
            with pytest.raises(Unreachable, match="look-up of a-name timed out"):
                one.ask(FIRST)
        assert asked == ["a-name"]
        go_on.set()
        with contextlib.suppress(LedgerError):  # its Host is not this machine's
            one.ask(FIRST)
        assert len(asked) <= 2


def test_a_name_that_does_not_exist_is_out_of_reach(monkeypatch):
    def unknown(*args, flags=0, **settings):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    backend = HttpBackend("http://nowhere.invalid")
    for _ in range(2):
        with pytest.raises(Unreachable, match="not known"):
            backend.ask(FIRST)


def test_the_next_address_of_a_name_is_tried(broker, monkeypatch):
    look_up = socket.getaddrinfo
    backend = HttpBackend(f"http://localhost:{broker.port}")

    def two(host, port, *args, **settings):
        found = look_up("127.0.0.1", port, *args, **settings)
        return [(*found[0][:4], ("127.0.0.1", free_port())), *found]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    with contextlib.closing(backend):
        assert backend.ask(FIRST).status == OK


# --- connections ----------------------------------------------------------------------------------


def test_a_connection_is_kept(broker, backend):
    for attempt in range(5):
        backend.ask(FIRST._replace(attempt=attempt))
        assert len(broker._service.connections) == 1


def test_a_connection_that_was_closed_meanwhile_is_replaced(broker, backend):
    backend.ask(FIRST)
    for one in list(broker._service.connections):
        broker._loop.call_soon_threadsafe(one.close)
    until(lambda: not broker._service.connections)
    assert backend.ask(FIRST).status == OK


def test_connections_that_died_in_silence_cost_one_timeout(broker, backend, monkeypatch):
    """As behind a router that forgets: nothing comes back, and nothing says so."""
    monkeypatch.setattr(module, "CALL_TIMEOUT", 0.3)
    holes = [socket.socketpair() for _ in range(5)]
    for hole, _ in holes:
        connection = http.client.HTTPConnection("127.0.0.1")
        connection.sock = hole
        backend._idle.append((module._now(), connection))
    with pytest.raises(Unreachable, match="timed out"):
        backend.ask(FIRST)
    assert backend.ask(FIRST).status == OK
    for _, end in holes:
        end.close()


def test_a_connection_that_was_idle_for_long_is_not_used(broker, backend):
    backend.ask(FIRST)
    ((since, before),) = backend._idle
    backend._idle[0] = (since - module.MAX_IDLE, before)
    backend.ask(FIRST)
    ((_, after),) = backend._idle
    assert after is not before
    assert before.sock is None


def test_closing_lets_go_of_the_connections_and_a_later_request_opens_one(broker, backend):
    backend.ask(FIRST)
    backend.close()
    until(lambda: not broker._service.connections, "the end of the connection")
    assert backend.ask(FIRST).status == OK


def test_a_connection_that_is_in_use_is_closed_at_the_end_of_its_call(broker, backend, crew):
    inside, go_on = threading.Event(), threading.Event()
    broker.memory.before = lambda: (inside.set(), go_on.wait(PATIENCE))
    call = crew(backend.ask, FIRST)
    assert inside.wait(PATIENCE)
    backend.close()
    go_on.set()
    assert call.now().status == OK
    assert not backend._idle
    until(lambda: not broker._service.connections, "the end of the connection")


def test_who_is_forgotten_lets_go_of_its_connections(broker):
    HttpBackend(broker.url).ask(FIRST)
    gc.collect()
    until(lambda: not broker._service.connections, "the end of the connection")


def test_calls_from_many_threads_do_not_mix(broker, backend, crew):
    def ask(session):
        request = FIRST._replace(session=session)
        for attempt in range(20):
            request = request._replace(attempt=attempt)
            assert backend.ask(request).attempt == attempt

    calls = [crew(ask, f"session {number}") for number in range(6)]
    for call in calls:
        call.now()


@needs_fork
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_leaves_its_parents_connections_alone(broker, backend):
    backend.ask(FIRST)
    ((_, kept),) = backend._idle
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            backend.begin_in_child()
            if not backend._idle and backend.ask(FIRST._replace(session="child")).status == OK:
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert backend.ask(FIRST).status == OK
    assert [connection for _, connection in backend._idle] == [kept]


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
    with contextlib.ExitStack() as stack:
        yield _queue_at(f"http://127.0.0.1:{proxy.port}", stack)


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
    monkeypatch.setattr(module, "CALL_TIMEOUT", 0.3)
    proxy.next.append(nonsense)
    assert far.acquire(3, timeout=PATIENCE).shard_id == 3
    assert broker.queue.snapshot().limit.remaining == 999


def test_a_call_that_gets_through_after_its_caller_gave_up_is_applied_once(
    broker, proxy, far, monkeypatch
):
    monkeypatch.setattr(module, "CALL_TIMEOUT", 0.2)
    proxy.next.append(Fault.HELD)
    assert far.acquire(3, timeout=PATIENCE).shard_id == 3
    proxy.release()
    assert far.acquire(4, timeout=PATIENCE).shard_id == 4
    assert broker.queue.snapshot().limit.remaining == 998


def test_connections_that_are_cut_again_and_again_cost_no_permit(broker, proxy, far):
    futures = [far.enqueue(number) for number in range(5)]
    for _ in range(10):
        time.sleep(0.03)
        proxy.cut()
    assert [future.result(PATIENCE).shard_id for future in futures] == [0, 1, 2, 3, 4]
    until(lambda: broker.queue.snapshot().limit.remaining == 995)


class Repeater(ThreadingHTTPServer):
    """Delivers each call three times over connections of its own, the last time much later."""

    daemon_threads = True

    def __init__(self, port):
        self.late = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                one = self._deliver(body)
                another = self._deliver(body)
                timer = threading.Timer(random.uniform(0.0, 0.5), self._deliver, [body])
                self.server.late.append(timer)
                timer.start()
                status, answer = random.choice([one, another])
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def _deliver(self, body):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                with contextlib.closing(connection):
                    connection.request(
                        "POST", self.path, body, {"Content-Type": "application/json"}
                    )
                    response = connection.getresponse()
                    return response.status, response.read()

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *exc_info):
        self.shutdown()
        for timer in self.late:
            timer.join()
        super().__exit__(*exc_info)


def test_calls_that_are_delivered_again_and_again_are_applied_once(broker):
    with Repeater(broker.port) as repeater, contextlib.ExitStack() as stack:
        queues = [_queue_at(repeater.url, stack) for _ in range(2)]
        referee = _acquire_all(queues, 6)
        permit = queues[0].acquire(6, timeout=PATIENCE)
        permit.unused()
        until(lambda: broker.queue.snapshot().limit.remaining == 994)
        time.sleep(0.6)
    assert broker.queue.snapshot().limit.remaining == 994
    assert referee.shortest_gap >= SHORT["interval"]


def test_losses_all_the_time_break_no_spacing(broker, proxy):
    seed = 20261124
    print(f"seed {seed}")
    rng = random.Random(seed)
    faults = [Fault.LOST, Fault.RESET, None, None, None]
    proxy.next.extend(rng.choice(faults) for _ in range(400))
    with contextlib.ExitStack() as stack:
        queues = [_queue_at(f"http://127.0.0.1:{proxy.port}", stack) for _ in range(3)]
        referee = _acquire_all(queues, 9)
    assert referee.shortest_gap >= SHORT["interval"]
    until(lambda: broker.queue.snapshot().limit.remaining == 991)


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no openssl")
    return certificate, key


@contextlib.contextmanager
def encrypted(liar, certificate):
    """A server whose connections are encrypted."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    liar.socket = context.wrap_socket(liar.socket, server_side=True, do_handshake_on_connect=False)
    yield liar.url.replace("http:", "https:")


def test_a_certificate_that_nobody_knows_cannot_be_used(certificate, replies):
    with Liar(b"") as liar, encrypted(liar, certificate) as url:
        with pytest.raises(LedgerError, match="certificate verify failed") as caught:
            HttpBackend(url).ask(FIRST)
        assert not isinstance(caught.value, Unreachable)


def test_a_connection_may_be_encrypted(certificate, replies, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    request, reply = replies
    answer = answer_of(json.dumps(to_wire(reply)).encode())
    with Liar(answer, 0.0001) as liar, encrypted(liar, certificate) as url:
        with contextlib.closing(HttpBackend(url)) as backend:
            for _ in range(2):
                assert backend.ask(request) == reply


@pytest.mark.usefixtures("hurried")
def test_a_handshake_that_never_ends_is_given_up():
    with Liar(b"\x16\x03\x03\x3f\xff" + b"\0" * 100, 0.03) as liar:
        with pytest.raises(Unreachable, match="timed out"):
            HttpBackend(liar.url.replace("http:", "https:")).ask(FIRST)


def test_a_port_that_is_not_encrypted_is_out_of_reach(broker):
    with pytest.raises(Unreachable, match="broker https://"):
        HttpBackend(broker.url.replace("http:", "https:")).ask(FIRST)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UPDATE, READ])
def test_a_limit_that_the_brokers_reserve_uses_up_grants_nothing(kind):
    """It may be what Discord says. The broker refuses no request for it: a session cannot drop one."""
    with running(reserve=100) as broker, contextlib.closing(HttpBackend(broker.url)) as backend:
        layout = backend.ask(FIRST).layout
        given = Limit(kind, 100, 100, 0, 1, FIRST.sent_us, FIRST.sent_us)
        reply = backend.ask(asking(FIRST, layout)._replace(limit=given))
        assert (reply.status, reply.permits) == (OK, ())
        assert broker.queue.snapshot().limit.remaining == 100
