"""The parser of the broker's requests: what it accepts, refuses and returns."""

from __future__ import annotations

import random
import sys

import pytest

from gateway_queue_sync.broker.positions import KEPT_US, MAX_HELD, HeldPositions, Position
from gateway_queue_sync.request_parser import (
    MAX_HEAD,
    Head,
    Malformed,
    end_of_head,
    parse_head,
    parse_query,
)

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


def head(*lines: str, first: str = "GET / HTTP/1.1") -> Head | Malformed:
    return parse_head("\r\n".join([first, *lines, "", ""]).encode("latin-1"))


@pytest.mark.parametrize(
    "lines",
    [
        ("no colon", "Content-Length: 5"),
        ("Content-Length : 5",),
        ("Content-Length\t: 5",),
        (" folded", "Content-Length: 5"),
        ("X: y", " folded"),
        (": nameless",),
        ("a b: c",),
        ("X: a\0b",),
        ("X: a\x0bb",),
        ("X: a\rb",),
        ("X: a\r\rb",),
        ("Content-Length: 5\r", "X: y"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5", "content-length: 5"),
        ("Content-Length: 5, 5",),
        ("Content-Length: +5",),
        ("Content-Length: 0x5",),
        ("Content-Length: \xa05",),
        ("Content-Length:",),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
        ("Transfer-Encoding: \x0bchunked",),
        ("Host: a", "Host: b"),
        tuple(f"X{number}: y" for number in range(101)),
    ],
)
def test_what_could_be_read_in_another_way_is_refused(lines: tuple[str, ...]) -> None:
    refused = head(*lines)
    assert isinstance(refused, Malformed)
    assert refused.status == 400
    assert not refused.understands_status


@pytest.mark.parametrize(
    "first",
    [
        *("", "GET", "GET /", "GET  / HTTP/1.1", "GET / HTTP/1.1 ", " GET / HTTP/1.1"),
        *("GET /\0 HTTP/1.1",),
        *("G\x1bT / HTTP/1.1", "GET /é HTTP/1.1", "GET / HTTP/0.9", "GET / HTTP/2.0", "GET / http/1.1"),
        *("GET / HTTP/1.10", "GET /a b HTTP/1.1", "GET\t/\tHTTP/1.1"),
    ],
)  # fmt: skip
def test_a_first_line_that_is_no_request_is_refused(first: str) -> None:
    assert isinstance(head(first=first), Malformed)


def test_transfer_encoding_does_not_exist_in_http_1_0() -> None:
    refused = head("Transfer-Encoding: chunked", first="POST / HTTP/1.0")
    assert isinstance(refused, Malformed)


def test_a_client_that_knows_statuses_is_known_though_its_head_is_malformed() -> None:
    refused = head("no colon", "gateway-queue: 1")
    assert isinstance(refused, Malformed)
    assert refused.understands_status


def test_a_head_that_is_too_large_is_refused_whoever_sends_it() -> None:
    refused = head("Gateway-Queue: 1", "X: " + "y" * MAX_HEAD)
    assert isinstance(refused, Malformed)
    assert (refused.status, refused.understands_status) == (431, True)


@pytest.mark.parametrize("empty", [b"", b"\r\n", b"\n"])
def test_an_empty_line_before_a_request_is_skipped(empty: bytes) -> None:
    raw = empty + GET + b"\r\n"
    assert end_of_head(raw) == len(raw)
    assert isinstance(parse_head(raw), Head)


def test_two_empty_lines_are_no_request() -> None:
    raw = b"\r\n\r\n" + GET + b"\r\n"
    end = end_of_head(raw)
    assert isinstance(parse_head(raw[:end]), Malformed)


@pytest.mark.parametrize(
    ("first", "connection", "kept"),
    [
        ("GET / HTTP/1.1", (), True),
        ("GET / HTTP/1.0", (), False),
        ("GET / HTTP/1.0", ("Connection: Keep-Alive",), True),
        ("GET / HTTP/1.1", ("Connection: close",), False),
        ("GET / HTTP/1.1", ("Connection: TE, close",), False),
        ("GET / HTTP/1.1", ("Connection: TE", "Connection:\tCLOSE "), False),
        ("GET / HTTP/1.1", ("Connection: closed",), True),
        ("GET / HTTP/1.1", ("Transfer-Encoding: chunked",), False),
    ],
)
def test_when_the_connection_is_kept(first: str, connection: tuple[str, ...], kept: bool) -> None:
    read = head(*connection, first=first)
    assert isinstance(read, Head)
    assert read.keep_alive is kept


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/?shard=1", "/", "shard=1"),
        ("//?shard=1", "//", "shard=1"),
        ("http://host/a?b?c", "/a", "b?c"),
        ("http://host?b", "/", "b"),
        ("*", "*", ""),
        ("/a#b?c", "/a", ""),
    ],
)
def test_a_target_is_a_path_and_a_query(target: str, path: str, query: str) -> None:
    read = head(first=f"GET {target} HTTP/1.1")
    assert isinstance(read, Head)
    assert (read.path, read.query) == (path, query)


def test_the_host_of_a_whole_url_counts_and_the_header_does_not() -> None:
    """Source: RFC 9112, 3.2.2."""
    read = head("Host: localhost", first="GET http://other:8787/?shard=1 HTTP/1.1")
    assert isinstance(read, Head)
    assert read.headers["host"] == "other:8787"
    read = head("Host: other", first="GET http:///?shard=1 HTTP/1.1")
    assert isinstance(read, Head)
    assert read.headers["host"] == "other"


def test_nothing_of_a_request_is_remembered() -> None:
    """CPython 3.12 never frees what is interned."""

    def read(number: int) -> None:
        path = f"/{number}-{'x' * 50}"
        parsed = head(f"X-{number}: y", first=f"M{number} {path}?shard={number} HTTP/1.1")
        assert isinstance(parsed, Head)
        parse_query(parsed.query)

    for number in range(1_000):
        read(number)
    before = sys.getallocatedblocks()
    for number in range(1_000, 11_000):
        read(number)
    assert sys.getallocatedblocks() - before < 2_000


def test_a_value_may_have_many_blanks() -> None:
    assert isinstance(head("X: " + " \t" * 3_500 + "x" + " " * 500), Head)


def test_random_requests_are_read_as_h11_reads_them() -> None:
    fuzz_request_parser = pytest.importorskip(
        "fuzz_request_parser", reason="h11 is not installed (the test extra)"
    )
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    assert fuzz_request_parser.fuzz(seed, seconds=2.0) > 0


# --- held positions -------------------------------------------------------------------------------


def test_ten_thousand_clients_under_one_key_return_to_their_positions() -> None:
    held = HeldPositions()
    arrivals = random.Random(1).sample(range(10_000), 10_000)
    for arrived_us in arrivals:
        held.store("key", Position(arrived_us, 0), 0)
    claimed = [held.claim("key", 1) for _ in range(10_000)]
    assert claimed == [(arrived_us, 0) for arrived_us in range(10_000)]
    assert held.claim("key", 1) is None


def test_a_position_is_let_go_after_30_s() -> None:
    held = HeldPositions()
    held.store("key", Position(2, 0), 0)
    held.store("key", Position(1, 0), 5)
    assert held.claim("key", KEPT_US + 1) == (1, 0)
    assert held.claim("key", KEPT_US + 1) is None
    assert len(held) == 0


def test_positions_that_come_and_go_leave_nothing_behind() -> None:
    held = HeldPositions()
    for number in range(50_000):
        held.store("key", Position(0, 0), number)
        assert held.claim("key", number) is not None
        held.store(number % 7, Position(number, 0), number * 10_000)
    assert len(held) <= 3_001
    assert held._stale <= len(held) + 16
    assert sum(map(len, held._by_key.values())) == len(held) + held._stale


def test_no_more_positions_are_held_than_there_may_be() -> None:
    held = HeldPositions()
    for number in range(MAX_HELD + 10):
        held.store(number, Position(number, 0), 0)
    assert len(held) == MAX_HELD
    assert held.claim(0, 0) is None
    assert held.claim(MAX_HELD, 0) == (MAX_HELD, 0)
