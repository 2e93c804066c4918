"""The broker over real sockets: its protocol, clients that return, refusals, status and metrics."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import selectors
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from accounts import backend_of
from memory_backend import MemoryBackend, queue_on
from prometheus_client.parser import text_string_to_metric_families
from redis_servers import until
from test_process import needs_fork
from wire_clients import PATIENCE, Client, clients_of, first_to_hear, timed, wait_for_line

from gateway_queue_sync import (
    HttpQueue,
    LargeBotQueue,
    LedgerError,
    LocalQueue,
    NoOpQueue,
    PermitReported,
    QueueClosed,
    SessionStartLimit,
    ShardWaiting,
    SqliteQueue,
    limit_reader,
    serve,
)
from gateway_queue_sync.broker import connection, reports, routes, settings, waiting
from gateway_queue_sync.broker.connection import State
from gateway_queue_sync.ledgers import remote
from gateway_queue_sync.ledgers.shared.messages import (
    OK,
    Introduction,
    Reply,
    Request,
    from_wire,
    to_wire,
)
from gateway_queue_sync.testing import FakeClock

WINDOW = 5.25
BODY = b'{"message": "You\'re free to connect now! :)"}'
OURS = "Gateway-Queue: 1"
JSON = "Content-Type: application/json"
HTML = "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
DAY = 86_400.0
QUICK = {"interval": 0.05, "margin": 0.05}


def limit(total=1000, remaining=1000, reset_after=DAY, max_concurrency=1):
    return SessionStartLimit(total, remaining, reset_after, max_concurrency)


@pytest.fixture
def queue(clock):
    with LargeBotQueue(limit(), clock=clock) as queue:
        yield queue


@pytest.fixture
def client(queue):
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        yield client


@pytest.fixture
def strict(queue, monkeypatch):
    monkeypatch.setattr(connection, "TARPIT", (0.05, 0.06))
    with serve(queue, port=0, secret="s3cret", strict=True) as broker:
        with clients_of(broker.port) as client:
            yield client


@pytest.fixture
def short_tarpit(monkeypatch):
    monkeypatch.setattr(connection, "TARPIT", (0.05, 0.06))


SECRET = "Authorization: Bearer s3cret"


# --- the wire -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
@pytest.mark.parametrize(
    "target", ["/?shard=0", "/any/path?shard=0", "http://localhost/?shard=0", "//?shard=0"]
)
def test_any_method_and_path_is_granted_with_the_body_of_the_known_broker(client, method, target):
    status, headers, body = client(target, method).read()
    assert (status, body) == (200, BODY)
    assert headers["content-type"] == "application/json"
    assert headers["content-length"] == str(len(BODY))
    assert headers["connection"] == "keep-alive"


def test_no_byte_comes_before_the_grant(client, queue, clock):
    assert client("/?shard=0").granted
    waits = client("/?shard=1", "POST", "Expect: 100-continue", "Content-Length: 2")
    wait_for_line(queue, 1)
    waits.send("{}")
    assert waits.is_silent()
    clock.advance(WINDOW)
    assert waits.granted


def test_head_is_granted_without_a_body(client, clock, queue):
    both = client("/?shard=0", "HEAD").ask("/?shard=1")
    assert both.read(head_only=True)[1]["content-length"] == str(len(BODY))
    wait_for_line(queue, 1)
    clock.advance(WINDOW)
    assert both.read()[2] == BODY


@pytest.mark.parametrize(
    "query", ["", "?", "?shard=", "?shard=x", "?shard=-1", "?shard=1.0", "?shard=9" + "9" * 30]
)
def test_a_missing_or_bad_shard_is_shard_0_with_a_warning(client, queue, caplog, query):
    assert client("/" + query).granted
    assert "shard" in caplog.text
    assert queue.try_acquire(0) is None


def test_each_shard_waits_for_its_bucket(clock):
    with (
        LargeBotQueue(limit(max_concurrency=2), clock=clock) as queue,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        assert client("/?shard=0").granted
        late = client("/?shard=2")
        wait_for_line(queue, 1)
        assert client("/?shard=3").granted
        clock.advance(WINDOW)
        assert late.granted


def test_a_connection_is_kept_for_the_next_shard(client, queue, clock):
    kept = client("/?shard=0")
    assert kept.granted
    kept.ask("/?shard=1")
    wait_for_line(queue, 1)
    clock.advance(WINDOW)
    assert kept.granted


@pytest.mark.parametrize(
    "request_",
    ["GET /?shard=0 HTTP/1.0\r\n\r\n", "GET /?shard=0 HTTP/1.1\r\nConnection: close\r\n\r\n"],
)
def test_a_connection_that_is_not_to_be_kept_is_closed(client, request_):
    one = client().send(request_)
    assert one.read()[1]["connection"] == "close"
    assert one.is_closed_without_a_byte()


def test_requests_one_behind_another_are_answered_in_their_order(client, queue, clock):
    both = client("/?shard=0").ask("/?shard=1").ask("/healthz")
    assert both.granted
    wait_for_line(queue, 1)
    assert both.is_silent()
    clock.advance(WINDOW)
    assert both.granted
    assert both.read()[2] == b'{"status":"ok"}'


def test_hundreds_of_requests_in_one_packet_are_answered(client):
    many = client().send("GET /status HTTP/1.1\r\n\r\n" * 200)
    assert [many.read()[0] for _ in range(200)] == [200] * 200


def test_a_body_is_passed_over(client, queue, clock):
    one = client("/?shard=0", "POST", "Content-Length: 100000").send(b"x" * 100_000)
    assert one.granted
    one.ask("/?shard=1")
    wait_for_line(queue, 1)
    clock.advance(WINDOW)
    assert one.granted


def test_a_connection_whose_body_has_no_known_end_is_closed_after_the_grant(client):
    one = client("/?shard=0", "POST", "Transfer-Encoding: chunked").send("1\r\nx\r\n0\r\n\r\n")
    assert one.read()[1]["connection"] == "close"


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n"),
        ("Content-Length: 20\r\nConnection: close", b"h" * 20),
    ],
)
def test_a_permit_is_not_lost_by_a_client_that_still_sends_its_body(client, header, body):
    one = client("/?shard=0", "POST", header)
    assert one.socket.recv(1, socket.MSG_PEEK)
    time.sleep(0.05)  # in which a broker that does not wait for the body would close
    for byte in body:
        one.send(bytes([byte]))
    assert one.read()[1]["connection"] == "close"
    assert one.is_closed_without_a_byte()


def test_a_client_that_reads_its_last_answer_late_gets_all_of_it(client, queue):
    many = "GET /status HTTP/1.1\r\n\r\n" * 300 + "GET /status HTTP/1.0\r\n\r\n"
    slow = client()
    slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    slow.send(many)
    time.sleep(0.1)
    assert [slow.read()[0] for _ in range(301)] == [200] * 301
    assert slow.is_closed_without_a_byte()


def test_who_keeps_its_end_open_after_its_last_answer_is_let_go(queue, monkeypatch):
    monkeypatch.setattr(connection, "FLUSH_TIMEOUT", 0.1)
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        assert client().send("GET /?shard=0 HTTP/1.0\r\n\r\n").granted
        until(lambda: not broker._service.connections, "its end")


def test_a_head_may_come_in_pieces(client):
    one = client()
    for piece in ("GET /?sha", "rd=0 HT", "TP/1.1\r", "\nHost: localhost\r\n\r", "\n"):
        one.send(piece)
        assert one.is_silent() or piece == "\n"
    assert one.granted


def test_a_priority_is_a_head_start(client, queue, clock):
    assert client("/?shard=0").granted
    clients = {}
    for number, ask in enumerate(("/?shard=1", "/?shard=2&priority=60", "/?shard=3&priority=-9")):
        clients[number] = client(ask)
        wait_for_line(queue, number + 1)
    assert next_one(clients, clock) == 1
    assert next_one(clients, clock) == 0
    assert next_one(clients, clock) == 2


def test_a_priority_is_an_hour_at_most(client, queue, clock):
    assert client("/?shard=0").granted
    clients = {0: client("/?shard=1&priority=1e300")}
    wait_for_line(queue, 1)
    clock.advance(3.0)
    clients[1] = client("/?shard=2&priority=999999")
    wait_for_line(queue, 2)
    assert next_one(clients, clock) == 0


@pytest.mark.parametrize(
    "bad", ["priority=x", "priority=nan", "timeout=x", "timeout=-1", "timeout=inf"]
)
def test_a_bad_priority_or_timeout_counts_as_left_out_with_a_warning(client, caplog, bad):
    assert client(f"/?shard=0&{bad}").granted
    assert bad.split("=")[0] in caplog.text


def test_a_timeout_ends_without_a_byte(client, queue):
    assert client("/?shard=0").granted
    assert client("/?shard=1&timeout=0").is_closed_without_a_byte()
    wait_for_line(queue, 0)


def test_a_timeout_is_told_to_those_who_know_what_a_status_means(client, queue):
    assert client("/?shard=0").granted
    one = client("/?shard=1&timeout=0.1", "GET", OURS)
    status, _, body = one.read()
    assert (status, json.loads(body)) == (408, {"error": "no permit within 0.1 s"})
    assert one.ask("/healthz").read()[0] == 200


def test_a_persons_browser_gets_the_page_and_no_permit(client, queue):
    status, headers, _ = client("/", "GET", "Sec-Fetch-Site: none", HTML).read()
    assert (status, headers["location"]) == (303, "/status")
    assert client("/favicon.ico").read()[0] == 404
    assert queue.snapshot().granted == 0


def next_one(clients, clock):
    """Which of those that wait is granted next."""
    clock.advance(WINDOW)
    number = first_to_hear(clients)
    assert clients.pop(number).granted
    return number


# --- who is gone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "half-close", "reset"])
def test_a_client_that_goes_away_takes_no_permit(client, queue, clock, end):
    assert client("/?shard=0").granted
    gone = client("/?shard=1")
    wait_for_line(queue, 1)
    waits = client("/?shard=2")
    wait_for_line(queue, 2)
    if end == "half-close":
        gone.socket.shutdown(socket.SHUT_WR)
    else:
        if end == "reset":
            gone.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
    wait_for_line(queue, 1)
    clock.advance(WINDOW)
    assert waits.granted
    assert queue.snapshot().limit.remaining == 998


@pytest.mark.parametrize("again", ["/?shard=1", "/?shard=1&priority=-1000"])
def test_a_client_that_is_back_within_30_s_has_its_old_place(client, queue, clock, again):
    """A client with a timeout of 30 s moves up in a long line, too."""
    back = come_back_after(client, queue, clock, 29.9, "/?shard=1", again)
    assert back == "before"


def test_a_place_is_not_kept_for_longer(client, queue, clock):
    assert come_back_after(client, queue, clock, 30.1, "/?shard=1", "/?shard=1") == "behind"


def test_a_place_is_known_by_its_ticket(client, queue, clock):
    tickets = "/?shard=1&ticket=a", "/?shard=7&ticket=a"
    assert come_back_after(client, queue, clock, 10.0, *tickets) == "before"


def test_another_ticket_has_another_place(client, queue, clock):
    tickets = "/?shard=1&ticket=a", "/?shard=1&ticket=b"
    assert come_back_after(client, queue, clock, 10.0, *tickets) == "behind"


def test_no_place_is_kept_for_an_endless_ticket(client, queue, clock):
    tickets = ("/?shard=1&ticket=" + "a" * 201,) * 2
    assert come_back_after(client, queue, clock, 10.0, *tickets) == "behind"


def test_no_place_is_kept_without_a_shard(client, queue, clock):
    assert come_back_after(client, queue, clock, 10.0, "/", "/") == "behind"


def come_back_after(client, queue, clock, pause, ask, again):
    """Whether a client that went away is before or behind one that came after it, once it is back."""
    queue.update(limit(1000, 0, 40.0))  # nobody is granted meanwhile
    gone = client(ask)
    wait_for_line(queue, 1)
    clock.advance(1.0)
    other = client("/?shard=5")
    wait_for_line(queue, 2)
    gone.close()
    wait_for_line(queue, 1)
    clock.advance(pause)
    back = client(again)
    wait_for_line(queue, 2)
    clock.advance(41.0 - pause)
    first = first_to_hear({0: back, 1: other})
    return "before" if first == 0 else "behind"


def test_a_later_request_with_the_same_ticket_replaces_the_older_one(
    client, queue, clock, short_tarpit
):
    queue.update(limit(1000, 0, 40.0))  # nobody is granted meanwhile
    older = client("/?shard=1&ticket=a")
    wait_for_line(queue, 1)
    clock.advance(1.0)
    other = client("/?shard=5")
    wait_for_line(queue, 2)
    later = client("/?shard=1&ticket=a")
    assert older.is_closed_without_a_byte()
    wait_for_line(queue, 2)
    clock.advance(40.0)
    assert first_to_hear({0: later, 1: other}) == 0


def test_a_client_that_understands_is_told_that_it_was_replaced(client, queue):
    queue.acquire(0)
    older = client("/?shard=1&ticket=a", "GET", OURS)
    wait_for_line(queue, 1)
    client("/?shard=1&ticket=a", "GET", OURS)
    assert older.read()[0] == 409
    wait_for_line(queue, 1)


# --- permits that their clients confirm -----------------------------------------------------------

CONFIRMED = "/?shard=1&ticket=a&confirm=1"
ledgers = pytest.mark.accounts("memory", "sqlite", "redis")


def report(client, state, ticket="a"):
    return client(f"/permit?ticket={ticket}&state={state}", "POST", OURS).read()[0]


def test_the_window_starts_when_the_client_reports_that_it_has_identified(client, queue, clock):
    assert client(CONFIRMED).granted
    clock.advance(WINDOW - 0.1)
    assert report(client, "sent") == 200
    until(lambda: queue.snapshot().buckets[0].ready_in == WINDOW, "the report")


@pytest.fixture
def confirming(account, clock):
    """What asks a broker, its queue, and the broker."""
    with account.large(limit(), clock=clock) as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            yield client, queue, broker


def ready_in(queue):
    return queue.snapshot().buckets[0].ready_in


@ledgers
def test_a_bucket_is_closed_until_its_client_reports_but_for_10_s_only(confirming, clock):
    client, queue, _ = confirming
    assert client(CONFIRMED).granted
    assert ready_in(queue) == 10 + WINDOW
    other = client("/?shard=2")
    wait_for_line(queue, 1)
    clock.advance(10 + WINDOW - 0.1)
    assert other.is_silent()
    clock.advance(0.1)
    assert other.granted


@ledgers
def test_a_bucket_stays_closed_for_10_s_though_its_broker_has_ended(confirming, clock):
    client, queue, broker = confirming
    assert client(CONFIRMED).granted
    broker.close()
    clock.advance(10)
    assert ready_in(queue) == WINDOW


@ledgers
def test_a_client_that_takes_its_time_gives_back_an_unused_permit(confirming, clock):
    client, queue, _ = confirming
    assert client(CONFIRMED).granted
    clock.advance(WINDOW + 1)
    assert report(client, "unused") == 200
    until(lambda: queue.snapshot().limit.remaining == 1000, "the report")
    assert ready_in(queue) == 0


@ledgers
@pytest.mark.parametrize("after", [1, WINDOW + 1, 10 + WINDOW + 1])
def test_a_client_that_takes_its_time_identifies_at_last(confirming, clock, after):
    client, queue, _ = confirming
    assert client(CONFIRMED).granted
    clock.advance(after)
    assert report(client, "sent") == 200
    until(lambda: ready_in(queue) == WINDOW, "the report")
    other = client("/?shard=2")
    wait_for_line(queue, 1)
    clock.advance(WINDOW)
    assert other.granted


def test_who_waits_for_a_held_bucket_learns_of_the_report(client, queue, clock):
    assert client(CONFIRMED).granted
    other = client("/?shard=2")
    wait_for_line(queue, 1)
    assert report(client, "sent") == 200
    until(lambda: ready_in(queue) == WINDOW, "the report")
    clock.advance(WINDOW)
    assert other.granted


def test_an_unused_permit_is_given_back(client, queue, clock):
    assert client(CONFIRMED).granted
    assert report(client, "unused") == 200
    until(lambda: queue.snapshot().limit.remaining == 1000, "the report")
    assert report(client, "sent") == 404


def test_a_permit_that_was_sent_may_be_rejected(client, queue, clock):
    assert client(CONFIRMED).granted
    assert report(client, "sent") == report(client, "rejected") == 200
    until(lambda: queue.snapshot().buckets[0].ready_in == 2 * WINDOW, "the report")


def test_a_report_that_fits_no_permit_is_refused(client, queue):
    assert client("/?shard=1&ticket=a").granted
    assert report(client, "sent") == 404
    assert report(client, "lost") == 400
    assert client("/permit?ticket=a&state=sent", "GET", OURS).read()[0] == 405


def test_reports_are_taken_for_a_minute(client, queue, clock, monkeypatch):
    monkeypatch.setattr(waiting, "TICK", 0.01)
    with serve(queue, port=0) as broker, clients_of(broker.port) as ask:
        assert ask(CONFIRMED).granted
        clock.advance(60.1)
        until(lambda: report(ask, "sent") == 404, "the end of the minute")


def test_confirming_takes_a_ticket(strict):
    assert strict("/?shard=1&confirm=1", "GET", OURS, SECRET).read()[0] == 400


def test_of_several_kept_places_the_oldest_is_taken(client, queue, clock):
    queue.update(limit(1000, 0, 40.0))
    arrivals = []
    for number in range(3):
        arrivals.append(client("/?shard=1"))
        wait_for_line(queue, number + 1)
        clock.advance(1.0)
    for left, gone in enumerate(reversed(arrivals)):  # the newest goes first
        gone.close()
        wait_for_line(queue, 2 - left)
    client("/?shard=1")
    wait_for_line(queue, 1)
    assert queue.snapshot().buckets[0].shards[0].waited == pytest.approx(3.0)


def test_a_client_with_a_short_timeout_moves_up_a_long_line(client, queue, clock):
    """Ten windows are before it, and it has the patience for three at a time."""
    assert client("/?shard=0").granted
    ahead = {}
    for number in range(10):
        ahead[number] = client(f"/?shard={number + 10}")
        wait_for_line(queue, number + 1)
    clock.advance(0.001)
    impatient = client("/?shard=1")
    wait_for_line(queue, 11)
    clock.advance(0.001)
    behind = client("/?shard=2")
    wait_for_line(queue, 12)
    for granted in range(10):
        if granted % 3 == 2:
            impatient.close()
            wait_for_line(queue, 11 - granted)
            impatient = client("/?shard=1")
            wait_for_line(queue, 12 - granted)
        assert next_one(ahead, clock) == granted
    clock.advance(WINDOW)
    assert first_to_hear({0: impatient, 1: behind}) == 0


def test_half_of_those_who_wait_may_go_at_once(clock):
    """The next grant goes to the first that is left."""
    with LargeBotQueue(limit(5000, 5000), clock=clock) as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            assert client("/?shard=0").granted
            waiting = [client(f"/?shard={number}") for number in range(1, 1001)]
            wait_for_line(queue, 1000)
            order = [shard.shard_id for shard in queue.snapshot().buckets[0].shards]
            for number in order[:500]:
                waiting[number - 1].close()
            wait_for_line(queue, 500)
            left = {number: waiting[number - 1] for number in order[500:]}
            for expected in order[500:503]:
                assert next_one(left, clock) == expected


@pytest.fixture
def many_files():
    """Thousands of connections have both of their ends here."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = before[1] if before[1] != resource.RLIM_INFINITY else 20_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_burst_of_connections_loses_none(many_files):
    """All begin to connect before any is accepted."""
    with NoOpQueue() as queue, serve(queue, port=0) as broker, contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        go_on = threading.Event()
        broker._loop.call_soon_threadsafe(go_on.wait, PATIENCE)
        for _ in range(2_000):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", broker.port))
            selector.register(one, selectors.EVENT_WRITE)
        until(lambda: len(selector.select(0)) == 2_000, "all connections")
        go_on.set()
        answers, give_up = [], time.monotonic() + PATIENCE
        while len(answers) < 2_000 and time.monotonic() < give_up:
            for key, ready in selector.select(1.0):
                if ready & selectors.EVENT_WRITE:
                    key.fileobj.send(b"GET /?shard=1 HTTP/1.1\r\n\r\n")
                    selector.modify(key.fileobj, selectors.EVENT_READ)
                else:
                    answers.append(key.fileobj.recv(15))
                    selector.unregister(key.fileobj)
        assert answers == [b"HTTP/1.1 200 OK"] * 2_000


def test_a_permit_that_reaches_its_client_too_late_is_given_back_and_asked_for_again(
    client, queue, clock, monkeypatch
):
    held = threading.Event()
    hand_over = waiting.WaitingClient._hand_over

    def late(self, future):
        if not held.is_set():
            held.set()
            clock.advance(1.0)  # longer than the margin
        hand_over(self, future)

    monkeypatch.setattr(waiting.WaitingClient, "_hand_over", late)
    one = client("/?shard=1")
    assert one.granted
    assert held.is_set()
    assert queue.snapshot().limit.remaining == 999
    assert queue.snapshot().granted == 2  # both were stamped, one was given back


def test_a_permit_for_a_client_that_is_just_going_is_given_back(client, queue, clock, monkeypatch):
    """Its end was reset, and the loop has not come to that yet."""
    hand_over = waiting.WaitingClient._hand_over

    def while_it_goes(self, future):
        self.client._transport.abort()
        hand_over(self, future)

    monkeypatch.setattr(waiting.WaitingClient, "_hand_over", while_it_goes)
    client("/?shard=1")
    until(lambda: queue.snapshot().granted == 1 and queue.snapshot().limit.remaining == 1000)
    assert b"wait_seconds_count 0" in client("/metrics").read()[2]


@pytest.mark.parametrize("end", ["close", "half-close"])
def test_a_client_leaves_the_line_before_its_connection_is_lost(queue, clock, monkeypatch, end):
    """What is still to be sent may keep a connection that closes for long."""
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        assert client("/?shard=0").granted
        monkeypatch.setattr(connection.Connection, "connection_lost", lambda *_: None)
        client("/?shard=1")
        wait_for_line(queue, 1)
        (one,) = (one for one in broker._service.connections if one.waiting is not None)
        going = one.close if end == "close" else one.eof_received
        broker._loop.call_soon_threadsafe(going)
        wait_for_line(queue, 0)


def test_clients_that_left_are_out_of_the_line_when_the_broker_is_closed(queue):
    """Even if the readers' thread is busy."""
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        assert client("/?shard=0").granted
        gone = client("/?shard=1")
        wait_for_line(queue, 1)
        go_on = threading.Event()
        broker._service.shared.executor.submit(go_on.wait)
        gone.close()
        until(lambda: len(broker._service.connections) == 1)
        broker.close()
        go_on.set()
        assert queue.snapshot().waiting == 0


def test_reports_and_who_left_are_not_lost_at_an_end_while_an_observer_is_slow(clock):
    goes_on, reported = threading.Event(), threading.Event()

    def observer(event):
        if isinstance(event, PermitReported):
            reported.set()
            assert goes_on.wait(PATIENCE)

    buckets = limit(max_concurrency=2)
    with (
        LargeBotQueue(buckets, clock=clock, observer=observer) as queue,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        for shard in range(2):
            assert client(f"/?shard={shard}&ticket={shard}&confirm=1").granted
        assert report(client, "sent", "0") == 200
        assert reported.wait(PATIENCE)
        waiting = client("/?shard=3")
        wait_for_line(queue, 1)
        waiting.close()
        assert report(client, "rejected", "1") == 200
        _, took = timed(broker.close)
        seen = queue.snapshot()
        goes_on.set()
        assert seen.buckets[1].ready_in == 2 * WINDOW
        assert seen.waiting == 0
        assert took < PATIENCE / 4


# --- who is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("Authorization: Bearer s3cre",),
        ("Authorization: Basic s3cret",),
        ("Authorization: s3cret",),
        ("Authorization: Bearer \xff\xfe",),
    ],
)
def test_a_wrong_secret_is_no_permit_for_who_takes_any_status_for_one(strict, queue, given):
    assert strict("/?shard=0", "GET", *given).is_closed_without_a_byte()
    status, headers, body = strict("/?shard=0", "GET", OURS, *given).read()
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert b"s3cret" not in body
    assert queue.snapshot().granted == 0


def test_refusals_are_logged_a_few_times_a_minute_and_show_no_secret(strict, caplog):
    """An existing client only sees that its connection is closed."""
    for _ in range(30):
        assert strict("/?shard=0", "GET", OURS, "Authorization: Bearer hunter2").read()[0] == 401
    assert 1 <= caplog.text.count("refused: the secret is wrong or missing") < 15
    assert "hunter2" not in caplog.text


def test_the_right_secret_is_let_in(strict):
    assert strict("/?shard=0", "GET", SECRET).granted


def test_refused_clients_are_held_before_they_are_let_go(strict):
    """They may ask again at once."""
    one = strict("/?shard=0")
    _, after = timed(one.is_closed_without_a_byte)
    assert after > 0.04


def test_strictness_refuses_a_bad_shard(strict, queue):
    assert strict("/?shard=x", "GET", SECRET).is_closed_without_a_byte()
    assert strict("/", "GET", SECRET, OURS).read()[0] == 400
    assert queue.snapshot().granted == 0


def test_nonsense_is_answered_to_those_who_know_what_a_status_means(client):
    for lines in ("no colon", "X: " + "y" * 9_000, "Content-Length: 1\r\nContent-Length: 2"):
        one = client().send(f"GET / HTTP/1.1\r\n{OURS}\r\n{lines}\r\n\r\n")
        status, headers, _ = one.read()
        assert (status, headers["connection"]) == (431 if len(lines) > 999 else 400, "close")
        assert one.is_closed_without_a_byte()


def test_the_body_of_a_malformed_request_is_no_request(client, queue, short_tarpit):
    one = client().send("POST /?shard=0 HTTP/1.1\r\nno colon\r\nContent-Length: 26\r\n\r\n")
    one.send("GET /?shard=1 HTTP/1.1\r\n\r\n")
    assert one.is_closed_without_a_byte()
    assert queue.snapshot().granted == 0


def test_an_empty_line_before_a_request_is_skipped(client):
    assert client().send("\r\nGET /?shard=0 HTTP/1.1\r\n\r\n").granted


def test_close_among_the_options_of_a_connection_closes_it(client):
    one = client("/?shard=0", "GET", "Connection: TE, close")
    assert one.read()[1]["connection"] == "close"
    assert one.is_closed_without_a_byte()


def test_a_body_that_is_expected_is_called_for(tmp_path):
    with SqliteQueue(tmp_path / "q") as queue, serve(queue, port=0, secret="s3cret") as broker:
        with clients_of(broker.port) as client:
            expects = ("/ledger", "POST", JSON, "Content-Length: 2", "Expect: 100-continue")
            one = client(*expects, SECRET)
            assert one.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert one.send("{}").read()[0] == 400
            assert client(*expects).read()[0] == 401  # nothing is called for that is refused


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\0\1\2\3\r\n\r\n",
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 4_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"GET /?shard=0 HTTP/1.1\r\nx: " + b"y" * 9_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"z" * 100_000,
    ],
    ids=[
        "bytes",
        "no path",
        "http2",
        "version",
        "http0.9",
        "tls",
        "many headers",
        "long header",
        "no end",
    ],
)
def test_nonsense_gets_no_byte_and_no_permit(client, queue, short_tarpit, nonsense):
    assert client().send(nonsense).is_closed_without_a_byte()
    assert queue.snapshot().granted == 0
    assert client("/?shard=0").granted


def test_who_takes_too_long_for_a_head_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0.1)
    with (
        SqliteQueue(tmp_path / "q") as queue,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        slow = client().send("GET /?shard=0 HTTP/1.1\r\nHost:")
        silent = client()
        body = client("/ledger", "POST", JSON, "Content-Length: 10")
        for one in (slow, silent, body):
            assert one.is_closed_without_a_byte()


def test_a_body_that_comes_after_the_answer_buys_and_costs_no_time(queue, monkeypatch):
    """What nobody reads is neither the beginning of a request, nor a sign of life."""
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0.1)
    monkeypatch.setattr(connection, "IDLE_TIMEOUT", 0.5)
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        one = client("/?shard=0", "POST", "Content-Length: 1000000")
        assert one.granted
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 5.0:
                one.send(b"x")
                time.sleep(0.02)
        assert 0.4 < time.monotonic() - start < 4.0


def test_who_waits_and_talks_on_and_on_is_let_go(client, queue):
    assert client("/?shard=0").granted
    talker = client("/?shard=1")
    wait_for_line(queue, 1)
    with contextlib.suppress(ConnectionError):
        talker.send(b"x" * 20_000)
    assert talker.is_closed_without_a_byte()
    wait_for_line(queue, 0)


def test_who_does_not_read_is_not_served_on_and_on(queue, monkeypatch):
    monkeypatch.setattr(connection, "FLUSH_TIMEOUT", 0.5)
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        slow = deaf(client, 300)
        until(lambda: _is_sending(broker), "a full buffer")
        (one,) = broker._service.connections
        assert one._transport.get_write_buffer_size() < 200_000
        until(lambda: not broker._service.connections, "its end")
        with pytest.raises((AssertionError, ConnectionError)):
            [slow.read() for _ in range(300)]


def test_who_reads_late_gets_all(client):
    slow = deaf(client, 300)
    time.sleep(0.1)
    assert [slow.read()[0] for _ in range(300)] == [200] * 300


def test_closing_does_not_wait_for_who_does_not_read(queue):
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        deaf(client, 300)
        until(lambda: _is_sending(broker), "a full buffer")
        _, took = timed(broker.close)
        assert took < PATIENCE / 4
        assert not broker._service.connections


def _is_sending(broker):
    return any(one.state is State.SENDING for one in broker._service.connections)


def deaf(client, times):
    """A client that asks for the page so many times, and reads nothing."""
    one = client()
    one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    return one.send("GET /status HTTP/1.1\r\n\r\n" * times)


def test_too_many_connections_are_refused(queue, short_tarpit):
    with serve(queue, port=0, max_connections=2) as broker, clients_of(broker.port) as client:
        assert client("/?shard=0").granted
        assert client("/healthz").read()[0] == 200
        assert client("/?shard=1").is_closed_without_a_byte()
        assert client("/?shard=1", "GET", OURS).read()[0] == 503


def test_who_was_let_in_is_served_however_many_come(queue, short_tarpit):
    with serve(queue, port=0, max_connections=2) as broker, clients_of(broker.port) as client:
        let_in = [client("/healthz") for _ in range(2)]
        assert [one.read()[0] for one in let_in] == [200, 200]
        for _ in range(10):
            client()
        assert let_in[1].ask("/?shard=1", "GET", OURS).granted


def test_newcomers_over_the_most_keep_no_connection(queue):
    with serve(queue, port=0, max_connections=2) as broker, clients_of(broker.port) as client:
        for _ in range(100):
            client()
        assert client().is_closed_without_a_byte()
        until(lambda: len(broker._service.connections) == 2 + routes.MAX_OVER_LIMIT)
        assert queue.try_acquire(0)


def test_there_is_room_again_when_somebody_has_gone(queue):
    with serve(queue, port=0, max_connections=1) as broker, clients_of(broker.port) as client:
        first = client("/healthz")
        assert first.read()[0] == 200
        first.close()
        until(lambda: not broker._service.connections)
        assert client("/?shard=0", "GET", OURS).granted


def test_a_name_of_several_addresses_is_listened_on_at_each(queue, monkeypatch):
    both = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET, ("127.0.0.2", 0))]
    gone = (socket.AF_INET, ("203.0.113.1", 0))  # none of this machine's
    monkeypatch.setattr(settings, "_addresses", lambda _: [gone, *both])
    monkeypatch.setattr(settings, "is_loopback", lambda _: True)
    with serve(queue, "name", 0) as broker:
        for _, (where, _) in both:
            with socket.create_connection((where, broker.port), 5.0):
                pass
    monkeypatch.setattr(settings, "_addresses", lambda _: [gone])
    with pytest.raises(OSError, match="assign"):
        serve(queue, "name", 0)


def test_localhost_is_served(queue):
    with serve(queue, "localhost", 0) as broker, clients_of(broker.port) as client:
        assert client("/?shard=0").granted


def test_a_used_up_budget_is_held_until_it_resets(clock):
    with LargeBotQueue(limit(10, 0, 3600.0), clock=clock) as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            legacy = client("/?shard=0")
            wait_for_line(queue, 1)
            status, headers, body = client("/?shard=1", "GET", OURS).read()
            assert (status, headers["retry-after"]) == (429, "3600")
            assert json.loads(body) == {"error": "the session start limit is used up"}
            assert legacy.is_silent()
            clock.advance(3600.0)
            assert legacy.granted


def test_who_waits_when_the_budget_is_used_up_is_told_if_it_knows_what_that_means(
    clock, monkeypatch
):
    monkeypatch.setattr(waiting, "TICK", 0.02)
    with LargeBotQueue(limit(10, 1, 3600.0), clock=clock) as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            assert client("/?shard=0").granted
            assert client("/?shard=1", "GET", OURS).read()[0] == 429


def test_who_waits_is_told_when_the_limit_is_used_up_by_others(queue, monkeypatch):
    monkeypatch.setattr(waiting, "TICK", 0.02)
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        assert client("/?shard=0").granted
        legacy, ours = client("/?shard=1"), client("/?shard=2", "GET", OURS)
        wait_for_line(queue, 2)
        queue.update(limit(1000, 0, 3600.0))
        status, headers, _ = ours.read()
        assert (status, headers["retry-after"]) == (429, "3600")
        assert legacy.is_silent()


def test_a_limit_that_another_process_has_raised_counts_at_the_next_request(tmp_path):
    with (
        SqliteQueue(tmp_path / "q", limit(1000, 1, max_concurrency=2), **QUICK) as queue,
        SqliteQueue(tmp_path / "q", **QUICK) as other,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        assert client("/?shard=0", "GET", OURS).granted
        assert client("/?shard=1", "GET", OURS).read()[0] == 429
        other.update(limit(max_concurrency=2))
        until(lambda: client("/?shard=1", "GET", OURS).read()[0] == 200, "a permit")


def test_a_queue_that_is_closed_just_now_is_told(client, monkeypatch):
    def closed(*_):
        raise QueueClosed

    monkeypatch.setattr(waiting, "enqueue", closed)
    assert client("/?shard=0", "GET", OURS).read()[0] == 503


def test_an_end_does_not_wait_for_a_request_to_the_ledger(tmp_path, caplog, monkeypatch):
    begun, goes_on, went_on = threading.Event(), threading.Event(), []

    def relay(_):
        begun.set()
        went_on.append(goes_on.wait(PATIENCE))
        raise LedgerError("out of reach")

    with (
        SqliteQueue(tmp_path / "q") as queue,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        monkeypatch.setattr(backend_of(queue), "relay", relay)
        body = json.dumps(REQUEST)
        one = client("/ledger", "POST", JSON, f"Content-Length: {len(body)}").send(body)
        assert begun.wait(PATIENCE)
        broker.close()
        goes_on.set()
        assert one.is_closed_without_a_byte()
        broker._service.ledger.executor.shutdown()
    assert went_on == [True]
    assert not caplog.records


def test_an_error_at_the_ledgers_endpoint_is_logged_and_answered(tmp_path, caplog, monkeypatch):
    with SqliteQueue(tmp_path / "q") as queue, serve(queue, port=0) as broker:
        monkeypatch.setattr(backend_of(queue), "relay", lambda *_: 1 / 0)
        with clients_of(broker.port) as client:
            good = json.dumps(REQUEST)
            one = client("/ledger", "POST", JSON, f"Content-Length: {len(good)}").send(good)
            assert json.loads(one.read()[2]) == {"error": "ZeroDivisionError"}
    assert "ZeroDivisionError" in caplog.text


def test_a_queue_that_raises_is_asked_again_for_who_would_not_understand(clock, monkeypatch):
    monkeypatch.setattr(waiting, "MAX_REST", 0.02)
    monkeypatch.setattr(waiting, "TICK", 0.01)
    queue = LargeBotQueue(limit(10, 0, 3600.0), clock=clock, when_exhausted="raise")
    with queue, serve(queue, port=0) as broker, clients_of(broker.port) as client:
        legacy = client("/?shard=0")
        assert client("/?shard=1", "GET", OURS).read()[1]["retry-after"] == "3600"
        assert legacy.is_silent()
        clock.advance(3600.0)
        assert legacy.granted


def test_a_timeout_holds_while_a_queue_that_raises_has_nothing_left(clock):
    queue = LargeBotQueue(limit(10, 0, 3600.0), clock=clock, when_exhausted="raise")
    with queue, serve(queue, port=0) as broker, clients_of(broker.port) as client:
        ended, took = timed(client("/?shard=0&timeout=0.2").is_closed_without_a_byte)
        assert ended
        assert took < PATIENCE / 4


def test_a_place_is_kept_while_a_queue_that_raises_has_nothing_left(clock, monkeypatch):
    monkeypatch.setattr(waiting, "MAX_REST", 0.02)
    monkeypatch.setattr(waiting, "TICK", 0.01)
    queue = LargeBotQueue(limit(10, 0, 20.0), clock=clock, when_exhausted="raise")
    with queue, serve(queue, port=0) as broker, clients_of(broker.port) as client:
        kept = broker._service.room.positions
        gone = client("/?shard=1")
        until(lambda: broker._service.room.clients, "its wait")
        gone.close()
        until(lambda: len(kept) == 1, "its place")
        clock.advance(10.0)
        client("/?shard=1")
        until(lambda: len(kept) == 0, "its return")
        (back,) = broker._service.room.clients
        assert back.position.arrived_us == clock.now_us() - 10_000_000


def test_two_days_until_the_reset_are_told_and_waited_for(clock):
    queue = LargeBotQueue(limit(10, 0, 2 * DAY), clock=clock)
    with queue, serve(queue, port=0) as broker, clients_of(broker.port) as client:
        legacy = client("/?shard=0")
        assert client("/?shard=1", "GET", OURS).read()[1]["retry-after"] == str(math.ceil(2 * DAY))
        wait_for_line(queue, 1)
        clock.advance(2 * DAY)
        assert legacy.granted


# --- beginning and end ----------------------------------------------------------------------------


def test_closing_grants_nobody_any_more(queue, clock):
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        assert client("/?shard=0").granted
        legacy, ours = client("/?shard=1"), client("/?shard=2", "GET", OURS)
        wait_for_line(queue, 2)
        _, took = timed(broker.close)
        assert legacy.is_closed_without_a_byte()
        assert ours.read()[0] == 503
        assert took < PATIENCE / 4
        assert queue.snapshot().waiting == 0
        clock.advance(WINDOW)
        assert queue.snapshot().granted == 1
        broker.close()
        assert "closed" in repr(broker)
        with pytest.raises(ConnectionRefusedError):
            Client(broker.port)


def test_a_queue_that_is_closed_lets_its_clients_go(queue, short_tarpit):
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        assert client("/?shard=0").granted
        legacy, ours = client("/?shard=1"), client("/?shard=2", "GET", OURS)
        wait_for_line(queue, 2)
        queue.close()
        assert legacy.is_closed_without_a_byte()
        assert ours.read()[0] == 503
        assert client("/?shard=3", "GET", OURS).read()[0] == 503
        assert client("/healthz").read()[0] == 503


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_holds_no_connection_of_the_broker(queue, short_tarpit):
    """Else clients do not see that the broker closes, and no other can have its port."""
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        refused = client("/healthz")
        assert refused.read()[0] == 200
        child = os.fork()
        if not child:
            time.sleep(2 * PATIENCE)
            os._exit(0)
        try:
            refused.send("nonsense\r\n\r\n")
            assert refused.is_closed_without_a_byte()
            broker.close()
            with serve(queue, port=broker.port), clients_of(broker.port) as again:
                assert again("/?shard=0").granted
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_an_address_in_use_says_so(queue):
    with serve(queue, port=0) as broker, pytest.raises(OSError, match="in use"):
        serve(queue, port=broker.port)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::"])
def test_an_address_that_others_reach_needs_a_secret(queue, host):
    with pytest.raises(ValueError, match="needs a secret"):
        serve(queue, host, 0)


def test_an_address_that_others_reach_is_served_with_a_secret(queue):
    with serve(queue, "0.0.0.0", 0, secret="s3cret") as broker, clients_of(broker.port) as client:
        assert client("/?shard=0", "GET", SECRET).granted
        assert "s3cret" not in repr(broker)


@pytest.mark.parametrize(
    ("error", "settings"),
    [
        (TypeError, {"queue": object()}),
        (TypeError, {"host": 5}),
        (ValueError, {"host": "no such host"}),
        (TypeError, {"port": "80"}),
        (ValueError, {"port": 65_536}),
        (ValueError, {"port": -1}),
        (ValueError, {"secret": ""}),
        (ValueError, {"secret": "a b"}),
        (TypeError, {"secret": b"x"}),
        (ValueError, {"max_connections": 0}),
    ],
)
def test_bad_settings_are_refused(queue, error, settings):
    with pytest.raises(error, match=next(iter(settings)).split("_")[0]):
        serve(**{"queue": queue, "port": 0, **settings})


# --- status and metrics ---------------------------------------------------------------------------


def test_the_snapshot_is_told_as_it_is_in_python(client, queue, clock):
    assert client("/?shard=0").granted
    client("/?shard=3")
    wait_for_line(queue, 1)
    clock.advance(1.0)
    shown = json.loads(client("/status.json").read()[2])
    assert shown == json.loads(json.dumps(asdict(queue.snapshot())))
    assert shown["buckets"][0]["shards"] == [{"shard_id": 3, "waited": 1.0, "eta": 4.25}]
    assert shown["limit"]["remaining"] == 999


def test_the_latest_grants_are_told(client, clock):
    assert client("/?shard=7").granted
    clock.advance(2.0)
    shown = json.loads(client("/recent.json").read()[2])
    assert shown.pop("grants") == [{"shard_id": 7, "bucket": 0, "ago": 2.0}]
    assert shown == {"window": WINDOW, "keeps_limit": True, "reserve": 0}


def test_the_metrics_are_prometheus(client, queue, clock, short_tarpit):
    assert client("/?shard=0").granted
    client("/?shard=1")
    wait_for_line(queue, 1)
    clock.advance(WINDOW)
    until(lambda: queue.snapshot().granted == 2)
    client("/?shard=2")
    wait_for_line(queue, 1)
    assert client().send("nonsense\r\n\r\n").is_closed_without_a_byte()
    status, headers, body = client("/metrics").read()
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert all(name.startswith("gateway_queue_") for name in families)
    assert all(family.documentation for family in families.values())
    assert families["gateway_queue_wait_seconds"].type == "histogram"
    assert families["gateway_queue_granted"].type == "counter"
    assert values["gateway_queue_granted_total",] == 2
    assert values["gateway_queue_waiting", "0"] == 1
    assert values["gateway_queue_wait_seconds_count",] == 2
    assert values["gateway_queue_wait_seconds_sum",] == WINDOW
    assert values["gateway_queue_wait_seconds_bucket", "5"] == 1
    assert values["gateway_queue_wait_seconds_bucket", "10"] == 2
    assert values["gateway_queue_refused_total", "400"] == 1
    assert values["gateway_queue_remaining",] == 998
    assert values["gateway_queue_resets_in_seconds",] == DAY - WINDOW


def test_a_queue_without_a_budget_tells_none(clock):
    with (
        LocalQueue(clock=clock) as queue,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        assert b"remaining" not in client("/metrics").read()[2]
        assert json.loads(client("/status.json").read()[2])["limit"] is None
        assert json.loads(client("/recent.json").read()[2])["keeps_limit"] is False


@pytest.mark.parametrize("make", [SqliteQueue, lambda _, **given: LargeBotQueue(None, **given)])
def test_a_limit_that_is_not_known_yet_is_told_from_none(tmp_path, make, monkeypatch):
    monkeypatch.setattr(limit_reader, "log", logging.getLogger("gateway_queue_sync.elsewhere"))

    def unreachable():
        raise OSError("not now")

    with (
        make(tmp_path / "q.sqlite3", refresh=unreachable) as queue,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        assert json.loads(client("/status.json").read()[2])["limit"] is None
        assert json.loads(client("/recent.json").read()[2])["keeps_limit"] is True


@pytest.mark.parametrize("path", ["/status.json", "/metrics", "/recent.json"])
def test_what_tells_of_the_bot_needs_the_secret(strict, path):
    assert strict(path).read()[0] == 401
    assert strict(path, "GET", SECRET).read()[0] == 200


@pytest.mark.parametrize("path", ["/status", "/healthz"])
def test_what_tells_nothing_of_the_bot_is_open(strict, path):
    status, headers, _ = strict(path).read()
    assert status == 200
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/status", "/status.json", "/recent.json", "/metrics", "/healthz"]
)
def test_reserved_paths_are_only_read(client, queue, path):
    assert client(path, "POST", "Content-Length: 0").read()[0] == 405
    assert client(path + "?shard=0", "HEAD").read(head_only=True)[0] == 200
    assert queue.snapshot().granted == 0


def test_all_who_ask_for_its_health_at_once_cost_one_look(tmp_path, monkeypatch):
    with (
        SqliteQueue(tmp_path / "q") as queue,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        looks, go_on, look = [], threading.Event(), queue.snapshot

        def slow():
            looks.append(threading.current_thread().name)
            assert go_on.wait(PATIENCE)
            return look()

        monkeypatch.setattr(queue, "snapshot", slow)
        many = [client("/healthz") for _ in range(20)]
        until(lambda: len(broker._service.shared._receivers) == 20)
        many[0].close()
        go_on.set()
        assert all(one.read()[0] == 200 for one in many[1:])
        assert client("/healthz").read()[0] == 200
        assert len(looks) == 1


def test_readers_share_one_look_a_second(queue, monkeypatch):
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        looks, look = [], queue.snapshot
        monkeypatch.setattr(
            queue, "snapshot", lambda: looks.append(threading.current_thread().name) or look()
        )
        since = time.monotonic()
        readers = [client() for _ in range(20)]
        for _ in range(10):
            for reader in readers:
                reader.ask("/status.json").ask("/metrics").ask("/recent.json").ask("/healthz")
            assert all(reader.read()[0] == 200 for reader in readers for _ in range(4))
        assert 1 <= len(looks) <= 2 + (time.monotonic() - since)
        assert {name.rpartition("_")[0] for name in looks} == {"gateway-queue-broker-read"}


def test_a_look_that_takes_long_delays_readers_alone(tmp_path, monkeypatch):
    goes_on = threading.Event()
    with (
        SqliteQueue(tmp_path / "q", interval=0.05, margin=0.05) as queue,
        serve(queue, port=0) as broker,
        HttpQueue(broker.url, interval=0.05, margin=0.05) as other,
        clients_of(broker.port) as client,
    ):
        monkeypatch.setattr(queue, "snapshot", lambda: goes_on.wait(PATIENCE) and 1 / 0)
        readers = [client("/status.json"), client("/metrics"), client("/healthz")]
        for shard in range(3):
            assert client(f"/?shard={shard}").granted
            assert other.acquire(shard, timeout=PATIENCE)
        assert client("/status").read()[0] == 200
        assert all(reader.is_silent() for reader in readers)
        goes_on.set()
        assert [reader.read()[0] for reader in readers] == [500] * 3


@pytest.mark.parametrize(
    ("path", "status"),
    [("/health", 200), ("/healthz/", 200), ("/metrics/", 200), ("/status/", 303), ("/robots.txt", 404)],
)  # fmt: skip
def test_what_probes_and_crawlers_ask_takes_no_permit(client, queue, path, status):
    assert client(path).read()[0] == status
    assert queue.snapshot().granted == 0


def test_a_ledger_out_of_reach_is_not_healthy_and_the_log_alone_says_why(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(reports, "MAX_AGE", 0.1)
    monkeypatch.setattr(remote, "MAX_REQUEST_US", 200_000)
    path = tmp_path / "state.sqlite3"
    with (
        SqliteQueue(path) as queue,
        serve(queue, port=0) as broker,
        clients_of(broker.port) as client,
    ):
        assert client("/healthz").read()[0] == 200
        path.write_bytes(b"no database" * 100)
        until(lambda: client("/healthz").read()[0] == 503)
        for _ in range(3):
            status, _, body = client("/healthz").read()
            time.sleep(0.15)
        assert status == 503
        assert json.loads(body) == {"error": "the state is unreachable"}
    logged = [text for text in caplog.messages if "the state is unreachable" in text]
    assert len(logged) == 1
    assert "state.sqlite3" in logged[0]


def test_what_a_client_says_cannot_forge_log_lines(client, caplog):
    client("/?shard=%0aINFO+forged")
    until(lambda: "shard must be" in caplog.text)
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_method_cannot_forge_log_lines_or_fill_them(client, caplog):
    client().send("A\x1b[31m / HTTP/1.1\r\n\r\n")
    client().send("A" * 3_000 + " / HTTP/1.1\r\n\r\n")
    until(lambda: "no shard" in caplog.text)
    assert "\x1b" not in caplog.text
    assert all(len(record.getMessage()) < 300 for record in caplog.records)


def test_bad_shards_do_not_flood_the_log(strict, caplog):
    many = strict()
    for _ in range(200):
        assert many.ask("/?shard=x", "GET", OURS, SECRET).read()[0] == 400
    assert 1 <= caplog.text.count("shard must be") < 100


# --- the ledger's wire ----------------------------------------------------------------------------


def test_an_account_in_memory_is_not_shared_over_http(client):
    status, _, body = client("/ledger", "POST", JSON, "Content-Length: 2").send("{}").read()
    assert status == 404
    assert "memory" in json.loads(body)["error"]


REQUEST = to_wire(
    Request(
        *(1, 1_000, "one", 1, 5_000_000, 250_000, 86_400_000_000, 5_000_000),
        *(0, 0, 0, 1, 0),
        introduction=Introduction("", "", None, 0, 0, 0, None),
    )
)
LIMIT = [1, 1000, 1000, 0, 1, 0, 0]
WAITER = [7, 0, 0, 0, 0]


def changed(**fields):
    """The request with other fields."""
    row = list(REQUEST)
    for name, value in fields.items():
        row[Request._fields.index(name)] = value
    return row


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "null", "5", '"x"', "[" * 100_000, "{}", "\xff", changed(session=5),
     changed(session="x" * 301), changed(number="1"), changed(number=1.5), changed(number=True),
     changed(number=2**53), changed(sent_us=None), [*REQUEST, 1], REQUEST[:-1], changed(limit=7),
     changed(limit=LIMIT[:-1]), changed(limit={"total": 5}), changed(lines=7), changed(lines=[7]),
     changed(lines=[[0, 0, [WAITER[:-1]]]]), changed(lines=[[0, 0, WAITER]]),
     changed(reports=[["stolen", 1, 0, 0, 0]]), changed(introduction=[0])],
    ids=lambda body: str(body)[:20] + str(len(str(body))),
)  # fmt: skip
def test_nonsense_for_the_ledger_is_refused_and_changes_nothing(body):
    body = body if isinstance(body, str) else json.dumps(body)
    memory = MemoryBackend(FakeClock())
    with queue_on(memory) as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            body = body.encode("latin-1")
            one = client("/ledger", "POST", JSON, f"Content-Length: {len(body)}").send(body)
            assert one.read()[0] == 400
            assert memory.relayed == []
            assert 'refused_total{status="400"} 1' in client("/metrics").read()[2].decode()


def test_a_body_for_the_ledger_has_a_known_and_sane_length(tmp_path):
    with SqliteQueue(tmp_path / "q") as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            assert client("/ledger", "POST", JSON, "Content-Length: 99999999").read()[0] == 413
            assert client("/ledger", "POST", JSON, "Transfer-Encoding: chunked").read()[0] == 413
            assert client("/ledger", "GET").read()[0] == 405
            good = json.dumps(REQUEST)
            one = client("/ledger", "POST", JSON, f"Content-Length: {len(good)}").send(good)
            reply = from_wire(Reply, json.loads(one.read()[2]))
            assert (reply.attempt, reply.number, reply.status) == (1, 1, OK)


def test_the_ledger_needs_the_secret(tmp_path):
    with SqliteQueue(tmp_path / "q") as queue, serve(queue, port=0, secret="s3cret") as broker:
        with clients_of(broker.port) as client:
            assert client("/ledger", "POST", JSON, "Content-Length: 2").send("{}").read()[0] == 401


BROWSERS = [
    ("Sec-Fetch-Site: cross-site", "Origin: https://evil.example"),
    ("Sec-Fetch-Site: same-origin",),
    ("Origin: null",),
]


@pytest.mark.parametrize("says", BROWSERS)
def test_no_page_in_a_browser_gets_a_permit_or_gives_an_order(tmp_path, short_tarpit, says):
    with SqliteQueue(tmp_path / "q") as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            before = asdict(queue.snapshot())["limit"]
            order = json.dumps(changed(limit=LIMIT))
            length = f"Content-Length: {len(order)}"
            assert client("/ledger", "POST", JSON, length, *says).send(order).read()[0] == 403
            for method in ("GET", "POST"):
                ask = ("/?shard=0", method, "Content-Length: 0", *says)
                assert client(*ask).is_closed_without_a_byte()
                assert client(*ask, OURS).read()[0] == 403
                assert client(*ask, HTML).read()[1]["location"] == "/status"
            assert asdict(queue.snapshot())["limit"] == before
            assert queue.snapshot().granted == 0


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "x"])
def test_what_a_form_could_send_is_no_order(tmp_path, kind):
    with SqliteQueue(tmp_path / "q") as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            says = (f"Content-Type: {kind}", "Content-Length: 2")
            assert client("/ledger", "POST", *says).send("{}").read()[0] == 415


FOREIGN = ["evil.example", "evil.example:8787", "localhost.evil.example", "10.0.0.1", "[::2]", "["]
LOCAL = [
    "localhost",
    "LOCALHOST:1",
    "app.localhost",
    "localhost.",
    "127.9.9.9:80",
    "[::1]:8787",
    "",
]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("agent", ["Mozilla/5.0", "curl/8.5.0"])
def test_a_page_under_a_name_that_was_pointed_here_gets_nothing(
    client, queue, host, agent, short_tarpit
):
    """Whatever else it says: in Firefox ``fetch`` may set any User-Agent."""
    host, agent = f"Host: {host}", f"User-Agent: {agent}"
    for path in ("/status.json", "/metrics", "/recent.json"):
        assert client(path, "GET", host).read()[0] == 403
    assert client("/ledger", "POST", JSON, "Content-Length: 2", host).send("{}").read()[0] == 403
    assert client("/?shard=0", "GET", host, agent).is_closed_without_a_byte()
    assert client("/?shard=0", "GET", host, agent, OURS).read()[0] == 403
    url = host.replace("Host: ", "http://") + "/?shard=0"
    assert client(url, "GET", OURS).read()[0] == 403
    assert queue.snapshot().granted == 0


@pytest.mark.parametrize("host", LOCAL)
def test_the_names_of_this_machine_are_fine(client, host):
    assert client("/status.json", "GET", f"Host: {host}").read()[0] == 200
    assert client("/?shard=0", "GET", f"Host: {host}", "User-Agent: Mozilla/5.0").granted


@pytest.mark.parametrize("request_", ["GET {} HTTP/1.0\r\n\r\n", "GET {} HTTP/1.1\r\n\r\n"])
def test_clients_without_a_host_are_served(client, request_):
    assert client().send(request_.format("/status.json")).read()[0] == 200
    assert client().send(request_.format("/?shard=0")).granted


def test_who_loads_a_page_under_a_foreign_name_is_sent_to_ours(client, queue):
    answer = client("/", "GET", "Host: bots.example", "User-Agent: Mozilla/5.0", HTML).read()
    assert (answer[0], answer[1]["location"]) == (303, "/status")
    assert queue.snapshot().granted == 0


@pytest.mark.parametrize("accept", ["text/html, image/gif, */*; q=.2", "*/*"])
def test_what_a_program_accepts_makes_it_no_browser(client, accept):
    """Java's URL connections accept HTML, and bots take any status for a permit."""
    assert client("/?shard=0", "GET", f"Accept: {accept}", "User-Agent: Java/21").granted


def test_with_a_secret_any_name_will_do(strict):
    assert strict("/status.json", "GET", "Host: bots.example", SECRET).read()[0] == 200


def test_a_body_is_not_waited_for_if_its_request_is_refused(tmp_path):
    """Nor kept: it may be a megabyte, of anybody."""
    with SqliteQueue(tmp_path / "q") as queue, serve(queue, port=0, secret="s3cret") as broker:
        with clients_of(broker.port) as client:
            one = client("/ledger", "POST", JSON, "Content-Length: 1000000")
            assert one.read()[0] == 401
            one.send(b"x" * 1_000_000).ask("/healthz")
            assert one.read()[0] == 200
            assert client("/ledger", "PUT", JSON, SECRET, "Content-Length: 9").read()[0] == 405


def test_a_body_that_comes_in_pieces_is_not_searched_for_the_end_of_a_head(tmp_path, monkeypatch):
    searched, search = [], connection.parser.end_of_head
    monkeypatch.setattr(
        connection.parser, "end_of_head", lambda data: searched.append(len(data)) or search(data)
    )
    with SqliteQueue(tmp_path / "q") as queue, serve(queue, port=0) as broker:
        with clients_of(broker.port) as client:
            one = client("/ledger", "POST", JSON, "Content-Length: 1000")
            until(lambda: searched)
            before = len(searched)
            for _ in range(1_000):
                one.send(b"x")
            assert one.read()[0] == 400
            assert len(searched) == before


def test_waiting_costs_no_thread(client, queue):
    assert client("/?shard=0").granted
    before = threading.active_count()
    for number in range(200):
        client(f"/?shard={number + 1}")
    wait_for_line(queue, 200)
    assert threading.active_count() <= before + 9  # the pool, and the futures' thread


@pytest.mark.parametrize("shared", [False, True])
def test_an_observer_that_takes_its_time_holds_nobody_up(tmp_path, shared):
    goes_on, seen = threading.Event(), []

    def observer(event):
        seen.append(threading.current_thread().name)
        if isinstance(event, ShardWaiting):
            goes_on.wait(PATIENCE)

    queue = (
        SqliteQueue(tmp_path / "q", observer=observer)
        if shared
        else LargeBotQueue(limit(), observer=observer)
    )
    with queue, serve(queue, port=0) as broker, clients_of(broker.port) as client:
        for number in range(2):
            client(f"/?shard={number}")
        until(lambda: seen, "an event")
        assert client("/status").read()[0] == 200
        goes_on.set()
        assert "gateway-queue-broker" not in seen


def test_errors_in_the_broker_are_logged_and_grant_nothing(client, queue, caplog, monkeypatch):
    monkeypatch.setattr(queue, "snapshot", lambda: 1 / 0)
    with caplog.at_level(logging.ERROR):
        assert client("/status.json").read()[0] == 500
    assert "ZeroDivisionError" in caplog.text


FIGURES = ["/status.json", "/recent.json", "/metrics", "/healthz"]


def test_readers_are_answered_again_after_any_error(client, caplog, monkeypatch):
    """In each part of the answers, and also if no thread can be started."""
    monkeypatch.setattr(reports, "MAX_AGE", 0.0)
    with monkeypatch.context() as broken:
        broken.setattr(ThreadPoolExecutor, "submit", lambda *_: 1 / 0)
        assert client("/status.json").is_closed_without_a_byte()
    assert client("/status.json").read()[0] == 200
    with monkeypatch.context() as broken:
        broken.setattr(reports.Reports, "_recent_permits", lambda _: 1 / 0)
        assert [client(path).read()[0] for path in FIGURES] == [500] * 4
    assert [client(path).read()[0] for path in FIGURES] == [200] * 4
    assert "ZeroDivisionError" in caplog.text


def test_who_cannot_stand_in_line_is_let_go_with_what_came_before_it(
    queue, caplog, monkeypatch, short_tarpit
):
    """There may be no thread left for the queue's worker, say."""

    def fails(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(waiting, "enqueue", fails)
    with serve(queue, port=0) as broker, clients_of(broker.port) as client:
        one = client("/healthz").ask("/?shard=0")
        assert one.read()[0] == 200
        assert one.is_closed_without_a_byte()
        assert client("/?shard=0", "GET", OURS).read()[0] == 503
        assert not broker._service.room.clients
    assert "can't start new thread" in caplog.text


def test_an_error_in_a_handler_closes_its_connection(client, queue, caplog, monkeypatch):
    monkeypatch.setattr(routes, "parse_query", lambda _: 1 / 0)
    one = client("/healthz").ask("/?shard=0")
    assert one.read()[0] == 200
    assert one.is_closed_without_a_byte()
    assert queue.snapshot().granted == 0
    assert "ZeroDivisionError" in caplog.text
