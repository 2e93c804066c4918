"""Random requests, as the broker's parser and as h11 read them: where they differ is an error.

As a command: ``python tests/fuzz_request_parser.py --seconds 60 [--seed N]``; it prints the seed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import NamedTuple

import h11

from gateway_queue_sync import request_parser as parser
from gateway_queue_sync.request_parser import Head

# What this parser refuses although h11 reads it. All of it could be read in another way elsewhere.
STRICTER = (
    "each header must be a line",  # folded lines, control characters
    "there must be one",  # repeated lengths, even equal ones
    "content-length must be",  # the like of "5, 5", and numbers beyond all reason
    "HTTP/",  # versions but 1.0 and 1.1
    "transfer-encoding must be chunked",  # also in HTTP/1.0
    "there must be at most",
    "the head of the request is too large",
)

METHODS = [b"GET", b"POST", b"HEAD", b"OPTIONS", b"BREW", b"g!#$%&'*+-.^_`|~"]
TARGETS = [b"/", b"/?shard=1", b"//?a", b"*", b"http://h/?shard=2", b"/%00", b"/a#b?c", b"/status"]
VERSIONS = [b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"HTTP/1.10"]
HEADERS = [
    *(b"Host: a", b"Host: b", b"Host:", b"Content-Length: 0", b"Content-Length: 5", b"A: b"),
    *(b"content-length: 5", b"Content-Length: 5, 5", b"Content-Length: 5, 6", b"Accept: */*"),
    *(b"Content-Length: +5", b"Content-Length: 5 5", b"Content-Length: 0x5", b"Content-Length:"),
    *(b"Content-Length: -1", b"Content-Length : 5", b" Content-Length: 5", b"Content-Length\t:5"),
    *(b"Content-Length: 05", b"Content-Length: 5\x0b", b"Content-Length:\t5\t", b"X\x00: y"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked, chunked", b"X: \xc3\xa4"),
    *(b"Transfer-Encoding: gzip", b"Transfer-Encoding: Chunked", b"Transfer-Encoding : chunked"),
    *(b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: x\r chunked", b"\tfolded", b": x"),
    *(b"Connection: close", b"Connection: TE, close", b"Connection: keep-alive", b"no colon"),
    *(b"Connection: Keep-Alive , CLOSE", b"Expect: 100-continue", b"X: a\x00b", b"X:\x7f", b""),
]  # fmt: skip
ENDS = [b"\r\n"] * 12 + [b"\n"] * 3 + [b"\r", b"\r\r\n", b"\n\r"]
BODIES = [b"", b"", b"hello", b"hell", b"hello!", b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"]
BYTES = [bytes([code]) for code in (0, 9, 10, 11, 13, 32, 34, 58, 127, 160, 255)]


class Reading(NamedTuple):
    """A request as somebody reads it, or the reason why it is refused."""

    method: str = ""
    target: str = ""
    body: bytes | None = b""  # None: chunked
    keep_alive: bool | None = False  # None: not known
    refused: str = ""


def ours(data: bytes) -> list[Reading]:
    """Return the requests that the broker would read, up to the first that is refused or incomplete."""
    readings = []
    while data:
        end = parser.end_of_head(data)
        if end is None:
            break
        head, data = parser.parse_head(data[:end]), data[end:]
        if not isinstance(head, Head):
            return [*readings, Reading(refused=head.reason)]
        if head.body_length is None:
            return [*readings, Reading(head.method, target(head), None)]
        body, data = data[: head.body_length], data[head.body_length :]
        readings.append(Reading(head.method, target(head), body, head.keep_alive))
        if not head.keep_alive or len(body) < head.body_length:
            break
    return readings


def target(head: Head) -> str:
    return f"{head.path}?{head.query}" if head.query else head.path


def its(data: bytes) -> list[Reading]:
    """Return the requests that h11 reads."""
    readings = []
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            return [*readings, Reading(refused=str(error))]
        if not isinstance(event, h11.Request):
            return readings
        read = event.method.decode(), event.target.decode()
        if (b"transfer-encoding", b"chunked") in event.headers:
            return [*readings, Reading(*read, None)]
        body = b""
        while isinstance(part := connection.next_event(), h11.Data):
            body += part.data
        if event.http_version < b"1.1" or not isinstance(part, h11.EndOfMessage):
            return [*readings, Reading(*read, body, None)]  # h11 keeps no connection of HTTP/1.0
        keep_alive = connection.their_state is not h11.MUST_CLOSE
        readings.append(Reading(*read, body, keep_alive))
        if not keep_alive:
            return readings
        connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
        connection.send(h11.EndOfMessage())
        if connection.our_state is h11.MUST_CLOSE:
            return readings
        connection.start_next_cycle()


def compare(data: bytes) -> str | None:
    """Return how the two readings differ, ``None`` if they are the same or ours is strict on purpose."""
    here, there = ours(data), its(data)
    for number, reading in enumerate(here):
        other = there[number] if number < len(there) else Reading(refused="nothing more")
        if reading.refused:
            strict = reading.refused.startswith(STRICTER)
            return None if other.refused or strict else f"only h11 reads {other}: {reading.refused}"
        if other.refused:
            if other.refused.startswith("Missing mandatory Host"):
                return None  # clients of HTTP/1.1 without one are served
            if other.refused == "no request line received":
                return None  # an empty line before a request, which RFC 9112 has skipped
            return f"only this parser reads {reading}: {other.refused}"
        known = reading.keep_alive if other.keep_alive is not None else None
        if reading._replace(target="", keep_alive=known) != other._replace(target=""):
            return f"{reading} is read as {other}"
        if reading.body is None or other.keep_alive is None:
            return None
    return None


def random_data(rng: random.Random) -> bytes:
    """Return one to three requests, most of them with something odd."""
    data = b""
    for _ in range(rng.choice((1, 1, 2, 3))):
        end = rng.choice(ENDS[:15]) if rng.random() < 0.9 else rng.choice(ENDS)
        lines = [b" ".join((rng.choice(METHODS), rng.choice(TARGETS), rng.choice(VERSIONS)))]
        lines += [b"Host: a"] * (rng.random() < 0.8)
        lines += rng.choices(HEADERS, k=rng.choice((0, 1, 1, 2, 3)))
        data += b"".join(
            line + (rng.choice(ENDS) if rng.random() < 0.05 else end) for line in lines
        )
        data += end + rng.choice(BODIES)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(BYTES) + data[at + rng.randrange(2) :]
    return rng.choice((b"", b"", b"", b"\r\n", b"\n")) + data


def fuzz(seed: int, seconds: float) -> int:
    """Compare random requests for so long; return how many."""
    rng, count = random.Random(seed), 0
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        for _ in range(200):
            data = random_data(rng)
            difference = compare(data)
            assert difference is None, f"seed {seed}: {data!r}: {difference}"
            count += 1
    return count


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = options.parse_args()
    print(f"seed {given.seed}", flush=True)
    print(f"{fuzz(given.seed, given.seconds):,} connections were read as h11 reads them")


if __name__ == "__main__":
    sys.exit(main())
