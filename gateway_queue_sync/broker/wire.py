"""What goes over the broker's wire: requests read by the standard library's parsers, and answers.

The plain wire is that of twilight's ``gateway-queue``: any method and path, ``?shard=N``, and no byte
before the grant.
"""

from __future__ import annotations

import json
import math
import re
import sys
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from gateway_queue_sync.ledgers.http import OUR_HEADER, PATH
from gateway_queue_sync.ledgers.wire import MAX_NUMBER
from gateway_queue_sync.models import to_us

MESSAGE = b'{"message": "You\'re free to connect now! :)"}'
# Those which tell nothing of the bot; the others follow.
OPEN = ("/status", "/status/", "/healthz", "/favicon.ico", "/robots.txt")
RESERVED = (*OPEN, "/status.json", "/recent.json", "/metrics", PATH)
MAX_HEAD = 8_192  # bytes
MAX_TICKET = 200  # characters
MAX_BUCKETS = 10_000
MAX_HEAD_START = 3_600.0  # s
MIN_TIMEOUT = 0.05  # s: what asking takes
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")


Refusal = tuple[int, str] | tuple[int, str, tuple[str, str]]
"""A status, what is wrong, and a header."""


class Head(NamedTuple):
    """What the head of a request says.

    ``refusal`` says what is wrong with it, if anything is. ``closes``: the connection ends with the
    answer. ``is_ours``: the client knows what a status means. ``is_browser``: a page in a browser, or
    the person before it, neither of which needs a permit. ``seems_browser``: an old one says no more.
    ``body_length`` is ``None`` if the end of the body is not told in a way that is read here.
    """

    command: str = ""
    path: str = ""
    query: str = ""
    refusal: str | None = None
    closes: bool = True
    is_ours: bool = False
    is_browser: bool = False
    seems_browser: bool = False
    is_json: bool = False
    body_length: int | None = 0
    host: str = ""
    authorization: str = ""

    @property
    def is_reserved(self) -> bool:
        """Whether its path is no legacy client's."""
        return self.path in RESERVED


def read_head(raw: bytes) -> Head:
    """Return what a head says."""
    parsed = _Parsed(raw)
    if parsed.refusal is not None:
        return Head(refusal=parsed.refusal)
    try:
        target = urlsplit(parsed.path)
    except ValueError as error:
        return Head(refusal=str(error))
    path = "/healthz" if target.path.rstrip("/") == "/health" else target.path or "/"
    if path not in RESERVED and path.rstrip("/") in RESERVED:
        path = path.rstrip("/")
    headers = parsed.headers
    length = headers.get("Content-Length", "0")
    known = "Transfer-Encoding" not in headers and re.fullmatch("[0-9]{1,15}", length)
    return Head(
        sys.intern(parsed.command),
        sys.intern(path),
        target.query,
        closes=parsed.close_connection,
        is_ours=OUR_HEADER in headers,
        is_browser="Sec-Fetch-Site" in headers or "Origin" in headers,
        seems_browser=headers.get("User-Agent", "").startswith("Mozilla/"),
        is_json=headers.get_content_type() == "application/json",
        body_length=int(length) if known else None,
        host=headers.get("Host", ""),
        authorization=headers.get("Authorization", ""),
    )


class _Parsed(BaseHTTPRequestHandler):
    """A head, read as the standard library's server reads it."""

    protocol_version = "HTTP/1.1"

    def __init__(self, raw: bytes) -> None:
        self.rfile = BytesIO(raw)
        self.raw_requestline = self.rfile.readline()
        self.refusal: str | None = None
        if not self.parse_request():
            self.refusal = self.refusal or "no request"
        elif self.request_version < "HTTP/1.0":
            self.refusal = f"{self.request_version} is not spoken here"

    def send_error(self, code: int, message: str | None = None, _: str | None = None) -> None:
        """Note what is wrong, instead of answering it."""
        self.refusal = message or str(code)

    def handle_expect_100(self) -> bool:
        """Answer nothing before the grant: some clients take any status for it."""
        return True


def end_of_head(received: bytes | bytearray) -> int | None:
    """Return the length of the head that is first in what came; ``None`` if there is no end yet."""
    end = _END_OF_HEAD.search(received)
    return None if end is None else end.end()


class Ask(NamedTuple):
    """A client's wish for a permit: ``timeout`` in seconds, ``key`` is what a kept place goes by."""

    shard_id: int = 0
    priority_us: int = 0
    timeout: float | None = None
    key: object = None


def read_ask(query: str) -> tuple[Ask, list[str]]:
    """Return what a query asks for, and what is wrong with it: a bad shard counts as 0."""
    try:
        fields = {name: values[-1] for name, values in parse_qs(query, max_num_fields=100).items()}
    except ValueError as error:
        return Ask(), [str(error)]
    wrong = []
    shard_id = 0
    key: tuple[str, str | int] | None = None
    shard = fields.get("shard")
    if shard is None or not re.fullmatch("[0-9]{1,16}", shard) or int(shard) > MAX_NUMBER:
        wrong.append(
            "no shard" if shard is None else f"shard must be a shard id, not {shard!r:.50}"
        )
    else:
        shard_id = int(shard)
        key = ("ticket", fields["ticket"]) if "ticket" in fields else ("shard", shard_id)
    if len(fields.get("ticket", "")) > MAX_TICKET:
        wrong.append(f"ticket must be {MAX_TICKET} characters at most")
        key = None
    priority = _number(fields, "priority", wrong) or 0.0
    priority = max(-MAX_HEAD_START, min(priority, MAX_HEAD_START))
    timeout = _number(fields, "timeout", wrong)
    if timeout is not None and timeout < 0:
        wrong.append(f"timeout must not be negative, not {timeout:g}")
        timeout = None
    if timeout is not None:
        timeout = max(timeout, MIN_TIMEOUT)
    return Ask(shard_id, to_us(priority), timeout, key), wrong


def _number(fields: dict[str, str], name: str, wrong: list[str]) -> float | None:
    """Return a field's number of seconds; one that is wrong counts as left out."""
    if name not in fields:
        return None
    try:
        number = float(fields[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        wrong.append(f"{name} must be a number of seconds, not {fields[name]!r:.50}")
        return None
    return number


class Answer(NamedTuple):
    """A whole response."""

    status: int
    body: bytes = b""
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


GRANTED = Answer(200, MESSAGE)
TO_PAGE = Answer(303, headers=(("Location", "/status"),))
_REASONS = {status: reasons[0] for status, reasons in BaseHTTPRequestHandler.responses.items()}


def error(status: int, what: str, *headers: tuple[str, str]) -> Answer:
    """Return a refusal for a client that knows what a status means."""
    return Answer(status, json.dumps({"error": what}).encode(), headers=headers)


def as_json(value: Any) -> Answer:
    """Return an answer that is JSON."""
    return Answer(200, json.dumps(value, separators=(",", ":")).encode())


def page(html: bytes) -> Answer:
    """Return an answer that is a page; what may run in it, it says itself."""
    headers = (
        ("Content-Security-Policy", "frame-ancestors 'none'"),
        ("X-Content-Type-Options", "nosniff"),
    )
    return Answer(200, html, "text/html; charset=utf-8", headers)


def response(answer: Answer, head: Head) -> bytes:
    """Return the bytes of an answer to a request."""
    lines = [
        f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, '')}",
        f"Content-Type: {answer.kind}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        f"Connection: {'close' if head.closes else 'keep-alive'}",
        *(f"{name}: {value}" for name, value in answer.headers),
        "\r\n",
    ]
    return "\r\n".join(lines).encode("latin-1") + (b"" if head.command == "HEAD" else answer.body)
